"""The campaign: for each checkpoint its engines offline, then as servers, one in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from cierzo.bench.peers.results import OURS, ratios

CLOSE_RATIO = 1.2  # below it, a ratio of ours to a peer's is measured in more rounds


@dataclass(frozen=True, kw_only=True)
class Peers(Campaign[Cell, Subject]):
    """Checkpoints, engines and cells to measure. rounds: for all, after which only close ratios are measured.
    peers: the projects that the engines come from, by name."""

    checkpoints: Sequence[Checkpoint]
    engines: Sequence[Engine]
    cells: Sequence[Cell]
    rounds: int
    folder: Path
    peers: Mapping[str, Peer]

    @property
    def blocks(self) -> Sequence[Block[Cell, Subject]]:
        """Cells without a server, and those with one, of each checkpoint."""
        return [
            Block(
                f"{checkpoint.name} {'served' if is_served else 'offline'}",
                [cell for cell in self.cells if (cell.kind == "served") == is_served],
                [Subject(checkpoint.name, engine.name) for engine in self.engines],
            )
            for checkpoint in self.checkpoints
            for is_served in (False, True)
        ]

    def wanted(self, number: int, store: Store) -> Callable[[Cell, Subject], bool]:
        """Agreement once; all else in every round, and in the further ones what is close."""
        if number < self.rounds:
            return lambda cell, subject: number == 0 or cell != AGREEMENT
        peers = {engine.name for engine in self.engines if engine.peer != OURS}
        close = {
            (one.cell, subject)
            for one in ratios(store, self.checkpoints, self.engines, self.cells)
            if one.ours.engine not in peers and one.against.engine in peers and (one.ratio or 0.0) < CLOSE_RATIO
            for subject in (one.ours, one.against)
        }
        return lambda cell, subject: (cell, subject) in close

    def ceilings(self) -> Any | None:
        """Measured now: a shared host's bandwidth drifts."""
        return msgspec.to_builtins(machine.measure_apart())

    def open(self, block: Block[Cell, Subject], subject: Subject) -> loop.Session[Cell] | None:
        """Convert the checkpoint if need be, and load it. Raises EngineFailed."""
        (engine,) = (engine for engine in self.engines if engine.name == subject.engine)
        (checkpoint,) = (one for one in self.checkpoints if one.name == subject.checkpoint)
        peer, folder = self.peers[engine.peer], self.folder
        if block.cells[0].kind != "served":
            if AGREEMENT in block.cells:  # before an engine is loaded: in float32 a checkpoint takes twice its size
                with contextlib.suppress(Exception):  # the cell that needs it will say so
                    agreement.reference(checkpoint, AGREEMENT, folder)
            return _loaded(peer.offline(engine, checkpoint, folder), checkpoint, folder, (LOAD, MEMORY))
        server = peer.server(engine, checkpoint, folder)
        if server is None:
            return None
        return _loaded(server, checkpoint, folder, (SERVED_LOAD, SERVED_MEMORY))

    def told(self, cell: Cell, result: Any) -> str:
        """The value in the cell's unit."""
        return f"{result['value']:.4g} {cell.unit}"


def _loaded(
    session: Session, checkpoint: Checkpoint, folder: Path, by_product_cells: tuple[Cell, Cell]
) -> loop.Session[Cell]:
    """An engine that is loaded, and the cells of its time to load and its memory."""

    def told(measured: Measured) -> Any:
        return {**msgspec.to_builtins(measured), "command": session.command}

    def measure(cell: Cell, number: int) -> Any:
        if cell != AGREEMENT:
            return told(session.measure(cell, _seed(number, cell)))
        table = agreement.reference(checkpoint, AGREEMENT, folder)
        forced = agreement.sequences(AGREEMENT, checkpoint.vocab_size)
        return told(agreement.compare(session.top_logprobs(forced, agreement.COUNT), table))

    def by_products() -> Mapping[Cell, Any]:
        """The time to load of an engine that stays loaded, and memory."""
        found = zip(by_product_cells, (session.load_s or 0.0, session.peak_memory_gb()), strict=True)
        return {cell: told(Measured(value, None)) for cell, value in found if value > 0}

    return loop.Session(measure, session.close, by_products)


def _seed(number: int, cell: Cell) -> int:
    """Prompts of their own for every round and cell, the same for all engines."""
    sizes = (cell.batch, cell.prompt_tokens, cell.shared_tokens)
    return 1_000_003 * (number + 1) + sum(size * 31**power for power, size in enumerate(sizes))
