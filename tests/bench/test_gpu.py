"""The command for a GPU machine, on the CPU: its cells, its checks, which must be able to fail, its served load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import cuda_on_cpu
import pytest
import torch
import triton_interpreter
from torch import Tensor

from cierzo.bench.campaign.loop import DeviceLost, Run
from cierzo.bench.campaign.store import Sample, Store
from cierzo.bench.gpu import __main__ as command
from cierzo.bench.gpu import calls, conformance, served, timing
from cierzo.bench.gpu.baselines import BASELINES
from cierzo.bench.gpu.calls import CASES, make_call
from cierzo.bench.gpu.cases import Size
from cierzo.cache.config import CacheConfig
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import fake_config
from cierzo.kernels import registry
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.scheduler.config import SchedulerConfig

CPU = torch.device("cpu")
TINY4 = ModelSizes(
    name="tiny4", hidden=64, heads=2, vocab=160, mlp_width=32, query_rank=32, rank=32, rope=16, nope=16,
    value_dim=16, experts=8, top_k=2, expert_width=32, shared_width=32,
)  # fmt: skip
TINY3 = ModelSizes(name="tiny3", hidden=64, heads=4, vocab=160, mlp_width=96, kv_heads=2, head_dim=16)
OSS = replace(TINY3, name="oss", window=24, sinks=True)
DECODE = Size(name="decode", sequences=2, rows_each=1, context=64)
PREFILL = Size(name="prefill", sequences=1, rows_each=20, context=32)
PROMPT = Size(name="prompt", sequences=1, rows_each=32, context=32)
PREFIX = Size(name="decode, one prefix", sequences=3, rows_each=1, context=544, shared=512)


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not cuda_on_cpu.available():
        pytest.skip("no g++ on Linux")
    triton_interpreter.repair()
    monkeypatch.setattr(device, "require", lambda: None)
    monkeypatch.setattr(conformance, "POISON_BYTES", 1 << 20)
    with running_on(cuda_on_cpu.CpuBackend()):
        registry.bind(KernelsConfig(), "cuda")
        yield
    registry.bind(KernelsConfig(), "cpu")


def check(operation: str, format: str) -> bool:
    """Whether a check ran: with the first model and size that have the operation. tests/kernels has the others."""
    cells = ((model, size) for model in (TINY4, TINY3) for size in (DECODE, PREFILL))
    return any(conformance.check(operation, *cell, format, CPU, seed=3) is not None for cell in cells)


@pytest.mark.parametrize("operation", CASES)
def test_every_operation_conforms_and_would_be_found_wrong(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for format in CASES[operation].formats:
        assert check(operation, format), format
    right = conformance.outputs

    def wrong(*arguments: Any) -> list[Tensor]:
        monkeypatch.setattr(conformance, "outputs", right)  # of the first call alone, which is the kernel's
        return [(value.float() * 1.5 + 1).to(value.dtype) for value in right(*arguments)]

    monkeypatch.setattr(conformance, "outputs", wrong)
    with pytest.raises(conformance.Failed, match=r"deviates|differ|finite in one"):
        check(operation, CASES[operation].formats[0])


@pytest.mark.parametrize(
    ("operation", "model", "size"),
    [
        ("mla_decode", TINY4, PREFIX),
        ("gqa_decode", TINY3, PREFIX),
        ("gqa_decode", OSS, DECODE),
        ("gqa_prefill", OSS, PREFILL),
    ],
)
def test_shared_prefixes_and_windows_conform(operation: str, model: ModelSizes, size: Size) -> None:
    assert conformance.check(operation, model, size, "bf16", CPU, seed=3) is not None


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from cierzo.kernels.triton import norm

    right = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda x, weight, eps: right(x, weight, eps) * 1.05)
    with pytest.raises(conformance.Failed, match="deviates by"):
        conformance.check("rms_norm", TINY4, DECODE, "bf16", CPU, seed=0)

    def mixing(x: Any, weight: Any, eps: float) -> Any:
        return right(x, weight, eps) + 1e-3 * len(x)

    monkeypatch.setattr(norm, "rms_norm", mixing)
    with pytest.raises(conformance.Failed, match="row 0 has other bits alone"):
        conformance.check("rms_norm", TINY4, DECODE, "bf16", CPU, seed=0)


def test_other_bits_through_descriptors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from cierzo.kernels.triton import heuristics, linear

    right = linear.linear
    monkeypatch.setattr(
        linear,
        "linear",
        lambda x, weight: right(x, weight) * (1.0 if heuristics.DESCRIBED_TOKENS is None else 1.01),
    )
    with pytest.raises(conformance.Failed, match="through descriptors it has other bits"):
        conformance.check("linear", TINY4, DECODE, "bf16", CPU, seed=0)
    assert heuristics.DESCRIBED_TOKENS is None


def test_kernels_are_timed_beside_torch() -> None:
    limits = timing.ceilings(CPU)
    found = timing.measure("expert_mlp", TINY4, DECODE, "nvfp4", CPU, limits, 0)
    assert found is not None
    assert found["implementation"] == "triton"
    assert found["us"] > 0
    assert len(found["samples_us"]) > 1
    for format in ("fp8", "fp8 x fp8", "static fp8 x fp8"):
        dense = timing.measure("linear", TINY4, DECODE, format, CPU, limits, 0)
        assert dense is not None
        assert dense["torch"]["us"] > 0
        assert "described" not in dense
    prompt = timing.measure("linear", TINY4, PREFILL, "fp8", CPU, limits, 0)
    assert prompt is not None
    assert prompt["described"]["us"] > 0
    assert timing.measure("gqa_decode", TINY4, DECODE, "bf16", CPU, limits, 0) is None


@pytest.mark.parametrize("operation", BASELINES)
def test_what_torch_is_timed_with_computes_the_same(operation: str) -> None:
    """But for the rounding of activations to FP8, which torch has for some products. Prompts are whole contexts."""
    reference = registry.implementations(operation, "cuda")[-1].load()
    compared = 0
    for model, size, format in product((TINY4, TINY3), (DECODE, PROMPT), CASES[operation].formats):
        call = make_call(operation, model, size, format, CPU, seed=3, cold_bytes=0)
        if call is None:
            continue
        (arguments,), _ = call
        wanted, got = reference(*arguments).double(), BASELINES[operation](*arguments)().double()
        if got.dim() == 4:  # sequences, heads, rows
            got = got.transpose(1, 2)
        error = (got.reshape(wanted.shape) - wanted).square().mean() / wanted.square().mean()
        assert error.sqrt() < 0.06, (model.name, format)
        compared += 1
    assert compared


def _run(path: Path, **tasks: Any) -> tuple[Store, list[str]]:
    """A part of these tasks."""
    said: list[str] = []
    store = Store(path, {"commit": "abc", "device": "cpu"})
    Run(command.Part("part", {"part": lambda: tasks}), store, said.append).measure(1)
    return store, said


def test_tasks_are_cells_and_a_failure_says_what_it_was(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("no room")

    timed = {"us": 1.0, "gb_per_s": 1.0, "tflop_per_s": 0.0, "share": 0.5}
    store, said = _run(tmp_path / "cells.jsonl", a=lambda: timed, b=fails, c=lambda: None)
    assert store.measured("a", "part") == {0: timed}
    assert store.measured("c", "part") == {0: None}
    assert store.error("b", "part") == "ValueError: no room"
    assert said[0].endswith("a: 1.0 us, 1 GB/s, 0.0 TFLOP/s, 50% of the limit")
    assert said[1].endswith("b: FAILED: ValueError: no room")
    assert said[2].endswith("c: not in this model")


def test_a_lost_device_is_known_by_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses every call from then on, that which frees memory too."""

    def fails() -> None:
        monkeypatch.setattr(torch.cuda, "empty_cache", refuses)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def refuses() -> None:
        raise RuntimeError("the driver takes no more calls")

    with pytest.raises(DeviceLost, match="illegal memory access"):
        _run(tmp_path / "cells.jsonl", a=fails)


def test_parts_of_the_command_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In miniature: one operation, one size; the kernels' shares are of the ceilings that the run has measured."""
    monkeypatch.setattr(calls, "CASES", {"rms_norm": replace(CASES["rms_norm"], models=(TINY4, TINY3))})
    monkeypatch.setattr(conformance, "SIZES", (DECODE,))
    monkeypatch.setattr(timing, "SIZES", (PREFILL,))
    path = tmp_path / "cells.jsonl"
    words = ["--output", str(path), "--parts"]
    assert command.main([*words, "compile", "conformance", "ceilings", "kernels"], "cpu") == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["device"] == "cpu"
    cells = [(line["subject"], line["cell"]) for line in lines[1:]]
    tiny = [f"rms_norm, {model}, " for model in ("tiny4", "tiny3")]
    assert cells == [
        ("machine", "machine"),
        *(("conformance", f"{name}decode, bf16") for name in tiny),
        ("ceilings", "ceilings"),
        *(("kernels", f"{name}prefill, bf16") for name in tiny),
    ]
    assert lines[2]["result"]["deviation"] < conformance.TOLERANCE
    assert lines[-1]["result"]["share"] > 0
    capsys.readouterr()
    assert command.main([*words, "conformance", "kernels"], "cpu") == 0
    assert capsys.readouterr().out == ""


def test_kernels_need_no_package_of_ours_beside_torch() -> None:
    code = (
        "import sys\nfor name in ('msgspec', 'uvloop', 'safetensors', 'tqdm'): sys.modules[name] = None\n"
        "import cierzo.bench.gpu.__main__, cierzo.bench.gpu.compiled\n"
        "import cierzo.engine.cost.data_sheets, cierzo.engine.cost.operations, cierzo.engine.cost.sizes"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_results_of_another_commit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.jsonl"
    Store(path, {"commit": "another", "device": "cpu"}).add(
        Sample(cell="machine", subject="machine", round=0, started="", took_s=0.0)
    )
    assert command.main(["--output", str(path)], "cpu") == 2
    assert "holds samples of commit 'another'" in capsys.readouterr().err


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert command.main([]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(("weights", "activations"), [("nvfp4", "bf16"), ("fp8", "fp8")])
def test_a_model_of_random_weights_has_the_references_logits(weights: str, activations: str) -> None:
    """FP8 by FP8 by definition too: the same codes of the same activations, but for a few that turn."""
    found = served.check_slice("small4", weights, CPU, "tiny", activations)["deviation"]
    assert found < (served.TOLERANCE_FP8 if activations == "fp8" else served.TOLERANCE)


def test_a_load_keeps_its_clients_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real engine around the fake runner, whose steps take hardly any time."""
    monkeypatch.setattr(served, "NEW_TOKENS", 5)
    limits = SchedulerConfig(
        budget_tokens=8192, max_chunk_tokens=8192, max_running=8, max_waiting=8, max_model_len=2048
    )
    core = EngineCore(fake_config(limits, CacheConfig(block_tokens=32, num_blocks=400, hash_key="00" * 16)))
    found = served.run_load(lambda: core, 3)
    assert (found["concurrent"], found["requests"]) == (3, 6)
    assert found["output_tokens_per_s"] == pytest.approx(5 * found["requests_per_s"])
    assert found["elapsed_s"] > found["first_token_s"][99] >= found["first_token_s"][50] > 0
    assert found["between_tokens_s"][99] >= found["between_tokens_s"][50] > 0
    monkeypatch.setattr(served, "PROMPT_TOKENS", 2049)
    with pytest.raises(conformance.Failed, match="ended as"):
        served.run_load(lambda: core, 3)
