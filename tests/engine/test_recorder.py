"""The flight recorder: what it writes, that it survives kill -9, its bounds, and a disk that refuses."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from recorded import CONFIG, KEPT, Recorded, parts, segments, submit

from cierzo.engine import flight
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.errors import ConfigError
from cierzo.engine.flight import (
    DIGEST_BYTES,
    Aborted,
    Ended,
    Failed,
    Header,
    Open,
    Step,
    Submitted,
    Tokens,
    packed,
    read,
)
from cierzo.engine.messages import Abort, Shutdown
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker.recorder import PieceDigests
from cierzo.engine.worker.recorder import log as recorder_log


def test_everything_is_there_in_order_and_nothing_of_the_text(tmp_path):
    folder = tmp_path / "made" / "flights"
    recorded = Recorded(folder)
    recorded.tell(submit(1))
    recorded.tell(submit(2, max_tokens=3))
    recorded.turn()
    recorded.tell(Abort(request_id=1))
    recorded.run()
    recorded.recorder.command(Shutdown())
    recorded.recorder.failed("DeviceFault: it is on fire")
    (segment,) = segments(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(segment.stat().st_mode) == 0o600
    (records,) = parts(folder)
    kinds = [type(record) for record in records]
    assert kinds == [Header, Submitted, Submitted, Step, Aborted, Step, Ended, Step, Ended, Failed]
    header, first, _, step = records[:4]
    assert msgspec.msgpack.decode(header.config, type=EngineConfig).name == CONFIG.name
    assert (first.num_prompt, first.tokens, first.sampling.stop) == (3, None, ())
    assert (step.num_seqs, step.num_tokens, step.rows) == (2, 6, [(1, 0, 0, 3), (2, 0, 0, 3)])
    assert b"secret" not in segment.read_bytes()
    assert all(step.readings for step in records if isinstance(step, Step))
    assert [(r.request_id, r.reason, r.output_tokens) for r in records if isinstance(r, Ended)] == [
        (1, "cancelled", 1),
        (2, "length", 3),
    ]


def test_token_ids_are_there_if_they_are_asked_for(tmp_path):
    recorded = Recorded(tmp_path, with_prompts=True)
    recorded.tell(submit(1))
    deltas = []
    while recorded.core.has_work():
        deltas += recorded.turn()
    (records,) = parts(tmp_path)
    assert next(record for record in records if isinstance(record, Submitted)).tokens == [1, 2, 1]
    assert next(record for record in records if isinstance(record, Submitted)).sampling.stop == ("secret",)
    told = [
        token for record in records if isinstance(record, Tokens) for _, _, ids in record.tokens for token in ids
    ]
    assert told == [token for delta in deltas for token in delta.token_ids]


def test_pieces_tell_what_is_equal_and_nothing_else():
    digests, others = PieceDigests(block_tokens=4), PieceDigests(block_tokens=4)

    def pieces(prompt, output=()):
        found = digests.of(prompt, output)
        return [found[at : at + DIGEST_BYTES] for at in range(0, len(found), DIGEST_BYTES)]

    whole = pieces([1, 2, 3, 4, 5, 6], [7, 8, 9])
    assert len(whole) == 4  # 1 2 3 4 | 5 6 | 7 8 | 9
    assert pieces([1, 2, 3, 4, 5, 7], [7, 8, 9]) == [whole[0], pieces([5, 7])[0], *whole[2:]]
    assert pieces([1, 2, 3, 4]) == whole[:1]
    assert pieces([1, 2, 3, 4], [5, 6, 7, 8]) == [whole[0], *pieces([5, 6, 7, 8])]
    assert len(set(pieces([1, 2], [1, 2]))) == 1
    assert others.of([1, 2, 3, 4], []) != whole[0]


def test_what_is_in_flight_has_pieces_too(tmp_path):
    recorded = Recorded(tmp_path, segment_bytes=12_000)
    for request_id in range(70):
        recorded.tell(submit(request_id, [*range(20)], max_tokens=20))
        for _ in range(4):
            recorded.turn()
    (submitted,) = {record.pieces for record in parts(tmp_path)[0] if isinstance(record, Submitted)}
    in_flight = [record for record in parts(tmp_path)[-1] if isinstance(record, Open)]
    assert len(submitted) == 3 * DIGEST_BYTES
    assert any(record.num_tokens > 24 for record in in_flight)
    for record in in_flight:
        assert record.pieces.startswith(submitted)
        output_pieces = (
            -(-record.num_tokens // 8) - 2 if record.num_tokens > 20 else 0
        )  # one within the third block
        assert len(record.pieces) == (3 + output_pieces) * DIGEST_BYTES


def test_the_cost_of_a_long_prompt_is_small():
    """The bound is loose: it takes 4 ms on an idle core."""
    digests, prompt = PieceDigests(block_tokens=32), [*range(100_000, 362_144)]
    took_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        assert len(digests.of(prompt, ())) == len(prompt) // 32 * DIGEST_BYTES
        took_s.append(time.perf_counter() - began_s)
    assert min(took_s) < 0.04


def test_rows_are_written_out_when_they_are_not_those_of_the_step_before(tmp_path):
    recorded = Recorded(tmp_path)
    recorded.tell(submit(1, max_tokens=8))
    for _ in range(4):
        recorded.turn()
    recorded.tell(submit(2, max_tokens=2))
    recorded.run()
    steps = [record for record in parts(tmp_path)[0] if isinstance(record, Step)]
    assert [step.rows is not None for step in steps] == [True, True, False, False, True, True, True, False]
    assert [step.num_tokens for step in steps] == [3, 1, 1, 1, 4, 2, 1, 1]


def test_rows_are_written_out_when_one_takes_the_place_of_another(tmp_path):
    recorded = Recorded(tmp_path)
    for request_id in range(9):  # one more than may run
        recorded.tell(submit(request_id, [request_id], max_tokens=10 if request_id else 3))
    recorded.run()
    steps = [record for record in parts(tmp_path)[0] if isinstance(record, Step)]
    assert [(step.num_seqs, step.num_tokens) for step in steps[:5]] == [(8, 8)] * 5
    assert [step.rows is not None for step in steps[:5]] == [True, False, False, True, False]


def test_a_segment_begins_between_two_turns(tmp_path):
    recorded = Recorded(tmp_path, with_prompts=True, segment_bytes=6000)
    first, number = [], 0
    for request_id in range(300):
        recorded.tell(submit(request_id, max_tokens=2))
        if recorded.recorder._number != number:
            number = recorded.recorder._number
            first += [type(record) for record in parts(tmp_path)[-1] if not isinstance(record, Header | Open)][:1]
        recorded.turn()
    assert len(first) > 5
    assert set(first) == {Submitted}


def test_segments_take_turns_and_each_begins_with_what_is_in_flight(tmp_path):
    recorded = Recorded(tmp_path, with_prompts=True, segment_bytes=7000)
    for request_id in range(200):
        recorded.tell(submit(request_id, max_tokens=4))
        recorded.turn()
    assert len(segments(tmp_path)) == 2
    old, new = parts(tmp_path)
    assert new[0].number == old[0].number + 1 > 2
    assert {path.stat().st_size for path in segments(tmp_path)} == {7000}
    last = [record for record in old if isinstance(record, Step)][-1]
    first = next(record for record in new if isinstance(record, Step))
    assert first.step == last.step + 1
    in_flight = [record for record in new if isinstance(record, Open)]
    assert in_flight
    for record in in_flight:
        assert record.tokens[: record.num_prompt] == [1, 2, record.request_id]
        assert record.num_computed < record.num_tokens == len(record.tokens)


def test_tokens_in_flight_that_would_fill_a_segment_are_left_out(tmp_path):
    recorded = Recorded(tmp_path, with_prompts=True, segment_bytes=8000)
    for request_id in range(8):
        recorded.tell(submit(request_id, max_tokens=400))
    while recorded.core.stats().output_tokens < 8 * 395:
        recorded.turn()
    newest = parts(tmp_path)[-1]
    left_out = [record.tokens is None for record in newest if isinstance(record, Open)]
    assert left_out == [False] * 2 + [True] * 6


def test_what_is_in_flight_never_fills_a_segment(tmp_path):
    recorded = Recorded(tmp_path, segment_bytes=20_000)
    for request_id in range(40):
        recorded.tell(submit(request_id, max_tokens=400, logit_bias=dict.fromkeys(range(100), 1.0)))
        recorded.turn()
    for _ in range(5):
        recorded.turn()
    if not any(isinstance(record, Step) for record in parts(tmp_path)[-1]):  # it has only just begun
        recorded.turn()
    newest = parts(tmp_path)[-1]
    assert 1 < sum(isinstance(record, Open) for record in newest) < 40
    assert any(isinstance(record, Step) for record in newest)


def test_a_core_that_ends_in_order_leaves_nothing(tmp_path):
    recorded = Recorded(tmp_path)
    recorded.recorder.close()
    assert not list(tmp_path.iterdir())


SUPPORT = Path(__file__).parents[1] / "support"
KILLED = """
import sys
sys.path.insert(0, {support!r})
from recorded import Recorded, submit
from pathlib import Path
recorded = Recorded(Path({folder!r}))
recorded.tell(submit(1, max_tokens=500))
for _ in range(100):
    recorded.turn()
print("going", flush=True)
while True:
    recorded.turn()
"""


def test_kill_9_leaves_a_record_that_can_be_read(tmp_path):
    script = KILLED.format(support=str(SUPPORT), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"going\n"
        process.send_signal(signal.SIGKILL)
    (records,) = parts(tmp_path, process.pid)
    steps = [record.step for record in records if isinstance(record, Step)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 100


def test_what_is_damaged_is_refused(tmp_path):
    recorded = Recorded(tmp_path / "flights")
    recorded.tell(submit(1))
    recorded.run()
    (data,) = flight.segments(str(tmp_path / "flights"), os.getpid())
    whole, path = packed(KEPT) + data, tmp_path / "x.flight"
    second = len(packed(KEPT))
    for place, text in (
        (second + 20, "record 1"),
        (second + 2, "record 1"),
        (30, "its beginning"),
        (1, "its begin"),
    ):
        broken = bytearray(whole)
        broken[place] ^= 0x40
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match=text) as caught:
            read(path)
        assert caught.value.field == "file"
    path.write_bytes(whole)
    count = len(read(path))
    path.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=f"record {count - 1}, at byte"):
        read(path)
    for nothing in (b"", b"no record at all", packed(Failed(message="no header"))):
        path.write_bytes(nothing)
        with pytest.raises(ConfigError, match="its beginning"):
            read(path)


def test_a_record_that_was_being_written_does_not_count(tmp_path):
    recorded = Recorded(tmp_path)
    recorded.tell(submit(1))
    (before,) = parts(tmp_path)
    memory, end = recorded.recorder._memory, recorded.recorder._size
    memory[end : end + 9] = b"cut short"
    assert parts(tmp_path) == [before]


def _told(caplog):
    """What the recorder has logged."""
    return [record.getMessage() for record in caplog.records if record.name == recorder_log.name]


def test_a_folder_that_cannot_be_written_switches_it_off(tmp_path, caplog):
    (tmp_path / "file").touch()
    recorded = Recorded(tmp_path / "file" / "flights")
    recorded.tell(submit(1))
    recorded.run()
    assert not recorded.recorder.is_on
    (message,) = _told(caplog)
    assert "the flight recorder is off" in message
    assert not recorded.readings.times  # they would gather
    recorded.recorder.close()


def test_a_full_disk_switches_it_off_and_the_core_goes_on(tmp_path, caplog, monkeypatch):
    recorded = Recorded(tmp_path, segment_bytes=9000)
    recorded.tell(submit(2))
    recorded.run()

    def full(*where):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    recorded.tell(submit(1, max_tokens=400))
    recorded.run()
    assert not recorded.recorder.is_on
    (message,) = _told(caplog)
    assert "the flight recorder is off" in message
    assert "No space left" in message
    assert not recorded.readings.times
    assert any(isinstance(record, Step) for record in parts(tmp_path)[0])  # what was there before can be read
    assert recorded.core.stats().finished == 2


def test_a_segment_that_was_just_made_hides_no_other(tmp_path):
    recorded = Recorded(tmp_path)
    (before,) = parts(tmp_path)
    (tmp_path / f"live-{os.getpid()}.1").write_bytes(bytes(1000))
    assert parts(tmp_path) == [before]
    recorded.recorder.close()


def test_a_command_that_no_segment_holds_switches_it_off(tmp_path, caplog):
    recorded = Recorded(tmp_path, with_prompts=True, segment_bytes=3000)
    recorded.tell(submit(1, [70_000] * 500))
    assert "is larger than a segment" in caplog.text
    assert not recorded.recorder.is_on
    recorded.run()
    assert recorded.core.stats().finished == 1


def test_the_cost_of_a_step_is_small(tmp_path):
    """A decode step of 64 sequences: one small write. The bound is loose; bench-step has the figure."""
    recorded = Recorded(tmp_path)
    for request_id in range(8):
        recorded.tell(submit(request_id, max_tokens=500))
    for _ in range(20):
        recorded.turn()
    plans = []
    recorded.core.observe = plans.append
    recorded.turn()
    (plan,) = plans
    best_s = 1.0
    for _ in range(20):
        began_s = time.perf_counter()
        for _ in range(100):
            recorded.recorder.step(plan)
        best_s = min(best_s, (time.perf_counter() - began_s) / 100)
    assert best_s < 50e-6


def test_settings_name_the_folder(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path / "tiny", like="small3")
    monkeypatch.setenv("CIERZO_CACHE_DIR", str(tmp_path / "cache"))
    options = EngineOptions(model=str(checkpoint), runner="fake")
    config = resolve(options)
    assert config.flight_folder == str(tmp_path / "cache" / "flights")
    assert f"flight record  {config.flight_folder} (ids and lengths)" in config.describe()
    config = resolve(replace(options, flight_folder="here", record_prompts=True))
    assert config.flight_folder == os.path.abspath("here")
    assert "here (with token ids)" in config.describe()
    config = resolve(replace(options, flight_folder=""))
    assert config.flight_folder == ""
    assert "flight record" not in config.describe()
