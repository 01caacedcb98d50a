"""Whole engines on the stand-in for a card: loaded, staged, recorded and overlapped as there, they give the tokens of
plain steps in the interpreter, though everything runs as late as it may and what was freed is poisoned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cuda_on_cpu
import msgspec
import pytest
import torch
import triton_interpreter
from standin.ask import ask
from standin.engines import MAX_RUNNING, MODELS, answers, load, make_config
from standin.library import available

from cierzo.cache.pool import KVPool
from cierzo.engine.model.build import build_model, parameter_specs
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.matrices import DeviceMatrices
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.runner import ModelRunner
from cierzo.engine.worker.step_rows import DeviceRows
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.registry import bind

pytestmark = pytest.mark.skipif(not available(), reason="Triton's wheels are for Linux on x86-64")
CPU = torch.device("cpu")
SEED = 1


def plainly(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The answers of steps that run one by one, in the interpreter, on the host's memory."""
    triton_interpreter.repair()
    monkeypatch.setattr(device, "require", lambda: None)
    config = make_config(folder, name, overlap="off")
    _, _, weights, activations = MODELS[name]
    with running_on(cuda_on_cpu.CpuBackend()):
        bind(KernelsConfig(), "cuda")
        try:
            with CheckpointReader(Path(config.checkpoint)) as reader:
                specs = parameter_specs(config.model)
                parameters = load_parameters(reader, specs, dtype=torch.bfloat16, device="cpu")
                matrices = DeviceMatrices(weights, torch.bfloat16, CPU, activations)
                model = build_model(config.model, parameters, device=CPU, dtype=torch.bfloat16, matrices=matrices)
            pool = KVPool(config.layout, config.cache.num_blocks + 1, CPU)
            runner = ModelRunner(model, pool, MAX_RUNNING, CPU, staged=DeviceRows(CPU))
            return answers(EngineCore(msgspec.structs.replace(config, overlap=False), runner), load(SEED))
        finally:
            bind(KernelsConfig(), "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("standin")
    for name in MODELS:
        make_config(made, name)
    return made


@pytest.fixture(scope="module")
def served(folder: Path) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = ask("engines", str(folder), str(SEED))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_overlapped_recorded_steps_give_the_tokens_of_plain_ones(
    folder: Path, served: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plainly(folder, name, monkeypatch) == served[name]
