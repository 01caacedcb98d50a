"""Pixels on their way to the core: in pieces ahead of their request, shared by equal images, gone with the last."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterable

import msgspec
import pytest
from image_prompts import picture, prompt_of, submit

from cierzo.cache.config import CacheConfig
from cierzo.engine.messages import Pixels, StepOutput, Submit
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.engine.worker.images import PixelStore
from cierzo.engine.worker.pipe import CorePipe
from cierzo.engine.worker.process import CoreLoop
from cierzo.scheduler.config import SchedulerConfig

PARTS = [1, (0, 2, 3), 5, (1, 1, 1)]


def pieces_of(request: Submit, size: int) -> list[Pixels]:
    return [
        Pixels(digest=image.digest, size=len(image.pixels), start=start, data=image.pixels[start : start + size])
        for image in request.images
        for start in range(0, len(image.pixels), size)
    ]


def bare(request: Submit) -> Submit:
    images = [msgspec.structs.replace(image, pixels=b"") for image in request.images]
    return msgspec.structs.replace(request, images=images)


def taken(pieces: Iterable[Pixels]) -> PixelStore:
    store = PixelStore()
    for piece in pieces:
        store.take(piece)
    return store


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_pieces_make_the_pixels(size: int) -> None:
    request = submit(1, PARTS)
    images = taken(pieces_of(request, size)).images(bare(request))
    assert [bytes(image.pixels.data) for image in images] == [image.pixels for image in request.images]
    assert [(image.offset, image.num_tokens, image.columns) for image in images] == [(1, 8, 3), (10, 2, 1)]
    assert [image.pixels.unit for image in images] == [2, 2]


def test_a_piece_that_is_missing_or_out_of_order_is_told() -> None:
    request = submit(1, PARTS)
    pieces = pieces_of(request, 50)
    for lacking in (pieces[1:], [pieces[0], *pieces[2:]], pieces[:5]):
        with pytest.raises(ValueError, match=r"images\[0\]: \d+ of (288|0) bytes of pixels have come"):
            taken(lacking).images(bare(request))
    again = taken([*pieces[:3], *pieces])  # begun anew
    assert len(again.images(bare(request))) == 2


def test_what_came_for_a_request_that_never_came_is_forgotten() -> None:
    lost, request = submit(1, PARTS), submit(2, [(2, 3, 2)])
    store = taken([*pieces_of(lost, 64)[:-1], *pieces_of(request, 64)])
    assert len(store.images(bare(request))) == 1
    assert not store._coming


def test_equal_images_of_living_requests_share_their_pixels() -> None:
    store = PixelStore()
    first = store.images(submit(1, PARTS))
    second = store.images(bare(submit(2, [(1, 1, 1), 5, (0, 2, 3)])))
    assert [image.pixels for image in second] == [image.pixels for image in reversed(first)]
    del first, second
    gc.collect()
    assert not store._living


def test_salts_share_no_embeddings() -> None:
    store = PixelStore()
    keys = {
        store.images(msgspec.structs.replace(submit(1, PARTS), cache_salt=salt))[0].key
        for salt in (b"", b"a", b"b")
    }
    assert len(keys) == 3


def test_a_core_takes_pieces_between_other_commands() -> None:
    """As the front end sends them: other requests go on meanwhile, and the tokens are those of pixels at once."""
    limits = SchedulerConfig(budget_tokens=32, max_running=8, max_model_len=128, max_chunk_tokens=32)

    def make_core() -> EngineCore:
        config = fake_config(limits, CacheConfig(block_tokens=8, num_blocks=64))
        return EngineCore(
            config, FakeRunner(vocab_size=32_000, num_blocks=64, block_tokens=8, max_running=8), lambda: 0.0
        )

    request, other = submit(1, PARTS), submit(2, [1, 2, 3], max_tokens=20)
    alone = make_core()
    alone.submit(request)
    expected = [token for _ in range(20) for delta in alone.step() for token in delta.token_ids]
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    pipe, got, steps = CorePipe(ours), [], 0
    loop = CoreLoop(make_core(), pipe, lambda: 0.0)
    theirs.settimeout(10)
    for command in (other, *pieces_of(request, 64), bare(request)):
        body = msgspec.msgpack.encode(command)
        theirs.sendall(len(body).to_bytes(4, "big") + body)
        assert loop.turn()
        steps += 1
    for _ in range(20):
        loop.turn()
    ours.close()
    received = b""
    while more := theirs.recv(65_536):
        received += more
    while received:
        size = int.from_bytes(received[:4], "big")
        for delta in msgspec.msgpack.decode(received[4 : 4 + size], type=StepOutput).deltas:
            got += [(delta.request_id, token) for token in delta.token_ids]
        received = received[4 + size :]
    assert [token for request_id, token in got if request_id == 1] == expected
    first = got.index((1, expected[0]))
    assert sum(request_id == 2 for request_id, _ in got[:first]) >= steps - 2, "nobody waited for the pixels"


def test_the_pictures_of_these_tests_are_what_they_say() -> None:
    pixels, digest = picture(0, 2, 3)
    assert len(pixels) == 4 * 6 * 3 * 4
    assert len(digest) == 16
    tokens, images = prompt_of([1, (0, 2, 3)])
    assert len(tokens) == 1 + images[0].num_tokens == 9
