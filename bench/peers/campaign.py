"""The campaign: for each checkpoint its engines offline, then as servers, one in memory at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench import machine
from cierzo.bench.campaign import loop
from cierzo.bench.campaign.loop import Block, Campaign
from cierzo.bench.campaign.store import Store
from cierzo.bench.peers import transformers
from cierzo.bench.peers.engine import AGREEMENT, Cell, Engine, Subject
from cierzo.bench.peers.results import OURS, ratios

CLOSE_RATIO = 1.2  # below it, a ratio of ours to a peer's is measured in more rounds


@dataclass(frozen=True, kw_only=True)
class Peers(Campaign[Cell, Subject]):
    """Checkpoints, engines and cells to measure. rounds: for all, after which only close ratios are measured."""

    checkpoints: Sequence[Path]
    engines: Sequence[Engine]
    cells: Sequence[Cell]
    rounds: int
    folder: Path

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
        if AGREEMENT in block.cells:  # before an engine is loaded: in float32 a checkpoint takes twice its size
            with contextlib.suppress(Exception):  # the cell that needs it will say so
                transformers.reference(checkpoint, self.folder)
        is_served = block.cells[0].kind == "served"
        session = (engine.server if is_served else engine.offline)(checkpoint, self.folder)
        if session is None:
            return None
        session.agreement = functools.partial(transformers.agreement, session, checkpoint, self.folder)
        return loop.Session(session.measure, session.close, session.by_products)

    def told(self, cell: Cell, result: Any) -> str:
        """The value in the cell's unit."""
        return f"{result['value']:.4g} {cell.unit}"
