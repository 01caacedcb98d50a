"""A core process whose device fails: `python faulty_core.py SOCKET CALLS [MARKER]`.

It is the real one, with a model that is a table in the place of a checkpoint's. The forward pass number CALLS
raises what torch raises for an illegal address; with MARKER, a file, once: it is made then, and a core that finds
it is sound.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import torch
from sampling_twin import TABLE
from torch import Tensor

from cierzo.cache.pool import KVPool
from cierzo.engine.config import EngineConfig
from cierzo.engine.worker import core, process
from cierzo.engine.worker.runner import ModelRunner
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.fault import note
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import bind

ILLEGAL_ADDRESS = """CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/cuda-runtime-api for more information."""


class FaultyModel:
    """Logits are a function of the last token and its position."""

    def __init__(self, calls: int, marker: Path | None) -> None:
        self._calls = calls
        self._marker = marker

    def logits(self, inputs: StepRows, kv: KVPool, logit_rows: Tensor | None) -> Tensor:
        """Of the rows that are wanted."""
        note("_table_lookup")
        self._calls -= 1
        if self._calls == 0 and not (self._marker is not None and self._marker.exists()):
            if self._marker is not None:
                self._marker.touch()
            raise torch.AcceleratorError(ILLEGAL_ADDRESS)
        rows = slice(None) if logit_rows is None else logit_rows
        return TABLE[(inputs.token_ids[rows] * 31 + inputs.positions[rows]) % len(TABLE)]


def main(socket: str, calls: str, marker: str = "") -> int:
    """Run until the front end goes, or the device."""

    def make_runner(config: EngineConfig) -> ModelRunner:
        bind(KernelsConfig(), "cpu")
        model = FaultyModel(int(calls), Path(marker) if marker else None)
        return ModelRunner(model, cast(KVPool, None), config.scheduler.max_running, overlap=config.overlap)

    core.make_runner = make_runner
    return process.run(socket)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
