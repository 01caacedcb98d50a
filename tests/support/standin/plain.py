"""The same engines without the stand-in: steps one by one, in the interpreter, on the host's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from gpu_engine import gpu_kernels
from gpu_engine import load as load_model

from cierzo.cache.pool import KVPool
from cierzo.engine.messages import Submit
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.runner import ModelRunner
from cierzo.engine.worker.step_rows import DeviceRows
from standin.engines import MAX_RUNNING, MODELS, answers, make_config

CPU = torch.device("cpu")


def plainly(
    folder: Path, name: str, requests: list[tuple[int, Submit]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[Any]]:
    """Answers of these steps, by request; see engines.answers."""
    config = make_config(folder, name, overlap="off")
    with gpu_kernels(monkeypatch):
        model = load_model(config, *MODELS[name][2:])
        pool = KVPool(config.layout, config.cache.num_blocks + 1, CPU)
        runner = ModelRunner(model, pool, MAX_RUNNING, CPU, staged=DeviceRows(CPU))
        return answers(EngineCore(msgspec.structs.replace(config, overlap=False), runner), requests)
