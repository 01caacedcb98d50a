"""The campaign: for each checkpoint its engines offline, then as servers, one in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench import machine
from cierzo.bench.campaign import loop
from cierzo.bench.campaign.loop import Block, Campaign
from cierzo.bench.campaign.store import Store
from cierzo.bench.peers import agreement
from cierzo.bench.peers.cells import AGREEMENT, LOAD, MEMORY, SERVED_LOAD, SERVED_MEMORY, Cell, Subject
from cierzo.bench.peers.engine import Checkpoint, Engine, Measured, Peer, Session
from cierzo.bench.peers.results import close_places, ratios

CLOSE_RATIO = 1.2  # below it, a ratio of ours to a peer's is measured in more rounds


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Checkpoints, engines and cells to measure. close_rounds: rounds where a ratio is close, at least `rounds`."""

    checkpoints: list[Checkpoint]
    engines: list[Engine]
    cells: list[Cell]
    rounds: int
    close_rounds: int
    folder: Path


class Peers(Campaign[Cell, Subject]):
    """A plan, and the projects that its engines come from."""

    def __init__(self, plan: Plan, peers: Mapping[str, Peer]) -> None:
        self._plan, self._peers = plan, peers
        self._checkpoints = {checkpoint.name: checkpoint for checkpoint in plan.checkpoints}
        self._engines = {engine.name: engine for engine in plan.engines}

    @property
    def blocks(self) -> Sequence[Block[Cell, Subject]]:
        """Cells without a server, and those with one, of each checkpoint."""
        return [
            Block(
                f"{checkpoint} {'served' if is_served else 'offline'}",
                [cell for cell in self._plan.cells if (cell.kind == "served") == is_served],
                [Subject(checkpoint, name) for name in self._engines],
            )
            for checkpoint in self._checkpoints
            for is_served in (False, True)
        ]

    def wanted(self, number: int, store: Store) -> Callable[[Cell, Subject], bool]:
        """Agreement once; all else in every round, and in the further ones what is close."""
        if number < self._plan.rounds:
            return lambda cell, subject: number == 0 or cell != AGREEMENT
        cells = [cell for cell in self._plan.cells if cell != AGREEMENT]
        found = ratios(store, list(self._checkpoints), self._plan.engines, cells)
        close = close_places(found, self._plan.engines, CLOSE_RATIO)
        return lambda cell, subject: (cell, subject) in close

    def ceilings(self) -> Any | None:
        """Measured now: a shared host's bandwidth drifts."""
        return msgspec.to_builtins(machine.measure_apart())

    def open(self, block: Block[Cell, Subject], subject: Subject) -> loop.Session[Cell] | None:
        """Convert the checkpoint if need be, and load it. Raises EngineFailed."""
        engine, checkpoint = self._engines[subject.engine], self._checkpoints[subject.checkpoint]
        peer, folder = self._peers[engine.peer], self._plan.folder
        if block.cells[0].kind != "served":
            if AGREEMENT in block.cells:  # before an engine is loaded: in float32 a checkpoint takes twice its size
                with contextlib.suppress(Exception):  # the cell that needs it will say so
                    agreement.reference(checkpoint, AGREEMENT, folder)
            return _Loaded(peer.offline(engine, checkpoint, folder), checkpoint, folder, LOAD, MEMORY)
        server = peer.server(engine, checkpoint, folder)
        if server is None:
            return None
        return _Loaded(server, checkpoint, folder, SERVED_LOAD, SERVED_MEMORY)

    def told(self, cell: Cell, result: Any) -> str:
        """The value in the cell's unit."""
        return f"{result['value']:.4g} {cell.unit}"


class _Loaded(loop.Session[Cell]):
    """An engine that is loaded, and the cells that its time to load and its memory belong to."""

    def __init__(self, session: Session, checkpoint: Checkpoint, folder: Path, load: Cell, memory: Cell) -> None:
        self._session, self._checkpoint, self._folder = session, checkpoint, folder
        self._load, self._memory = load, memory

    def measure(self, cell: Cell, number: int) -> Any:
        """Raises EngineFailed."""
        if cell != AGREEMENT:
            return self._told(self._session.measure(cell, _seed(number, cell)))
        table = agreement.reference(self._checkpoint, AGREEMENT, self._folder)
        forced = agreement.sequences(AGREEMENT, self._checkpoint.vocab_size)
        found = self._session.top_logprobs(forced, agreement.COUNT)
        return self._told(agreement.compare(found, table))

    def by_products(self) -> Mapping[Cell, Any]:
        """The time to load of an engine that stays loaded, and memory."""
        values = {self._load: self._session.load_s or 0.0, self._memory: self._session.peak_memory_gb()}
        return {cell: self._told(Measured(value, None)) for cell, value in values.items() if value > 0}

    def close(self) -> None:
        """End the engine's processes."""
        self._session.close()

    def _told(self, measured: Measured) -> Any:
        command = measured.command or self._session.command
        return msgspec.to_builtins(msgspec.structs.replace(measured, command=command))


def _seed(number: int, cell: Cell) -> int:
    """Prompts of their own for every round and cell, the same for all engines."""
    sizes = (cell.batch, cell.prompt_tokens, cell.shared_tokens)
    return 1_000_003 * (number + 1) + sum(size * 31**power for power, size in enumerate(sizes))
