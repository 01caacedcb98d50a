"""A whole Small 4, and Small 3, with random weights made on the card, serving a closed loop through the engine.

1,024 tokens in, 256 out, at 1, 8, 64 and 256 concurrent requests: output tokens per second, time to first token,
time between tokens. Before a model is timed, two layers of it must give the logits of the plain-torch reference.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
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
from cierzo.kernels.formats.device import in_fp8, quantise
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
SLICE_LAYERS = 2
TOLERANCE = 2e-2  # of logits, relative to their root mean square
# With activations in FP8, whose rounding moves these logits by 9 to 13 %; the last bit of bf16 before it decides
# about half of that. Products alone are held to far less (conformance.py).
TOLERANCE_FP8 = 1e-1
MEMORY_SHARE = 0.93


class RandomMatrices(DeviceMatrices):
    """Matrices made where they run. Experts of a quantised matrix repeat one that was quantised: every byte is read
    from its own place, and making them takes no room to speak of."""

    def tensor(self, stored: Parameter) -> Tensor:
        """Norms of ones; the embedding, random."""
        if len(stored.shape) == 1:
            return torch.ones(stored.shape, dtype=stored.dtype, device=self._device)
        return self._random(stored.shape, stored.dtype)

    def matrix(self, request: MatrixRequest) -> Matrix:
        """A matrix of the shape that is asked for; `request.make` is not called."""
        format, shape = self._weights.of(request.role, "cuda", self._plain), request.shape
        if format == self._plain:
            return self._random(shape, torch.bfloat16)
        *experts, n, k = shape
        one = quantise(self._random((n, k), torch.bfloat16), format)
        if self._activations in NUMBER_FORMATS[format].activations:
            one = in_fp8(one)
        if not experts:
            return one

        def repeated(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.repeat(experts[0], *[1] * (tensor.dim() - 1))

        codes, scales = repeated(one.codes), repeated(one.scales)
        assert codes is not None
        assert scales is not None
        return replace(one, shape=shape, codes=codes, scales=scales, row_scales=repeated(one.row_scales))

    def _random(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self._device) * shape[-1] ** -0.5


Tasks = dict[str, Callable[[], Any]]  # by cell
CELLS = ("slice", *(f"{concurrent} concurrent" for concurrent in CONCURRENT))


def subjects(device: torch.device) -> dict[str, Callable[[], Tasks]]:
    """Each model, and what makes its tasks by cell; one that does not fit the card fails in its loads."""
    found: dict[str, Callable[[], Tasks]] = {}
    for name, weights, activations in MODELS:
        label = f"{name} {weights}" + (" x fp8" if activations == "fp8" else "")
        found[label] = partial(_tasks, name, weights, activations, device)
    return found


def _tasks(name: str, weights: str, activations: str, device: torch.device) -> Tasks:
    """The slice, then the loads on one engine, which the first of them makes."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 34
    core = functools.cache(partial(make_core, name, weights, activations, device, total))
    loads = [lambda n=concurrent: run_load(core(), n, max(2 * n, 4)) for concurrent in CONCURRENT]
    check = partial(check_slice, name, weights, device, activations=activations)
    return dict(zip(CELLS, [check, *loads], strict=True))


def make_config(
    name: str, weights: str, device: torch.device, *, scale: str | float = "full", layers: int = 0, **options: Any
) -> EngineConfig:
    """The configuration of a model of these shapes, without a checkpoint."""
    shape = shape_of(name, scale)
    with tempfile.TemporaryDirectory() as folder:
        values = shape.config("bfloat16")
        if layers:
            values["num_hidden_layers"] = layers
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


def make_core(name: str, weights: str, activations: str, device: torch.device, total_bytes: int) -> EngineCore:
    """The engine with a model of full size, and the cache in the memory that is left."""
    config = make_config(name, weights, device, activations=activations, kv_dtype="fp8", kv_cache_gib=1.0, **ENGINE)
    registry.bind(KernelsConfig(), "cuda")
    model = make_model(config, device)
    room = int(total_bytes * MEMORY_SHARE) - torch.cuda.memory_reserved(device) - WORKSPACE_BYTES
    wanted = CONCURRENT[-1] * (PROMPT_TOKENS + NEW_TOKENS + config.cache.block_tokens)
    blocks = min(room // config.layout.bytes_per_block, -(-wanted // config.cache.block_tokens) + 1)
    if blocks * config.cache.block_tokens < PROMPT_TOKENS + NEW_TOKENS:
        raise Failed(f"{room / 2**30:.1f} GiB are left beside the weights: no room for one request")
    config = msgspec.structs.replace(config, cache=msgspec.structs.replace(config.cache, num_blocks=blocks))
    return EngineCore(config, ModelRunner.of(config, model, make_pool(config)))


ENGINE = {"budget_tokens": 8192, "max_chunk_tokens": 8192, "max_running": 256, "max_model_len": 2048}
WORKSPACE_BYTES = 6 << 30


def run_load(core: EngineCore, concurrent: int, requests: int) -> dict[str, Any]:
    """A closed loop of `concurrent` clients, in this process -> rates and times."""
    core.reset()
    random = torch.Generator().manual_seed(concurrent)
    sent: dict[int, float] = {}
    times: dict[int, list[float]] = {}
    finished: list[int] = []
    start = time.perf_counter()

    def send() -> None:
        number = len(sent)
        prompt = torch.randint(1000, 30_000, (PROMPT_TOKENS,), generator=random).tolist()
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, seed=number)
        sent[number] = time.perf_counter()
        core.submit(Submit(request_id=number, prompt_token_ids=prompt, sampling=params))

    for _ in range(concurrent):
        send()
    while core.has_work():
        for delta in core.step():
            now = time.perf_counter()
            times.setdefault(delta.request_id, []).extend([now] * len(delta.token_ids))
            if delta.finish is None:
                continue
            if delta.finish.reason != "length":
                raise Failed(f"request {delta.request_id} ended as {delta.finish.reason}: {delta.finish.message}")
            finished.append(delta.request_id)
            if len(sent) < requests and now - start < LOAD_S:
                send()
    elapsed_s = time.perf_counter() - start
    first = [times[number][0] - sent[number] for number in finished]
    gaps = [later - sooner for found in times.values() for sooner, later in pairwise(found)]
    return {
        "concurrent": concurrent,
        "requests": len(finished),
        "requests_per_s": len(finished) / elapsed_s,
        "output_tokens_per_s": sum(map(len, times.values())) / elapsed_s,
        "first_token_s": {p: float(np.percentile(first, p)) for p in (50, 99)},
        "between_tokens_s": {p: float(np.percentile(gaps, p)) for p in (50, 99)},
        "elapsed_s": elapsed_s,
    }


def check_slice(
    name: str, weights: str, device: torch.device, scale: str | float = "full", activations: str = "bf16"
) -> dict[str, Any]:
    """Two layers of the model, a prompt and a generated token: our kernels' logits against plain torch's."""
    options = {"activations": activations, "max_model_len": 1024, "kv_cache_gib": 0.05}
    config = make_config(name, weights, device, scale=scale, layers=SLICE_LAYERS, **options)
    model = make_model(config, device)
    found = {}
    plain = KernelsConfig(implementations=registry.reference())
    for label, wanted in (("ours", KernelsConfig()), ("torch", plain)):
        registry.bind(wanted, "cuda")
        found[label] = _slice_logits(model, config, device)
    registry.bind(KernelsConfig(), "cuda")
    ours, torchs = (found[label].double() for label in ("ours", "torch"))
    deviation = float((ours - torchs).square().mean().sqrt() / torchs.square().mean().sqrt())
    tolerance = TOLERANCE_FP8 if activations == "fp8" else TOLERANCE
    if not deviation <= tolerance:
        raise Failed(f"logits deviate by {deviation:.2e} of their size, more than {tolerance}")
    return {"deviation": deviation}


def _slice_logits(model: Decoder, config: EngineConfig, device: torch.device) -> Tensor:
    """fp32 [2,N]: of a prompt's last token, and of the token after it."""
    pool = KVPool(config.layout, config.cache.num_blocks, device)
    prompt = 37
    block = config.cache.block_tokens
    tables = torch.arange(-(-(prompt + 1) // block), dtype=torch.int32, device=device)[None]
    tokens = (torch.arange(prompt + 1, device=device) * 7919 + 11) % config.model.vocab_size

    logits = []
    for first, count, expanded in ((0, prompt, True), (prompt, 1, False)):
        positions = torch.arange(first, first + count, device=device)
        groups = PagedQueries.of([count], [first + count], [0], tables), PagedQueries.of([], [], [], tables)
        rows = StepRows(
            tokens[first : first + count],
            positions,
            tables[0].long()[positions // block] * block + positions % block,
            count if expanded else 0,
            *(groups if expanded else groups[::-1]),
        )
        logits.append(model.logits(rows, pool, torch.tensor([count - 1], device=device)))
    return torch.cat(logits)
