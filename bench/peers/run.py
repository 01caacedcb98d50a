"""The measurement: rounds outside, engines inside, one engine in memory at a time, each figure on disk at once."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec

from cierzo.bench.peers import agreement, ceilings
from cierzo.bench.peers.cells import AGREEMENT, LOAD, MEMORY, SERVED_LOAD, SERVED_MEMORY, Cell
from cierzo.bench.peers.engine import Checkpoint, Engine, Measured, Offline, Peer, Session
from cierzo.bench.peers.results import close_pairs, ratios
from cierzo.bench.peers.samples import Sample, Samples
from cierzo.bench.peers.served import RunningServer

CLOSE_RATIO = 1.2  # below it, a ratio of ours to a peer's is measured in more rounds
MACHINE, REFERENCE = "machine", "reference"
CEILINGS = Cell(name="ceilings", kind="ceilings", unit="GB/s")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. `close_rounds` is the number of rounds for close ratios, at least `rounds`."""

    checkpoints: list[Checkpoint]
    engines: list[Engine]
    cells: list[Cell]
    rounds: int
    close_rounds: int
    folder: Path


class Run:
    """One plan over one file of samples; what is in there already is not measured again."""

    def __init__(
        self,
        plan: Plan,
        peers: Mapping[str, Peer],
        samples: Samples,
        commit: str,
        say: Callable[[str], None] = print,
    ) -> None:
        self.plan = plan
        self._peers = peers
        self._samples = samples
        self._commit = commit
        self._say = say
        self._start = time.monotonic()

    def measure(self) -> None:
        """All rounds, then further ones for what is close."""
        plan = self.plan
        names = [[one.name for one in some] for some in (plan.checkpoints, plan.cells, plan.engines)]
        everything = set(itertools.product(*names))
        if AGREEMENT in plan.cells:
            self._references()
        for number in range(plan.rounds):
            self._round(number, everything)
        for number in range(plan.rounds, plan.close_rounds):
            found = ratios(self._samples, plan.checkpoints, plan.engines, self._of_rounds())
            close = close_pairs(found, plan.engines, CLOSE_RATIO)
            if close:
                self._round(number, close)

    def _references(self) -> None:
        """Before any engine is loaded: in float32 a checkpoint takes twice its size."""
        for checkpoint in self.plan.checkpoints:
            started = _now()
            try:
                agreement.reference(checkpoint, AGREEMENT, self.plan.folder)
            except Exception as error:  # the cells that need it will say so again
                self.record(checkpoint.name, AGREEMENT, REFERENCE, 0, started, error=str(error))

    def _of_rounds(self) -> list[Cell]:
        return [cell for cell in self.plan.cells if cell != AGREEMENT]

    def _round(self, number: int, wanted: set[tuple[str, ...]]) -> None:
        """`wanted`: (checkpoint, cell, engine). No engine always goes first."""
        self._ceilings(number)
        for checkpoint in self.plan.checkpoints:
            for engine in self.plan.engines if number % 2 == 0 else reversed(self.plan.engines):
                pending = [
                    cell
                    for cell in self.plan.cells
                    if (checkpoint.name, cell.name, engine.name) in wanted
                    and not (cell == AGREEMENT and number > 0)
                    and not self._samples.has(checkpoint.name, cell, engine.name, number)
                ]
                one = _One(self, checkpoint, engine, number)
                served = [cell for cell in pending if cell.kind == "served"]
                offline = [cell for cell in pending if cell.kind != "served"]
                self._cells(one, offline, functools.partial(self._offline, one), LOAD, MEMORY)
                self._cells(one, served, functools.partial(self._served, one), SERVED_LOAD, SERVED_MEMORY)

    def _ceilings(self, number: int) -> None:
        if self._samples.has("", CEILINGS, MACHINE, number):
            return
        started = _now()
        try:
            found = ceilings.measure(self.plan.folder)
            measured = Measured(found.read.rate, found)
        except Exception as error:  # whatever it is, the other cells go on
            self.record("", CEILINGS, MACHINE, number, started, error=str(error))
        else:
            self.record("", CEILINGS, MACHINE, number, started, measured)

    def _offline(self, one: _One) -> Offline:
        return self._peers[one.engine.peer].offline(one.engine, one.checkpoint, self.plan.folder)

    def _served(self, one: _One) -> RunningServer | None:
        server = self._peers[one.engine.peer].server(one.engine, one.checkpoint, self.plan.folder)
        log = self.plan.folder / "logs" / f"{one.engine.name}-{one.checkpoint.name}-server.log"
        return None if server is None else RunningServer(server, log)

    def _cells(
        self, one: _One, pending: list[Cell], start: Callable[[], Session | None], load: Cell, memory: Cell
    ) -> None:
        """A session for the cells; after a failure a new one for those that are left."""
        while pending:
            started = _now()
            try:
                session = start()
            except Exception as error:  # whatever it is, the other engines go on
                for cell in pending:
                    one.failed(cell, started, error)
                return
            if session is None:  # an engine without a server
                return
            try:
                if session.load_s is not None:
                    one.done(load, started, Measured(session.load_s, None), session.command)
                failed = False
                while pending and not failed:
                    failed = not self._cell(one, pending.pop(0), session)
                if (peak_gb := session.peak_memory_gb()) > 0:
                    one.done(memory, started, Measured(peak_gb, None), session.command)
            finally:
                session.close()

    def _cell(self, one: _One, cell: Cell, session: Session) -> bool:
        """Measure and record one cell; False if that failed."""
        started = _now()
        try:
            if cell == AGREEMENT:
                measured = self._agreement(one, cast(Offline, session))
            else:
                measured = session.measure(cell, _seed(one.round, cell))
        except Exception as error:  # whatever it is, the other cells go on
            one.failed(cell, started, error)
            return False
        one.done(cell, started, measured, session.command)
        return True

    def _agreement(self, one: _One, session: Offline) -> Measured:
        table = agreement.reference(one.checkpoint, AGREEMENT, self.plan.folder)
        forced = agreement.sequences(AGREEMENT, one.checkpoint.vocab_size)
        return agreement.compare(session.top_logprobs(forced, agreement.COUNT), table)

    def record(
        self,
        checkpoint: str,
        cell: Cell,
        engine: str,
        number: int,
        started: str,
        measured: Measured | None = None,
        command: str = "",
        error: str = "",
    ) -> None:
        """One sample to disk, and a line to the terminal."""
        figure = f"FAILED: {error}" if measured is None else f"{measured.value:.4g} {cell.unit}"
        where = f"{checkpoint} {engine} {cell.name}".strip()
        self._say(f"{time.monotonic() - self._start:6.0f} s  round {number + 1}  {where}: {figure}")
        self._samples.add(
            Sample(
                checkpoint=checkpoint,
                cell=cell,
                engine=engine,
                round=number,
                commit=self._commit,
                started=started,
                command=(measured.command if measured else "") or command,
                value=None if measured is None else measured.value,
                raw=None if measured is None else msgspec.to_builtins(measured.raw),
                error=error,
            )
        )


class _One:
    """An engine with a checkpoint in a round: what its samples have in common."""

    def __init__(self, run: Run, checkpoint: Checkpoint, engine: Engine, number: int) -> None:
        self.run, self.checkpoint, self.engine, self.round = run, checkpoint, engine, number

    def done(self, cell: Cell, started: str, measured: Measured, command: str) -> None:
        self.run.record(self.checkpoint.name, cell, self.engine.name, self.round, started, measured, command)

    def failed(self, cell: Cell, started: str, error: BaseException) -> None:
        text = str(error) or type(error).__name__
        self.run.record(self.checkpoint.name, cell, self.engine.name, self.round, started, error=text)


def _seed(number: int, cell: Cell) -> int:
    """Prompts of their own for every round and cell, the same for all engines."""
    sizes: Sequence[Any] = (cell.batch, cell.prompt_tokens, cell.shared_tokens)
    return 1_000_003 * (number + 1) + sum(size * 31**power for power, size in enumerate(sizes))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
