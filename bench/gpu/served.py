"""A whole Small 4, and Small 3, with random weights made on the card, serving a closed loop through the engine.

1,024 tokens in, 256 out, at 1, 8, 64 and 256 concurrent requests: output tokens per second, time to first token,
time between tokens. Before a model is timed, two layers of it must give the logits of the plain-torch reference.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cierzo.bench.gpu.conformance import Failed
from cierzo.cache.pool import KVPool
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.messages import Submit
from cierzo.engine.model.build import build_model, parameter_specs
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.parameters import MatrixRequest, Parameter
from cierzo.engine.weights.matrices import DeviceMatrices
from cierzo.engine.weights.shapes import shape_of
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.runner import ModelRunner, make_pool
from cierzo.kernels import registry
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.formats.device import in_fp8, quantise, stack
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import StepRows
from cierzo.scheduler.params import SamplingParams

# (model, weights, activations)
MODELS = (
    ("small4", "nvfp4", "bf16"),
    ("small4", "fp8", "bf16"),
    ("small4", "fp8", "fp8"),
    ("small3", "fp8", "bf16"),
    ("small3", "fp8", "fp8"),
    ("small3", "bf16", "bf16"),
)
CONCURRENT = (1, 8, 64, 256)
PROMPT_TOKENS, NEW_TOKENS = 1024, 256
LOAD_S = 90.0  # no new request after this long: a cell must end
SLICE_LAYERS, PROMPT = 2, 37  # and tokens of a slice's prompt
TOLERANCE = 2e-2  # of logits, relative to their root mean square
# With activations in FP8, whose rounding moves these logits by 9 to 13 %; the last bit of bf16 before it decides
# about half of that. Products alone are held to far less (conformance.py).
TOLERANCE_FP8 = 1e-1
ENGINE = {"budget_tokens": 8192, "max_chunk_tokens": 8192, "max_running": 256, "max_model_len": 2048}
Tasks = dict[str, Callable[[], Any]]  # by cell


class RandomMatrices(DeviceMatrices):
    """Matrices made where they run. Experts of a quantised matrix repeat one that was quantised: every byte is read
    from its own place, and making them takes no room to speak of."""

    def tensor(self, stored: Parameter) -> Tensor:
        """Norms of ones; the embedding, random."""
        if len(stored.shape) == 1:
            return torch.ones(stored.shape, dtype=stored.dtype, device=self._device)
        return self._random(stored.shape)

    def matrix(self, request: MatrixRequest) -> Matrix:
        """A matrix of the shape that is asked for; `request.make` is not called."""
        format = self._weights.of(request.role, "cuda", self._plain)
        if format == self._plain:
            return self._random(request.shape)
        *experts, n, k = request.shape
        matrix = quantise(self._random((n, k)), format)
        if experts:
            matrix = stack([matrix] * experts[0])
        return in_fp8(matrix) if self._activations in NUMBER_FORMATS[format].activations else matrix

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=self._device) * shape[-1] ** -0.5


def subjects(device: torch.device) -> dict[str, Callable[[], Tasks]]:
    """Each model, and what makes its tasks by cell: the slice, then the loads on one engine, which the first makes.
    A model that does not fit the card fails there."""

    def tasks(name: str, weights: str, activations: str) -> Tasks:
        core = functools.cache(partial(make_core, name, weights, activations, device))
        loads = {f"{concurrent} concurrent": partial(run_load, core, concurrent) for concurrent in CONCURRENT}
        return {"slice": partial(check_slice, name, weights, device, activations=activations), **loads}

    return {
        f"{name} {weights}{' x fp8' if activations == 'fp8' else ''}": partial(tasks, name, weights, activations)
        for name, weights, activations in MODELS
    }


def make_config(
    name: str, weights: str, *, scale: str | float = "full", layers: int = 0, **options: Any
) -> EngineConfig:
    """The configuration of a model of these shapes, without a checkpoint. layers: 0 is all."""
    values = shape_of(name, scale).config("bfloat16")
    if layers:
        values["num_hidden_layers"] = layers
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(values), encoding="utf-8")
        return resolve(EngineOptions(model=folder, device="cuda", weights=weights, **options))  # type: ignore[arg-type]


def make_model(config: EngineConfig, device: torch.device) -> Decoder:
    """Random weights, the same ones for the same configuration."""
    torch.manual_seed(0)
    stored = {
        name: torch.empty(spec.shape, dtype=torch.bfloat16, device="meta")
        for name, spec in parameter_specs(config.model).items()
    }
    matrices = RandomMatrices(config.weights, torch.bfloat16, device, config.activations)
    return build_model(config.model, stored, device=device, dtype=torch.bfloat16, matrices=matrices)


def make_core(name: str, weights: str, activations: str, device: torch.device) -> EngineCore:
    """The engine with a model of full size, and the cache that it plans for itself. Raises ConfigError."""
    config = make_config(name, weights, activations=activations, kv_dtype="fp8", **ENGINE)
    registry.bind(KernelsConfig(), "cuda")
    return EngineCore(config, ModelRunner.of(config, make_model(config, device), make_pool(config)))


def run_load(loaded: Callable[[], EngineCore], concurrent: int) -> dict[str, Any]:
    """A closed loop of `concurrent` clients, in this process -> rates, and times in seconds by percentile.

    Raises Failed where a request ends before its length.
    """
    core, requests = loaded(), max(2 * concurrent, 4)
    core.reset()
    random = torch.Generator().manual_seed(concurrent)
    sent: list[float] = []  # by request
    times: list[list[float]] = []  # of its tokens

    def send() -> None:
        number = len(sent)
        prompt = torch.randint(1000, 30_000, (PROMPT_TOKENS,), generator=random).tolist()
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, seed=number)
        times.append([])
        sent.append(time.perf_counter())
        core.submit(Submit(request_id=number, prompt_token_ids=prompt, sampling=params))

    start = time.perf_counter()
    for _ in range(concurrent):
        send()
    while core.has_work():
        for delta in core.step():
            now = time.perf_counter()
            times[delta.request_id] += [now] * len(delta.token_ids)
            if delta.finish is None:
                continue
            if delta.finish.reason != "length":
                raise Failed(f"request {delta.request_id} ended as {delta.finish.reason}: {delta.finish.message}")
            if len(sent) < requests and now - start < LOAD_S:
                send()
    elapsed_s = time.perf_counter() - start
    first = [found[0] - begun for begun, found in zip(sent, times, strict=True)]
    gaps = [later - sooner for found in times for sooner, later in pairwise(found)]
    return {
        "concurrent": concurrent,
        "requests": len(sent),
        "requests_per_s": len(sent) / elapsed_s,
        "output_tokens_per_s": sum(map(len, times)) / elapsed_s,
        "first_token_s": {p: float(np.percentile(first, p)) for p in (50, 99)},
        "between_tokens_s": {p: float(np.percentile(gaps, p)) for p in (50, 99)},
        "elapsed_s": elapsed_s,
    }


def check_slice(
    name: str, weights: str, device: torch.device, scale: str | float = "full", activations: str = "bf16"
) -> dict[str, Any]:
    """Two layers of the model, a prompt and a generated token: our kernels' logits against plain torch's.

    Raises Failed.
    """
    options = {"activations": activations, "max_model_len": 1024, "kv_cache_gib": 0.05}
    config = make_config(name, weights, scale=scale, layers=SLICE_LAYERS, **options)
    model, logits = make_model(config, device), []
    for implementations in (registry.reference(), {}):
        registry.bind(KernelsConfig(implementations=implementations), "cuda")
        logits.append(slice_logits(model, config, device).double())
    plain, ours = logits
    deviation = float((ours - plain).square().mean().sqrt() / plain.square().mean().sqrt())
    tolerance = TOLERANCE_FP8 if activations == "fp8" else TOLERANCE
    if not deviation <= tolerance:
        raise Failed(f"logits deviate by {deviation:.2e} of their size, more than {tolerance}")
    return {"deviation": deviation}


def slice_logits(model: Decoder, config: EngineConfig, device: torch.device) -> Tensor:
    """fp32 [2,N]: of a prompt's last token, and of the token after it."""
    pool = KVPool(config.layout, config.cache.num_blocks, device)
    table = torch.arange(config.cache.num_blocks, dtype=torch.int32, device=device)[None]
    none, logits = PagedQueries.of([], [], [], table), []
    for start, count in ((0, PROMPT), (PROMPT, 1)):
        positions = torch.arange(start, start + count, device=device)  # and slots, as the blocks lie in order
        tokens = (positions * 7919 + 11) % config.model.vocab_size
        asked = PagedQueries.of([count], [start + count], [0], table)
        expanded = (0, none, asked) if start else (count, asked, none)
        rows = StepRows(tokens, positions, positions, *expanded)
        logits.append(model.logits(rows, pool, torch.tensor([count - 1], device=device)))
    return torch.cat(logits)
