"""Cost records: every request has one, however it ends, and no disk and no kill takes more than it must."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from streams import all_of, final_of, until

from cierzo.cli import main
from cierzo.engine.errors import CierzoError, ConfigError
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.observe import usage_file, usage_record
from cierzo.engine.frontend.observe.usage_file import KEPT_FILES, MAX_WAITING, UsageFile, aged
from cierzo.engine.frontend.observe.usage_record import UsageRecord
from cierzo.engine.frontend.observe.usage_sum import Reader, files_of
from cierzo.engine.messages import Finish, Generate, SamplingParams, StepOutput, TokenDelta

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def read(path):
    """The records of a file and of those that were rotated out of it; all lines are records."""
    bad = []
    reader = Reader(lambda *told: bad.append(told))
    records = [record for name in files_of([str(path)]) for record in reader.records(name)]
    assert not bad
    return records


def record(number, tenant="default", **given):
    return UsageRecord(
        time=BEGAN + timedelta(hours=number), tenant=tenant, end=["stop"], caller_id=str(number), **given
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "usage.jsonl"


# --- of requests -------------------------------------------------------------------------------------------


def test_each_end_has_its_record(serving, cores, clock, path, run):
    async def body():
        async with serving(cores=cores, clock=clock, usage_file=str(path), max_samples=2) as house:
            async with await Client.connect(house.address) as client:
                await all_of(client.generate(token_ids=[1, 2], max_tokens=3, ignore_eos=True))
                await final_of(client.generate(token_ids=[1], max_tokens=2, n=2, ignore_eos=True))
                stuck = client.generate(token_ids=[1, 2, 3], max_tokens=4000, ignore_eos=True)
                await stuck.accepted()
                stuck.cancel()
                await final_of(stuck)
                with pytest.raises(CierzoError):
                    await final_of(client.generate(token_ids=[1, 999_999]))
                with pytest.raises(CierzoError):
                    await final_of(client.generate(token_ids=[1], output_token_ids=[1], n=2))
            assert house.frontend.counters.refused == 2
        length, two, cancelled, *refused = read(path)
        assert (length.end, length.prompt_tokens, length.output_tokens) == (["length"], 2, 3)
        assert (length.tenant, length.cached_tokens) == ("default", 2)  # of the 3 that the fake core tells
        assert len(length.request_id) == 32
        assert (two.end, two.prompt_tokens, two.output_tokens) == (["length"] * 2, 1, 4)
        assert (cancelled.end, cancelled.prompt_tokens) == (["cancelled"], 3)
        assert [(each.end, each.output_tokens) for each in refused] == [(["invalid_request"], 0)] * 2
        assert path.read_bytes().endswith(b"\n")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    run(body())


def test_what_a_request_says_of_itself_is_repeated(serving, peering, cores, path, run):
    async def body():
        async with serving(cores=cores, usage_file=str(path)) as house, peering(house) as peer:
            for stream, sampling in ((1, SamplingParams(max_tokens=1)), (2, SamplingParams(n=100))):
                peer.say(Generate(stream=stream, token_ids=[1], sampling=sampling, caller_id="c" * 200))
            await peer.hear_so_far()
            peer.frame(msgspec.msgpack.encode({"type": "generate", "stream": 3, "text": 7}))
            await peer.hear_so_far()
        bounded = [each for each in read(path) if each.end != ["length"]]
        assert {each.caller_id for each in bounded} <= {"c" * 128, ""}
        assert bounded[-1].end == ["invalid_request"], "one that cannot even be read has its line"

    run(body())


def test_an_error_that_ends_a_request_is_its_end(serving, cores, path, run):
    async def body():
        async with (
            serving(cores=cores, usage_file=str(path)) as house,
            await Client.connect(house.address) as client,
        ):
            generation = client.generate(token_ids=[1], max_tokens=4000, ignore_eos=True)
            await generation.accepted()
            house.frontend.interrupt()
            with pytest.raises(CierzoError):
                await final_of(generation)
        (interrupted,) = read(path)
        assert interrupted.end == ["interrupted"]

    run(body())


@pytest.mark.parametrize("core", ["answers late", "dies"])
def test_the_cost_of_a_run_that_the_core_still_owes_is_waited_for(serving, peering, cores, path, run, core):
    """A core in a long step hears of a cancel when the client has long had its answer."""

    async def body():
        async with serving(cores=cores, usage_file=str(path)) as house, peering(house) as peer:
            cores.free = False
            sampling = SamplingParams(max_tokens=50, ignore_eos=True)
            peer.say(Generate(stream=1, token_ids=[1, 2, 3], sampling=sampling))
            await cores.until(lambda: cores.now.submits)
            (stream,) = house.frontend.streams
            run_id = stream.run_id
            cores.now.deaf = True
            house.frontend._cancel(stream)
            await until(lambda: stream.ended_at_s is not None)
            await asyncio.sleep(0)
            assert not path.read_bytes(), "what it cost is not known yet"
            if core == "dies":
                cores.now.kill()
            else:
                finish = Finish("cancelled", "", None, 3, 7, 0, 0, 0.1, 0.2, 0.3, 9, 0, 7, 2.5)
                cores.now.say(StepOutput(deltas=[TokenDelta(run_id, 0, [], None, finish)]))
            await until(path.read_bytes)
            cores.now.deaf = False
        (told,) = read(path)
        assert told.end == ["cancelled"]
        assert (told.computed_tokens, told.steps, told.kv_block_s) == ((9, 7, 2.5) if core != "dies" else (0, 0, 0))

    run(body())


def test_a_wall_clock_that_jumps_changes_no_figure(serving, cores, clock, path, run, monkeypatch):
    class Jumping(datetime):
        days = 0

        @classmethod
        def now(cls, tz=None):
            cls.days -= 300
            return BEGAN + timedelta(days=cls.days)

    monkeypatch.setattr(usage_record, "datetime", Jumping)

    async def body():
        serves = serving(cores=cores, clock=clock, usage_file=str(path))
        async with serves as house, await Client.connect(house.address) as client:
            for _ in range(2):
                cores.free = False
                generation = client.generate(token_ids=[1], max_tokens=2, ignore_eos=True)
                await generation.accepted()
                await cores.until(lambda: cores.now.running)
                clock.now += 5.0
                cores.go_on()
                await final_of(generation)
        first, second = read(path)
        assert first.time > second.time
        for each in (first, second):
            assert each.total_s == pytest.approx(5.0)
            assert each.queue_s + each.prefill_s + each.decode_s == pytest.approx(each.total_s)

    run(body())


# --- the file ----------------------------------------------------------------------------------------------


def test_it_is_rotated_and_bounded(path, run):
    async def body():
        file = UsageFile(str(path), 4096)
        for number in range(200):
            file.add(record(number))
            if number % 7 == 0:
                await until(lambda: file._timer is None)
        await until(lambda: file._timer is None)
        file.close()
        names = {path.name, *(aged(path.name, age) for age in range(1, KEPT_FILES + 1))}
        assert {each.name for each in path.parent.iterdir()} == names
        assert all(each.stat().st_size <= 4096 for each in path.parent.iterdir())
        numbers = [int(each.caller_id) for each in read(path)]
        assert numbers == [*range(200 - len(numbers), 200)]
        assert len(numbers) > 30
        assert (file.num_written, file.num_lost) == (200, 0)

    run(body())


def test_a_turn_of_the_loop_writes_once(path, run):
    async def body():
        written = []
        file = UsageFile(str(path), 1 << 20, lambda fd, data: written.append(data) or os.write(fd, data))
        for number in range(100):
            file.add(record(number))
        assert not written
        await until(lambda: file._timer is None)
        assert len(written) == 1
        file.close()
        assert len(read(path)) == 100

    run(body())


def test_a_crash_in_the_middle_of_a_rotation_loses_nothing(path, run):
    async def body():
        before = UsageFile(str(path), 4096)
        before.add(record(1))
        await until(lambda: before._timer is None)
        before.close()
        path.rename(aged(str(path), 0))  # and there it died
        file = UsageFile(str(path), 4096)
        for number in range(2, 30):
            file.add(record(number))
        await until(lambda: file._timer is None)
        file.close()
        assert [int(each.caller_id) for each in read(path)] == [*range(1, 30)]

    run(body())


def test_a_full_disk_ends_nothing_and_is_told_once(path, run, caplog, monkeypatch):
    monkeypatch.setattr(usage_file, "RETRY_S", 0.001)
    full = [True]

    def write(fd, data):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(fd, data[: len(data) // 2 + 1])  # and it takes half of what it is given

    async def body():
        file = UsageFile(str(path), 1 << 30, write)
        for number in range(MAX_WAITING + 5):
            file.add(record(number))
        assert file.num_lost == 5
        await until(lambda: "cannot be written" in caplog.text)
        file.add(record(MAX_WAITING))
        await asyncio.sleep(0.02)
        assert caplog.text.count("cannot be written") == 1
        assert file.why_not() == "cost records cannot be written: No space left on device"
        full[0] = False
        await until(lambda: file._timer is None)
        assert file.why_not() is None
        file.close()
        assert [int(each.caller_id) for each in read(path)] == [*range(MAX_WAITING), MAX_WAITING]
        assert (file.num_written, file.num_lost) == (MAX_WAITING + 1, 5)

    run(body())


def test_what_cannot_be_written_at_the_end_is_counted(path, run):
    def write(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def body():
        file = UsageFile(str(path), 1 << 20, write)
        file.add(record(1))
        file.close()
        assert (file.num_written, file.num_lost) == (0, 1)

    run(body())


@pytest.mark.parametrize("kind", ["folder", "fifo", "missing folder"])
def test_what_can_be_no_usage_file_is_refused_at_the_start(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = path / "usage.jsonl"
    with pytest.raises(ConfigError, match="usage_file") as caught:
        UsageFile(str(path), 4096)
    assert caught.value.field == "usage_file"


WRITER = """
import asyncio, sys
from datetime import UTC, datetime
from cierzo.engine.frontend.observe.usage_file import UsageFile
from cierzo.engine.frontend.observe.usage_record import UsageRecord

async def write():
    file, number = UsageFile(sys.argv[1], 1 << 30), int(sys.argv[2])
    while True:
        for number in range(number, number + 50):
            file.add(UsageRecord(time=datetime.now(UTC), tenant="default", end=["stop"], caller_id=str(number)))
        number += 1
        await asyncio.sleep(0)

asyncio.run(write())
"""


def test_a_killed_process_leaves_all_lines_but_its_last(path):
    first = 0
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(first)])
        began = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size < began + 200_000:
            assert writer.poll() is None
            time.sleep(0.001)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        if path.read_bytes().endswith(b"\n"):  # often the kernel has taken half a line by itself
            with open(path, "ab") as file:
                file.write(b'{"time":"2026-01-01T00:0')
        reader = Reader(lambda *told: None)
        numbers = [int(each.caller_id) for each in reader.records(str(path))]
        assert numbers == [*range(numbers[-1] + 1)], "each line but the cut ones is there"
        assert reader.num_bad == 0
        first = numbers[-1] + 1
    assert reader.num_cut == 3


# --- cierzo usage ------------------------------------------------------------------------------------------


@pytest.fixture
def written(path):
    """A file and an older one, with records of two tenants at hours 1 to 4."""

    def lines(*records):
        return b"".join(msgspec.json.encode(each) + b"\n" for each in records)

    older = [record(1, "a", output_tokens=5, kv_block_s=0.5), record(2, "b", output_tokens=7)]
    newer = [record(3, "a", prompt_tokens=2, output_tokens=1), record(4, "a", output_tokens=1)]
    path.with_name(aged(path.name, 1)).write_bytes(lines(*older))
    path.write_bytes(lines(*newer))
    return path


def test_usage_sums_by_tenant_rotated_files_included(written, capsys):
    assert main(["usage", str(written), aged(str(written), 1), "--json"]) == 0
    told = msgspec.json.decode(capsys.readouterr().out)
    a, b = told["tenants"]["a"], told["tenants"]["b"]
    assert (a["requests"], a["prompt_tokens"], a["output_tokens"], a["kv_block_s"]) == (3, 2, 7, 0.5)
    assert (b["requests"], b["output_tokens"], b["ends"]) == (1, 7, {"stop": 1})
    assert (told["bad_lines"], told["cut_lines"]) == (0, 0)


def test_usage_as_a_table_has_a_line_for_all(written, capsys):
    assert main(["usage", str(written)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["tenant", "requests", "prompt_tokens"]
    assert [row.split()[:5] for row in rows] == [
        ["a", "3", "2", "0", "7"],
        ["b", "1", "0", "0", "7"],
        ["all", "4", "2", "0", "14"],
    ]


@pytest.mark.parametrize(
    ("flags", "requests"),
    [
        (["--since", "2026-01-01T03:00:00Z"], 2),
        (["--until", "2026-01-01T03:00:00"], 1),
        (["--since", "2026-01-01T03:00:00+02:00", "--until", "2026-01-01T04:00:00"], 2),
        (["--until", "2026-01-01"], 0),
    ],
)
def test_usage_of_a_stretch_of_time(written, capsys, flags, requests):
    assert main(["usage", str(written), "--json", *flags]) == 0
    tenants = msgspec.json.decode(capsys.readouterr().out)["tenants"]
    assert tenants.get("a", {"requests": 0})["requests"] == requests


def test_usage_names_bad_lines_and_sums_the_others(written, capsys):
    with open(written, "ab") as file:
        file.write(b"rubbish\n" + b"x" * 300_000 + b"\n" + b'{"tenant":"a"}\n\xff\n')
        file.write(msgspec.json.encode(record(5, "a", output_tokens=1)) + b"\n")
    assert main(["usage", str(written), "--json"]) == 1
    captured = capsys.readouterr()
    told = msgspec.json.decode(captured.out)
    assert (told["tenants"]["a"]["requests"], told["bad_lines"]) == (4, 4)
    assert [f"line {number} is no record" in captured.err for number in range(2, 8)] == [False, *[True] * 4, False]


def test_usage_tolerates_a_line_that_was_cut(written, capsys):
    with open(written, "ab") as file:
        file.write(b'{"time":"2026-01-01T0')
    assert main(["usage", str(written), "--json"]) == 0
    captured = capsys.readouterr()
    assert "line 3 is no record: was cut short" in captured.err
    assert msgspec.json.decode(captured.out)["cut_lines"] == 1


@pytest.mark.parametrize("arguments", [["nowhere.jsonl"], ["FILE", "--since", "yesterday"]])
def test_usage_of_what_was_given_wrongly(written, capsys, arguments):
    arguments = [str(written) if word == "FILE" else word for word in arguments]
    assert main(["usage", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
