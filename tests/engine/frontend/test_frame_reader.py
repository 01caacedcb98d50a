"""Frames out of bytes that come in any cut, with a bound on what is kept."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cierzo.engine.errors import FrameTooLarge, Overloaded
from cierzo.engine.frontend import frame_reader
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frame_reader import (
    ABSURD_BYTES,
    PREFIX_BYTES,
    FrameReader,
    Large,
    Skipped,
    envelope,
    peek,
)
from cierzo.engine.frontend.limits import ByteBudget

SMALL, MOST = 20, 300
encode = msgspec.msgpack.encode


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def _all(box: FrameReader, data: bytes, cuts: list[int]) -> list[bytes | Large | Skipped]:
    found: list[bytes | Large | Skipped] = []
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    start = 0
    for end in ends:
        box.feed(data[start:end])
        start = end
        while (frame := box.next()) is not None:
            found.append(bytes(frame) if isinstance(frame, memoryview) else frame)
    return found


@given(
    st.lists(st.integers(0, 700), max_size=6),
    st.lists(st.integers(0, 4000), max_size=30),
    st.sampled_from([10_000, 120]),
)
def test_any_cut_gives_the_same_frames_and_the_room_is_given_back(sizes, cuts, budget_bytes):
    bodies = [bytes((size + i) % 256 for i in range(size)) for size in sizes]
    budget = ByteBudget(FrontendConfig(max_unencoded_bytes=budget_bytes))
    box = FrameReader(MOST, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_reader, "SMALL_FRAME_BYTES", SMALL)
        found = _all(box, b"".join(map(_frame, bodies)), cuts)
    assert budget.num_bytes == 0
    assert len(found) == len(bodies)
    for body, frame in zip(bodies, found, strict=True):
        if len(body) <= SMALL:
            assert frame == body
        elif len(body) <= min(MOST, budget_bytes):
            assert isinstance(frame, Large)
            assert frame.body == body
        else:
            assert isinstance(frame, Skipped)
            assert frame.prefix == body[:PREFIX_BYTES]
            assert type(frame.error) is (FrameTooLarge if len(body) > MOST else Overloaded)


@given(st.integers(1, 299))
def test_a_frame_that_never_ends_is_charged_until_its_connection_is_gone(num_bytes):
    budget = ByteBudget(FrontendConfig(max_unencoded_bytes=1000))
    box = FrameReader(MOST, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_reader, "SMALL_FRAME_BYTES", SMALL)
        box.feed(_frame(b"x" * 300)[: 4 + num_bytes])
        assert box.next() is None
        assert budget.num_bytes == num_bytes
        box.close()
    assert budget.num_bytes == 0


def test_a_length_beyond_reason_is_no_frame():
    box = FrameReader(MOST, ByteBudget(FrontendConfig()))
    box.feed((ABSURD_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(FrameTooLarge):
        box.next()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text().filter(lambda key: key not in ("type", "stream")), VALUES, max_size=5),
    st.integers(0, 2**40),
    st.text(min_size=1, max_size=10),
    st.randoms(),
)
def test_type_and_stream_are_found_whatever_the_order_of_the_keys(others, stream, kind, random):
    items = [*others.items(), ("type", kind), ("stream", stream)]
    random.shuffle(items)
    found = peek(encode(dict(items)))
    assert (found.type, found.stream) == (kind, stream)


@given(st.binary(max_size=80))
def test_bytes_that_are_no_message_name_nothing_that_msgpack_does_not(data):
    found = peek(data)
    for message in (b"\x82\xa4type\xa4ping\xa6stream\x07" + data, b"\x81" + data):
        seen = peek(message[:PREFIX_BYTES])
        assert seen.stream in (-1, 7) or b"stream" in data
    assert found.stream == -1 or b"stream" in data


def _heads(text):
    """A text in each form that MessagePack has for it and for bytes."""
    body, size = text.encode(), len(text)
    forms = {"fixstr": bytes([0xA0 | size]) + body}
    for width, str_head, bin_head in ((1, 0xD9, 0xC4), (2, 0xDA, 0xC5), (4, 0xDB, 0xC6)):
        for name, head in (("str", str_head), ("bin", bin_head)):
            forms[f"{name}{8 * width}"] = bytes([head]) + size.to_bytes(width, "big") + body
    return forms


INTEGERS = {
    "fixint": b"\x07",
    **{f"uint{8 << i}": bytes([0xCC + i]) + (7).to_bytes(1 << i, "big") for i in range(4)},
    **{f"int{8 << i}": bytes([0xD0 + i]) + (7).to_bytes(1 << i, "big") for i in range(4)},
}
MAPS = {"fixmap": b"\x83", "map16": b"\xde\x00\x03", "map32": b"\xdf\x00\x00\x00\x03"}


@pytest.mark.parametrize("outer", MAPS)
@pytest.mark.parametrize("number", INTEGERS)
@pytest.mark.parametrize("form", _heads(""))
def test_type_and_stream_are_found_in_each_form_of_messagepack(form, number, outer):
    key, name, stream, text = (_heads(word)[form] for word in ("type", "generate", "stream", "text"))
    too_long = b"\xdb\x00\x4c\x4b\x40" + b"y" * 400
    for parts in ((key, name, stream, INTEGERS[number]), (stream, INTEGERS[number], key, name)):
        found = peek((MAPS[outer] + b"".join(parts) + text + too_long)[:PREFIX_BYTES])
        assert (found.type, found.stream) == ("generate", 7)
        found = peek(MAPS[outer] + b"".join(parts)[:-1])  # cut within the last value
        assert (found.type, found.stream) in (("generate", -1), ("", 7))


def test_a_prefix_that_ends_within_a_value_does_not_name_it():
    body = encode({"type": "generate", "stream": 70_000})
    for end in range(len(body)):
        assert peek(body[:end]).stream == -1
    assert peek(body).stream == 70_000


def test_a_large_message_that_cannot_be_decoded_is_still_its_streams():
    body = encode({"type": "generate", "stream": 5, "token_ids": [1] * 5000})
    found = envelope(bytearray(body[:-1]))
    assert (found.type, found.stream) == ("generate", 5)


def test_behind_a_long_list_the_stream_is_read_as_far_as_that_takes_no_time(monkeypatch):
    body = bytearray(encode({"token_ids": [1] * 5000, "type": "generate", "stream": 5}))
    assert peek(body).stream == -1
    assert envelope(body).stream == 5
    monkeypatch.setattr(frame_reader, "READABLE_BYTES", 5000)
    assert envelope(body).stream == -1
