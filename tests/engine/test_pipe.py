"""The core process: its pipe never sticks and loses nothing, and it ends when the front end does."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cierzo.cache.config import CacheConfig
from cierzo.engine.config import EngineConfig
from cierzo.engine.messages import (
    Abort,
    CoreCommand,
    CoreError,
    CoreEvent,
    Ready,
    SamplingParams,
    Shutdown,
    StepOutput,
    Submit,
    TokenDelta,
)
from cierzo.engine.worker.core import EngineCore, make_runner
from cierzo.engine.worker.experts import ExpertCounter
from cierzo.engine.worker.fake import fake_config
from cierzo.engine.worker.pipe import MAX_FRAMES, MAX_READ_BYTES, RECEIVE_BYTES, CorePipe, PipeClosed
from cierzo.engine.worker.process import MAX_COMMANDS, STATS_INTERVAL_S, CoreLoop
from cierzo.scheduler.config import SchedulerConfig

CONFIG = fake_config(
    SchedulerConfig(budget_tokens=32, max_running=8, max_model_len=512, max_chunk_tokens=32),
    CacheConfig(block_tokens=8, num_blocks=512, hash_key="00" * 16),
)


class Peer:
    """The front end's end of a socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        self.socket = connection
        self._received = b""

    def send(self, *messages: msgspec.Struct) -> None:
        for message in messages:
            body = msgspec.msgpack.encode(message)
            self.socket.sendall(len(body).to_bytes(4, "big") + body)

    def receive(self) -> CoreEvent | None:
        """The next event, None at the end of the stream."""
        while len(self._received) < 4 or len(self._received) < 4 + int.from_bytes(self._received[:4], "big"):
            more = self.socket.recv(65_536)
            if not more:
                assert not self._received
                return None
            self._received += more
        end = 4 + int.from_bytes(self._received[:4], "big")
        body, self._received = self._received[4:end], self._received[end:]
        return msgspec.msgpack.decode(body, type=CoreEvent)

    def deltas(self, num_finished: int) -> list[TokenDelta]:
        """All deltas up to the one that finishes the `num_finished`th sequence."""
        found: list[TokenDelta] = []
        while sum(delta.finish is not None for delta in found) < num_finished:
            event = self.receive()
            assert isinstance(event, StepOutput), event
            found += event.deltas
        return found


@pytest.fixture
def ends() -> Iterator[tuple[CorePipe, Peer]]:
    """A pipe with a small socket buffer, and its peer."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pipe, peer = CorePipe(ours), Peer(theirs)
    yield pipe, peer
    pipe.close()
    theirs.close()


def submit(request_id: int, max_tokens: int = 5, n: int = 1) -> Submit:
    params = SamplingParams(max_tokens=max_tokens, seed=0, n=n, ignore_eos=True)
    return Submit(request_id=request_id, prompt_token_ids=[1, 2, request_id], sampling=params)


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


# --- pipe --------------------------------------------------------------------------------------------------


def test_frames_are_cut_however_they_arrive(ends: tuple[CorePipe, Peer]) -> None:
    pipe, peer = ends
    commands: list[CoreCommand] = [submit(1), Abort(request_id=1), Shutdown()]
    stream = b""
    for command in commands:
        body = msgspec.msgpack.encode(command)
        stream += len(body).to_bytes(4, "big") + body
    got: list[CoreCommand] = []
    for start in range(0, len(stream), 7):
        peer.socket.sendall(stream[start : start + 7])
        got += pipe.receive()
    assert got == commands
    peer.send(*commands)
    peer.socket.close()
    assert [*pipe.receive()] == commands
    with pytest.raises(PipeClosed):
        got += pipe.receive()


def test_the_last_commands_before_the_end_are_delivered(ends: tuple[CorePipe, Peer]) -> None:
    pipe, peer = ends
    peer.send(Abort(request_id=1), Abort(request_id=2))
    peer.socket.close()
    assert pipe.receive_frame() is not None
    assert pipe.receive_frame() is not None
    with pytest.raises(PipeClosed):
        pipe.receive_frame()


# --- loop --------------------------------------------------------------------------------------------------


def test_a_slow_front_end_holds_nothing_up_and_misses_nothing(ends: tuple[CorePipe, Peer]) -> None:
    pipe, peer = ends
    core = EngineCore(CONFIG)
    loop = CoreLoop(core, pipe)
    peer.send(*(submit(request_id, max_tokens=400) for request_id in range(8)))
    assert loop.turn()
    while core.has_work():
        assert loop.turn()
    assert pipe.backlog_bytes > 0  # 3200 tokens are more than the socket holds
    core.check()
    found: list[TokenDelta] = []

    def read() -> None:
        try:
            found.extend(peer.deltas(8))
        finally:
            peer.send(Shutdown())

    reader = threading.Thread(target=read)
    reader.start()
    loop.run()
    reader.join()
    for request_id in range(8):
        tokens = [t for delta in found if delta.request_id == request_id for t in delta.token_ids]
        alone = EngineCore(CONFIG)
        alone.submit(submit(request_id, max_tokens=400))
        expected: list[int] = []
        while alone.has_work():
            expected += [t for delta in alone.step_plain() for t in delta.token_ids]
        assert tokens == expected


def test_a_flood_of_commands_delays_no_step_by_more_than_a_turn(ends: tuple[CorePipe, Peer]) -> None:
    pipe, peer = ends
    core, taken = EngineCore(CONFIG), []
    core.abort = lambda abort: taken.append(abort.request_id)  # type: ignore[method-assign]
    loop = CoreLoop(core, pipe)
    peer.send(submit(1, max_tokens=500))
    loop.turn()
    body = msgspec.msgpack.encode(Abort(request_id=7))
    flood = (len(body).to_bytes(4, "big") + body) * 100_000
    sender = threading.Thread(target=peer.socket.sendall, args=(flood,))
    sender.start()
    while core.has_work():
        before, steps = len(taken), core.stats().steps
        loop.turn()
        assert len(taken) - before <= MAX_COMMANDS
        assert core.stats().steps == steps + 1
        assert len(pipe._incoming) <= MAX_READ_BYTES + RECEIVE_BYTES
    while len(taken) < 100_000:  # an idle core waits for none of those that are here
        loop.turn()
    sender.join()
    assert set(taken) == {7}


def test_commands_beyond_a_turn_wait_for_the_next_and_the_end_comes_after_them(ends: tuple[CorePipe, Peer]) -> None:
    pipe, peer = ends
    bodies = [msgspec.msgpack.encode(Abort(request_id=number)) for number in range(MAX_FRAMES + 7)]
    peer.socket.sendall(b"".join(len(body).to_bytes(4, "big") + body for body in bodies))
    assert [abort.request_id for abort in pipe.receive(5)] == [0, 1, 2, 3, 4]
    assert len(list(pipe.receive(MAX_FRAMES - 5))) == MAX_FRAMES - 5
    began_s = time.monotonic()
    pipe.wait(60.0)  # seven are here, in bytes that are not cut yet
    assert time.monotonic() - began_s < 30
    peer.socket.close()
    assert [abort.request_id for abort in pipe.receive()] == list(range(MAX_FRAMES, MAX_FRAMES + 7))
    with pytest.raises(PipeClosed):
        [*pipe.receive()]


def test_figures_are_sent_when_they_change_but_not_more_often_than_due(ends: tuple[CorePipe, Peer]) -> None:
    pipe, peer = ends
    clock = Clock()
    loop = CoreLoop(EngineCore(CONFIG), pipe, clock)
    peer.send(submit(1, max_tokens=3), submit(2, max_tokens=7))
    events = []
    for _ in range(4):
        loop.turn()
        events.append(peer.receive())
    assert [event.stats is not None for event in events] == [True, False, False, False]
    clock.now += STATS_INTERVAL_S
    loop.turn()
    due = peer.receive()
    assert (due.stats.running, due.stats.finished, due.stats.output_tokens) == (1, 1, 8)


def test_the_last_answer_comes_with_figures_that_know_it(ends: tuple[CorePipe, Peer]) -> None:
    pipe, peer = ends
    loop = CoreLoop(EngineCore(CONFIG), pipe, Clock())
    peer.send(submit(1, max_tokens=3), submit(2, max_tokens=3))
    for _ in range(3):
        loop.turn()
    first, second, last = (peer.receive() for _ in range(3))
    assert first.stats.running == 2
    assert second.stats is None
    assert [delta.finish is not None for delta in last.deltas] == [True, True]
    assert (last.stats.running, last.stats.finished, last.stats.output_tokens) == (0, 2, 6)
    peer.send(submit(3, max_tokens=400))
    loop.turn()
    peer.receive()
    peer.send(Abort(request_id=3))
    loop.turn()
    ended = peer.receive()
    assert (ended.deltas[-1].finish.reason, ended.stats.running) == ("cancelled", 0)


def test_an_abort_is_answered_although_no_step_runs(ends: tuple[CorePipe, Peer]) -> None:
    pipe, peer = ends
    loop = CoreLoop(EngineCore(CONFIG), pipe)
    peer.send(submit(1, max_tokens=400, n=2))
    loop.turn()
    peer.send(Abort(request_id=1))
    loop.turn()
    deltas = peer.deltas(2)
    assert [delta.finish.reason for delta in deltas if delta.finish] == ["cancelled", "cancelled"]


def test_what_the_experts_counted_is_in_the_stats_from_the_start(ends: tuple[CorePipe, Peer]) -> None:
    pipe, peer = ends
    runner = make_runner(CONFIG)
    runner.experts = counter = ExpertCounter([2], 4, 2)
    clock = Clock()
    loop = CoreLoop(EngineCore(CONFIG, runner), pipe, clock)
    loop.turn()  # with nothing to compute
    assert peer.receive().stats.experts == counter.statistics()
    counter.add(np.array([[[0, 3], [0, 1]]]), "decode")
    peer.send(submit(1, max_tokens=3))
    loop.turn()
    assert peer.receive().stats is None
    clock.now += STATS_INTERVAL_S
    loop.turn()
    assert peer.receive().stats.experts.expert_tokens == [[2, 1, 0, 1]]


def test_the_loop_ends_on_shutdown_and_on_a_closed_socket(ends: tuple[CorePipe, Peer]) -> None:
    pipe, peer = ends
    core = EngineCore(CONFIG)
    peer.send(submit(1, max_tokens=400), Shutdown())
    CoreLoop(core, pipe).run()
    assert core.has_work()
    peer.socket.close()
    CoreLoop(core, pipe).run()


# --- process -----------------------------------------------------------------------------------------------


class Process:
    """A core process and the socket to it."""

    def __init__(self, folder: Path) -> None:
        path = folder / "core.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(60)
            command = [sys.executable, "-m", "cierzo.engine.worker", "--socket", str(path)]
            self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
            self.peer = Peer(listener.accept()[0])

    def exit_status(self) -> int:
        self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture
def core_process(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path)
    yield process
    process.peer.socket.close()
    process.process.kill()
    process.process.communicate()


def test_a_core_process_serves_ignores_ctrl_c_and_ends_with_its_front_end(core_process: Process) -> None:
    peer = core_process.peer
    peer.send(CONFIG, submit(1))  # the command may overtake the load
    ready = peer.receive()
    assert isinstance(ready, Ready)
    assert "fake" in ready.startup
    core_process.process.send_signal(signal.SIGINT)
    assert sum(len(delta.token_ids) for delta in peer.deltas(1)) == 5
    peer.socket.close()
    assert core_process.exit_status() == 0


def test_a_core_that_cannot_load_says_why(core_process: Process, tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, runner="model", checkpoint=str(tmp_path / "nowhere"))
    core_process.peer.send(config)
    event = core_process.peer.receive()
    assert isinstance(event, CoreError)
    assert event.code == "checkpoint_error"
    assert "nowhere" in event.message
    assert core_process.peer.receive() is None
    assert core_process.exit_status() == 1


def test_a_core_without_memory_says_so(core_process: Process) -> None:
    scheduler = msgspec.structs.replace(CONFIG.scheduler, budget_tokens=10**15)
    core_process.peer.send(msgspec.structs.replace(CONFIG, scheduler=scheduler))
    event = core_process.peer.receive()
    assert isinstance(event, CoreError)
    assert (event.code, event.message[:14]) == ("core_failed", "out of memory:")
    assert core_process.exit_status() == 1


def test_a_config_of_another_version_is_refused(core_process: Process) -> None:
    core_process.peer.send(SamplingParams())
    event = core_process.peer.receive()
    assert isinstance(event, CoreError)
    assert core_process.exit_status() == 1


def test_the_config_survives_the_wire() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(CONFIG), type=EngineConfig) == CONFIG
