"""A whole Small 4, and Small 3, with random weights made on the card, serving a closed loop through the engine.

1,024 tokens in, 256 out, at 1, 64, 256 and 8 concurrent requests, 20 s each: output tokens per second, time to
first token, time between tokens; and the kernels of decode steps, each with its time. Before a model is timed, two
layers of it must give the logits of the plain-torch reference.
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
from cierzo.engine.errors import ConfigError
from cierzo.engine.messages import Submit, TokenDelta
from cierzo.engine.model.build import build_model, parameter_specs
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.parameters import MatrixRequest, Parameter
from cierzo.engine.weights.matrices import DeviceMatrices
from cierzo.engine.weights.shapes import shape_of
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.runner import ModelRunner, make_pool
from cierzo.engine.worker.warm import Compilation
from cierzo.kernels import registry
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.formats import fp8
from cierzo.kernels.formats.device import in_fp8, quantise, stack
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import StepRows
from cierzo.scheduler.params import SamplingParams

# (model, weights, activations), the most valuable first
MODELS = (
    ("small4", "nvfp4", "bf16"),
    ("small3", "fp8", "bf16"),
    ("small4", "fp8", "fp8"),
    ("small4", "fp8", "bf16"),
    ("small3", "fp8", "fp8"),
    ("small3", "bf16", "bf16"),
)
LOADS = (("load", 1), ("step", 1), ("load", 64), ("step", 64), ("load", 256), ("load", 8))  # of the first model
OTHER_LOADS = (("load", 64), ("load", 1), ("load", 256), ("load", 8))
PROMPT_TOKENS, NEW_TOKENS = 1024, 256
TOKENS = (1000, 30_000)  # a prompt's lie between these
LOAD_S = 20.0  # then what runs is cut off
BEFORE, STEPS = 8, 4  # decode steps, of which the latter are profiled
KERNELS = 60  # the longest of them are told
SLICE_LAYERS, PROMPT = 2, 37  # and tokens of a slice's prompt
# Of logits, relative to their root mean square: between prompts, any two orders of sums differ by 1.2 to 2.1 %.
TOLERANCE = 3e-2
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
        format = self.format_of(request.role)
        if format == self._plain:
            return self._random(request.shape)
        *experts, n, k = request.shape
        matrix = quantise(self._random((n, k)), format)
        by_fp8 = self.takes_fp8(request.role, format)
        matrix = matrix if by_fp8 else fp8.weave(matrix)
        if experts:
            matrix = stack([matrix] * experts[0], experts[0])
        return in_fp8(matrix) if by_fp8 else matrix

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=self._device) * shape[-1] ** -0.5


def subjects(device: torch.device) -> dict[str, Tasks]:
    """Each model's tasks by cell: the slice, the engine made ready, then the loads on it."""
    found: dict[str, Tasks] = {}
    for name, weights, activations in MODELS:
        core = functools.cache(partial(make_core, name, weights, activations, device))
        tasks: Tasks = {"slice": partial(check_slice, name, weights, device, activations=activations)}
        tasks["engine"] = partial(fitting, core, lambda made, _: {"ready": made.describe_runner()}, 0)
        for what, number in OTHER_LOADS if found else LOADS:
            cell = f"{number} concurrent" if what == "load" else f"step of {number}"
            tasks[cell] = partial(fitting, core, run_load if what == "load" else profile_steps, number)
        found[f"{name} {weights}{' x fp8' if activations == 'fp8' else ''}"] = tasks
    return found


def fitting(
    loaded: Callable[[], EngineCore], run: Callable[[EngineCore, int], dict[str, Any]], concurrent: int
) -> dict[str, Any]:
    """Run on an engine without requests; or find that the model does not fit, as its plan says beforehand."""
    try:
        core = loaded()
    except ConfigError as error:
        if error.field != "weights":
            raise
        return {"does not fit": str(error)}
    core.reset()
    return run(core, concurrent)


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


def serving(name: str, weights: str, activations: str) -> EngineConfig:
    """The configuration of a model that is timed. Raises ConfigError."""
    return make_config(name, weights, activations=activations, kv_dtype="fp8", **ENGINE)


def make_model(config: EngineConfig, device: torch.device) -> Decoder:
    """Random weights, the same ones for the same configuration."""
    torch.manual_seed(0)
    stored = {
        name: torch.empty(spec.shape, dtype=torch.bfloat16, device="meta")
        for name, spec in parameter_specs(config.model).items()
    }
    matrices = RandomMatrices(config.weights, torch.bfloat16, device, config.activations, config.head)
    return build_model(config.model, stored, device=device, dtype=torch.bfloat16, matrices=matrices)


def make_core(name: str, weights: str, activations: str, device: torch.device) -> EngineCore:
    """The engine with a model of full size, and the cache that it plans for itself. Raises ConfigError."""
    config = serving(name, weights, activations)
    registry.bind(KernelsConfig(), "cuda")
    model = make_model(config, device)
    runner = ModelRunner.of(config, model, make_pool(config))
    # Nothing is compiled or recorded while it is timed.
    runner.prepare(config, Compilation(config, lambda: model.weights))
    return EngineCore(config, runner)


def run_load(core: EngineCore, concurrent: int) -> dict[str, Any]:
    """A closed loop of `concurrent` clients, in this process -> rates, and times in seconds by percentile; those of
    requests that time cuts off too.

    decode_tokens_per_s: from the moment on when the first requests all have their first token, until one must be
    followed by another. Raises Failed where a request ends before its length.
    """
    sent: list[float] = []  # by request
    times: list[list[float]] = []  # of its tokens
    start = time.perf_counter()
    for number in range(concurrent):
        sent.append(submit(core, number))
        times.append([])
    finished, most = 0, max(2 * concurrent, 4)
    while core.has_work() and time.perf_counter() - start < LOAD_S:
        for delta in step(core):
            now = time.perf_counter()
            times[delta.request_id] += [now] * len(delta.token_ids)
            finished += delta.finish is not None
            if delta.finish is not None and len(sent) < most:
                sent.append(submit(core, len(sent)))
                times.append([])
    elapsed_s = time.perf_counter() - start
    core.reset()
    first = [found[0] - begun for begun, found in zip(sent, times, strict=True) if found]
    gaps = [later - sooner for found in times for sooner, later in pairwise(found)]
    found: dict[str, Any] = {"concurrent": concurrent, "requests": finished, "requests_per_s": finished / elapsed_s}
    found |= {"output_tokens_per_s": sum(map(len, times)) / elapsed_s, "elapsed_s": elapsed_s}
    if all(times[:concurrent]):
        since, until = max(one[0] for one in times[:concurrent]), min(one[-1] for one in times[:concurrent])
        decoded = sum(since < moment <= until for one in times for moment in one)
        found["decode_tokens_per_s"] = decoded / (until - since) if until > since else 0.0
    for name, values in (("first_token_s", first), ("between_tokens_s", gaps)):
        found[name] = {p: float(np.percentile(values, p)) for p in (50, 99)} if values else {}
    return found


def submit(core: EngineCore, number: int) -> float:
    """Send a request; when that was."""
    random = torch.Generator().manual_seed(number)
    prompt = torch.randint(*TOKENS, (PROMPT_TOKENS,), generator=random).tolist()
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, seed=number)
    now = time.perf_counter()
    core.submit(Submit(request_id=number, prompt_token_ids=prompt, sampling=params))
    return now


def step(core: EngineCore) -> list[TokenDelta]:
    """A step's deltas. Raises Failed where a request ends before its length."""
    deltas = core.step()
    for delta in deltas:
        if delta.finish is not None and delta.finish.reason != "length":
            raise Failed(f"request {delta.request_id} ended as {delta.finish.reason}: {delta.finish.message}")
    return deltas


def profile_steps(core: EngineCore, concurrent: int) -> dict[str, Any]:
    """Decode steps of so many requests under torch's profiler: per step, microseconds on the clock, of all kernels,
    and of each kernel with its number of launches. On a CPU, of torch's operations."""
    for number in range(concurrent):
        submit(core, number)
    waiting = set(range(concurrent))
    while waiting:
        waiting -= {delta.request_id for delta in step(core) if delta.token_ids}
    for _ in range(BEFORE):
        step(core)
    on_card = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_card else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        start = time.perf_counter()
        for _ in range(STEPS):
            step(core)
        step_us = (time.perf_counter() - start) / STEPS * 1e6
    core.reset()
    time_of = "self_device_time_total" if on_card else "self_cpu_time_total"
    rows = [(one.key, one.count / STEPS, getattr(one, time_of) / STEPS) for one in profiler.key_averages()]
    rows.sort(key=lambda row: -row[2])
    kernels_us, launches = (sum(row[column] for row in rows) for column in (2, 1))
    return {"step_us": step_us, "kernels_us": kernels_us, "launches": launches, "kernels": rows[:KERNELS]}


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
