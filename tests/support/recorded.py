"""A core with a flight recorder, driven as the core's loop drives it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from cierzo.cache.config import CacheConfig
from cierzo.engine import flight
from cierzo.engine.config import EngineConfig
from cierzo.engine.flight import AnyRecord, Kept, packed, read
from cierzo.engine.messages import CoreCommand, SamplingParams, Submit, TokenDelta, Vocabulary
from cierzo.engine.worker.core import EngineCore, Runner
from cierzo.engine.worker.fake import fake_config
from cierzo.engine.worker.recorder import Readings, Recorder
from cierzo.scheduler.config import SchedulerConfig

CONFIG = fake_config(
    SchedulerConfig(budget_tokens=32, max_running=8, max_model_len=512, max_chunk_tokens=32),
    CacheConfig(block_tokens=8, num_blocks=512, hash_key="00" * 16),
)
KEPT = Kept(reason="died", message="the core process died", at="20260101T000000Z")


def submit(request_id: int, prompt: list[int] | None = None, **params: Any) -> Submit:
    """A request, with a stop string that is nobody's business."""
    settings = {"max_tokens": 5, "seed": request_id, "ignore_eos": True, "stop": ("secret",), **params}
    prompt = [1, 2, request_id] if prompt is None else prompt
    return Submit(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(**settings))


class Recorded:
    """The core, and its record in a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        with_prompts: bool = False,
        segment_bytes: int = 1 << 20,
        overlap: bool = False,
        runner: Runner | None = None,
        config: EngineConfig = CONFIG,
    ) -> None:
        config = replace(config, flight_folder=str(folder), record_prompts=with_prompts, overlap=overlap)
        self.readings = Readings()
        self.core = EngineCore(config, runner, clock=self.readings)
        self.recorder = Recorder(config, self.core, self.readings, segment_bytes)
        self.core.observe = self.recorder.step

    def tell(self, command: CoreCommand) -> None:
        """Take a command."""
        self.recorder.command(command)
        if isinstance(command, Submit):
            self.core.submit(command)
        elif isinstance(command, Vocabulary):
            self.core.vocabulary(command)
        else:
            self.core.abort(command)

    def turn(self) -> list[TokenDelta]:
        """Take a turn of the loop."""
        deltas = self.core.step() if self.core.has_work() else self.core.take_deltas()
        self.recorder.results(deltas)
        return deltas

    def run(self) -> list[TokenDelta]:
        """Take turns until nothing is left to do."""
        deltas = []
        while self.core.has_work():
            deltas += self.turn()
        return deltas


def segments(folder: Path) -> list[Path]:
    """The files of the record."""
    return sorted(folder.glob("live-*"))


def parts(folder: Path, pid: int = 0) -> list[list[AnyRecord]]:
    """The records of each segment, the older one first."""
    found = []
    for data in flight.segments(str(folder), pid or os.getpid()):
        path = folder / "part.flight"
        path.write_bytes(packed(KEPT) + data)
        found.append(read(path)[1:])
        path.unlink()
    return found


def records(folder: Path) -> list[AnyRecord]:
    """The record, as the front end would keep it."""
    return [KEPT, *(record for part in parts(folder) for record in part)]
