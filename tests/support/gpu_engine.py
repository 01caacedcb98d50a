"""The engine on a GPU's kernels, in Triton's interpreter and on fibers: configurations and models of toy size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cuda_on_cpu
import msgspec
import pytest
import torch
import triton_interpreter

from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.model.build import build_model, parameter_specs
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.weights.matrices import DeviceMatrices
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.registry import bind

CPU = torch.device("cpu")
MAX_RUNNING = 3
# (model, checkpoint, weights, activations); an FP8 checkpoint has static scales of activations, another has none
MODELS = (
    ("small4", "hf", "nvfp4", "bf16"),
    ("small4", "hf", "fp8", "bf16"),
    ("small4", "hf-fp8", "fp8", "fp8"),
    ("small3", "hf", "bf16", "bf16"),
    ("small3", "hf", "fp8", "fp8"),
)


@contextmanager
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda_on_cpu.CpuBackend]:
    """The operations, bound to a GPU's kernels; the backend of those in CUDA C++."""
    if not cuda_on_cpu.available():
        pytest.skip("no g++ on Linux")
    triton_interpreter.repair()
    monkeypatch.setattr(device, "require", lambda: None)
    backend = cuda_on_cpu.CpuBackend()
    with running_on(backend):
        bind(KernelsConfig(), "cuda")
        yield backend
    bind(KernelsConfig(), "cpu")


def make_config(folder: Path, like: str, checkpoint_format: str, **changes: Any) -> EngineConfig:
    """A tiny checkpoint, and limits so low that a few requests meet them."""
    checkpoint = make_checkpoint(folder / "model", like=like, scale="tiny", checkpoint_format=checkpoint_format)
    options = EngineOptions(
        model=str(checkpoint),
        max_running=MAX_RUNNING,
        budget_tokens=12,
        block_tokens=16,
        max_model_len=64,
        kv_cache_gib=0.001,
        prefix_caching=False,
    )
    return resolve(msgspec.structs.replace(options, **changes))


def load(config: EngineConfig, weights: str, activations: str, head: str = "") -> Decoder:
    """The checkpoint's model in these formats, as a GPU holds it."""
    with CheckpointReader(Path(config.checkpoint)) as reader:
        specs = parameter_specs(config.model)
        parameters = load_parameters(reader, specs, dtype=torch.bfloat16, device="cpu")
        matrices = DeviceMatrices(weights, torch.bfloat16, CPU, activations, head)
        return build_model(config.model, parameters, device=CPU, dtype=torch.bfloat16, matrices=matrices)
