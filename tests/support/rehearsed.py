"""The command for a machine with a GPU, at toy sizes on kernels that are interpreted; for rehearsal.py.

REHEARSAL in the environment is JSON: {"results": a folder in the place of bench/results, "operations": those that
there are, of Small 4 alone (all of both without it), "faults": {"subject: cell": fault}}. A fault is what a
RuntimeError says, after which that process has lost its device; or "stuck", "hang" (with a process of its own),
"kill", "segfault", or "gone": from then on no process gets the device. TRITON_INTERPRET must be set.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cuda_on_cpu
import torch
import triton_interpreter

from cierzo.bench.gpu import __main__ as command
from cierzo.bench.gpu import calls, carried, conformance, runs, timing, widths
from cierzo.bench.gpu.cases import CASES, Case, Size
from cierzo.bench.gpu.runs import Group
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.cuda.launch.launcher import running_on

ASKED = json.loads(os.environ["REHEARSAL"])
SMALL4 = ModelSizes(
    name="small4", hidden=64, heads=2, vocab=160, mlp_width=32, query_rank=32, rank=32, rope=16, nope=16,
    value_dim=16, experts=8, top_k=2, expert_width=32, shared_width=32,
)  # fmt: skip
SMALL3 = ModelSizes(name="small3", hidden=64, heads=4, vocab=160, mlp_width=96, kv_heads=2, head_dim=16)
FORMATS = ("nvfp4", "fp8", "bf16", "fp8 x fp8")
TIMED = ("decode 1", "decode 64", "decode 64, one prefix", "prefill 8192")
GONE = Path(ASKED["results"], "gone")
_lost = False


def toy_case(case: Case) -> Case:
    """The case with models of toy size."""
    if "operations" in ASKED:
        return replace(case, models=(SMALL4,), hostile=())
    return replace(
        case, models=(SMALL4, SMALL3), hostile=tuple(replace(SMALL3, name=one.name) for one in case.hostile)
    )


def toy_size(size: Size) -> Size:
    """A size of the same name, and of few tokens."""
    few = {"sequences": min(size.sequences, 2), "rows_each": min(size.rows_each, 8)}
    return replace(size, **few, context=64, shared=32 if size.shared else 0)


def faulty(group: Group) -> Group:
    """The group with the faults that are asked for."""
    faults: dict[str, str] = ASKED.get("faults", {})
    tasks: dict[str, Callable[[], Any]] = dict(group.tasks)
    for cell, task in group.tasks.items():
        fault = faults.get(f"{group.subject}: {cell}")
        tasks[cell] = partial(fail, fault) if fault else partial(run, task)
    return replace(group, tasks=tasks)


def run(task: Callable[[], Any]) -> Any:
    """A task, on a device that lives."""
    if _lost:
        raise RuntimeError("CUDA error: this process has lost its device")
    return task()


def fail(fault: str) -> None:
    """Have the fault."""
    global _lost
    _lost = True
    if fault == "stuck":
        time.sleep(3600)
    if fault == "hang":
        subprocess.run(["sleep", "3600"], check=False)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "segfault":
        ctypes.string_at(0)
    if fault == "gone":
        GONE.touch()
    raise RuntimeError(fault)


def touch(device: torch.device, *, right: Callable[[torch.device], float] = command.touch) -> float:
    """See the command's, of a device that may be gone."""
    if GONE.exists():
        raise RuntimeError("CUDA error: no CUDA-capable device is detected")
    return right(device)


def make_toys() -> None:
    """Put toys in the place of models, sizes and formats."""
    for name, case in list(CASES.items()):
        if name in ASKED.get("operations", CASES):
            CASES[name] = toy_case(case)
        else:
            del CASES[name]
    Case.formats = property(lambda self, every=Case.formats: tuple(f for f in every.fget(self) if f in FORMATS))  # type: ignore[assignment, attr-defined, misc]
    conformance.SIZES = tuple(toy_size(size) for size in conformance.SIZES if size.name in ("decode", "prefill"))
    timing.SIZES = tuple(toy_size(size) for size in timing.SIZES if size.name in TIMED)
    timing.SAMPLES, timing.COPY_BYTES, calls.COLD_BYTES = 2, 1 << 24, 0
    timing.measure.__kwdefaults__["cold_bytes"] = 0
    widths.FORMATS = ("nvfp4", "bf16")
    widths.TOKENS = replace(widths.TOKENS, sequences=64)
    runs.SMALL4 = carried.SMALL4 = SMALL4


def make_toy_models() -> None:
    """Have whole models be tiny, on an engine without a card."""
    from graph_repeater import Repeated

    from cierzo.bench.gpu import served
    from cierzo.cache.pool import KVPool
    from cierzo.engine.worker.core import EngineCore
    from cierzo.engine.worker.graphs import DecodeGraphs
    from cierzo.engine.worker.runner import ModelRunner
    from cierzo.engine.worker.step_rows import DeviceRows
    from cierzo.kernels import registry
    from cierzo.kernels.config import KernelsConfig

    def make_core(name: str, weights: str, activations: str, device: torch.device) -> EngineCore:
        options = {"max_running": 4, "budget_tokens": 16, "block_tokens": 16, "max_model_len": 64}
        options |= {"kv_cache_gib": 0.001, "activations": activations, "overlap": "off"}
        config = served.make_config(name, weights, scale="tiny", **options)
        registry.bind(KernelsConfig(), "cuda")
        model, pool = served.make_model(config, device), KVPool(config.layout, config.cache.num_blocks + 1, device)
        graphs = DecodeGraphs(
            model, pool, max_running=4, max_model_len=64, device=device, record=Repeated,
            cached_tokens=config.cache.num_blocks * config.cache.block_tokens,
        )  # fmt: skip
        return EngineCore(config, ModelRunner(model, pool, 4, device, staged=DeviceRows(device), graphs=graphs))

    served.MODELS = served.MODELS[:2]
    served.LOADS, served.OTHER_LOADS = (("load", 1), ("step", 2), ("load", 2)), (("load", 2),)
    served.TOKENS = (1, 100)
    served.PROMPT_TOKENS, served.NEW_TOKENS, served.BEFORE, served.STEPS = 5, 6, 1, 1
    served.LOAD_S = 6.0
    served.check_slice = partial(served.check_slice, scale="tiny")  # type: ignore[assignment]
    served.make_core = make_core


def put_in_place() -> None:
    """Have results lie in the rehearsal's folder, and belong to no commit."""
    command.RESULTS = Path(ASKED["results"])
    command.current_commit = lambda: "rehearsed"


def main() -> int:
    """Run it."""
    make_toys()
    if "models" in sys.argv:
        make_toy_models()
    triton_interpreter.repair()
    device.require = lambda: None
    put_in_place()
    command.touch = touch
    command.RUNS = {
        name: (lambda device, groups=groups: [faulty(one) for one in groups(device)], seconds)
        for name, (groups, seconds) in command.RUNS.items()
    }
    with running_on(cuda_on_cpu.CpuBackend()):
        return command.main(device_type="cpu")
