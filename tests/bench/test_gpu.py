"""The command for a GPU machine, on the CPU: its cells, its checks, which must be able to fail, its served load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import cuda_on_cpu
import pytest
import torch
import triton_interpreter
from torch import Tensor

from cierzo.bench.gpu import conformance, served, timing, widths
from cierzo.bench.gpu.baselines import BASELINES
from cierzo.bench.gpu.calls import CASES, make_call
from cierzo.bench.gpu.cases import SMALL4, Size
from cierzo.cache.config import CacheConfig
from cierzo.engine import device_memory
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.engine.errors import ConfigError
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import fake_config
from cierzo.kernels import registry
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.triton import heuristics
from cierzo.kernels.triton.launch import Configuration, launch
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
LIMITS = SchedulerConfig(
    budget_tokens=8192, max_chunk_tokens=8192, max_running=8, max_waiting=8, max_model_len=2048
)
PREFIX = Size(name="decode, one prefix", sequences=3, rows_each=1, context=544, shared=512)


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not cuda_on_cpu.available():
        pytest.skip("no g++ on Linux")
    triton_interpreter.repair()
    monkeypatch.setattr(device, "require", lambda: None)
    with running_on(cuda_on_cpu.CpuBackend()):
        registry.bind(KernelsConfig(), "cuda")
        yield
    registry.bind(KernelsConfig(), "cpu")


def check(operation: str, format: str) -> dict[str, Any]:
    """A check with the first model and size that have the operation. tests/kernels has the others."""
    cells = ((model, size) for model in (TINY4, TINY3) for size in (DECODE, PREFILL))
    return conformance.check(
        operation, *next(one for one in cells if CASES[operation].has(*one)), format, CPU, seed=3
    )


@pytest.mark.parametrize("operation", CASES)
def test_every_operation_conforms_and_would_be_found_wrong(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for format in CASES[operation].formats:
        assert check(operation, format)["deviation"] <= conformance.TOLERANCE_FP8, format
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
    assert conformance.check(operation, model, size, "bf16", CPU, seed=3)["companies"] > 0


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
    from cierzo.kernels.triton import linear

    right = linear.linear
    monkeypatch.setattr(
        linear,
        "linear",
        lambda x, weight: right(x, weight) * (1.0 if heuristics.DESCRIBED_TOKENS is None else 1.01),
    )
    with pytest.raises(conformance.Failed, match="through descriptors it has other bits"):
        conformance.check("linear", TINY4, DECODE, "bf16", CPU, seed=0)
    assert heuristics.DESCRIBED_TOKENS is None


@pytest.mark.parametrize("sequences", [2, 6000], ids=["512 bytes", "more than a MiB"])
def test_an_output_row_that_is_not_written_is_found(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its size: allocators have pools of small and of large blocks, which hold right values of before."""
    from cierzo.kernels.ref import norm as plain
    from cierzo.kernels.triton import norm

    def forgetful(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        right = plain.rms_norm(x, weight, eps)
        for like in [torch.empty_like(right) for _ in range(4)]:
            like.copy_(right)  # memory that is let go of holds what should be there
        out = torch.empty_like(right)
        out[:-1] = right[:-1]
        return out

    size = replace(DECODE, sequences=sequences)
    monkeypatch.setattr(norm, "rms_norm", plain.rms_norm)
    assert conformance.check("rms_norm", replace(TINY4, hidden=128), size, "bf16", CPU, seed=0)["deviation"] < 0.01
    monkeypatch.setattr(norm, "rms_norm", forgetful)
    with pytest.raises(conformance.Failed, match=r"128 values are finite in one of both only"):
        conformance.check("rms_norm", replace(TINY4, hidden=128), size, "bf16", CPU, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_memory_that_nobody_wrote_is_poisoned_and_no_other(dtype: torch.dtype) -> None:
    like = torch.zeros(3, 5, dtype=dtype)
    with torch.inference_mode(), conformance.Poisoned():
        made = [torch.empty(7, dtype=dtype), torch.empty_like(like.t()), like.new_empty(2, 3)]
        made.append(torch.empty_strided((2, 3), (1, 2), dtype=dtype))
        assert not torch.zeros(3, dtype=dtype).float().any()
        assert torch.equal(like.clone().float(), like.float())
    for one in made:
        assert bool(one.isnan().all()) if dtype.is_floating_point else bool((one == -1).all())


def test_kernels_are_timed_and_apart_from_them_what_torch_has() -> None:
    found = timing.measure("expert_mlp", TINY4, DECODE, "nvfp4", CPU, cold_bytes=0)
    assert found["implementation"] == "triton"
    assert found["us"] > 0
    assert len(found["samples_us"]) > 1
    for format in ("fp8", "fp8 x fp8", "static fp8 x fp8"):
        dense = timing.measure("linear", TINY4, DECODE, format, CPU, cold_bytes=0, subject="torch")
        assert (dense["implementation"], dense["us"] > 0) == ("torch", True)
    described = timing.measure("linear", TINY4, PREFILL, "fp8", CPU, cold_bytes=0, subject="described")
    assert described["us"] > 0
    assert heuristics.DESCRIBED_TOKENS is None


def test_a_baseline_that_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 80 GB torch has no room to dequantise 128 experts of NVFP4; on 141 it has. Nothing is made to find out."""
    size = Size(name="", sequences=64, rows_each=1, context=64)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (79 << 30, 80 << 30))
    (arguments,), _ = make_call("expert_mlp", SMALL4, DECODE, "nvfp4", torch.device("meta"), cold_bytes=0)
    assert 80e9 < timing.baseline_bytes(arguments) < 141e9
    cell = ("expert_mlp", SMALL4, size, "nvfp4", torch.device("cuda"))
    assert timing.measure(*cell, subject="torch") == {"does not fit": "it takes 86 GiB, 79 are free"}


def test_the_width_of_a_tile_is_seen_in_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from cierzo.kernels.triton import linear

    monkeypatch.setattr(widths, "TOKENS", replace(widths.TOKENS, sequences=70))
    found = widths.compare("nvfp4", TINY4, CPU)
    assert len(found["ways"]) == len(widths.configurations("nvfp4", TINY4)) >= 4
    assert found["all"] is True

    def wrong(configuration: Configuration, grid: tuple[int, ...], **arguments: Any) -> None:
        launch(configuration, grid, **arguments)
        if configuration.constants["BLOCK_T"] >= 64:
            arguments["out_ptr"].mul_(1.01)

    monkeypatch.setattr(linear, "launch", wrong)
    found = widths.compare("nvfp4", TINY4, CPU)
    assert found["all"] is False
    assert [name for name, equal in found["ways"].items() if not equal] == [
        name for name in found["ways"] if name.startswith(("64", "128"))
    ]


@pytest.mark.parametrize("operation", BASELINES)
def test_what_torch_is_timed_with_computes_the_same(operation: str) -> None:
    """But for the rounding of activations to FP8, which torch has for some products. Prompts are whole contexts."""
    reference = registry.implementations(operation, "cuda")[-1].load()
    compared = 0
    for model, size, format in product((TINY4, TINY3), (DECODE, PROMPT), CASES[operation].formats):
        if not CASES[operation].has(model, size):
            continue
        (arguments,), _ = make_call(operation, model, size, format, CPU, seed=3, cold_bytes=0)
        wanted, got = reference(*arguments).double(), BASELINES[operation](*arguments)().double()
        if got.dim() == 4:  # sequences, heads, rows
            got = got.transpose(1, 2)
        error = (got.reshape(wanted.shape) - wanted).square().mean() / wanted.square().mean()
        assert error.sqrt() < 0.06, (model.name, format)
        compared += 1
    assert compared


@pytest.mark.parametrize(("weights", "activations"), [("nvfp4", "bf16"), ("fp8", "fp8")])
def test_a_model_of_random_weights_has_the_references_logits(weights: str, activations: str) -> None:
    """FP8 by FP8 by definition too: the same codes of the same activations, but for a few that turn."""
    found = served.check_slice("small4", weights, CPU, "tiny", activations)["deviation"]
    assert found < (served.TOLERANCE_FP8 if activations == "fp8" else served.TOLERANCE)


def test_a_load_keeps_its_clients_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real engine around the fake runner, whose steps take hardly any time."""
    monkeypatch.setattr(served, "NEW_TOKENS", 5)
    core = EngineCore(fake_config(LIMITS, CacheConfig(block_tokens=32, num_blocks=400, hash_key="00" * 16)))
    found = served.fitting(lambda: core, served.run_load, 3)
    assert (found["concurrent"], found["requests"]) == (3, 6)
    assert found["output_tokens_per_s"] == pytest.approx(5 * found["requests_per_s"])
    assert found["decode_tokens_per_s"] > 0
    assert found["elapsed_s"] > found["first_token_s"][99] >= found["first_token_s"][50] > 0
    assert found["between_tokens_s"][99] >= found["between_tokens_s"][50] > 0
    monkeypatch.setattr(served, "PROMPT_TOKENS", 2049)
    with pytest.raises(conformance.Failed, match="ended as"):
        served.run_load(core, 3)
    core.reset()
    with pytest.raises(conformance.Failed, match="ended as"):
        served.profile_steps(core, 3)


def test_a_load_is_cut_off_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "NEW_TOKENS", 900)
    monkeypatch.setattr(served, "LOAD_S", 0.05)
    core = EngineCore(fake_config(LIMITS, CacheConfig(block_tokens=32, num_blocks=400, hash_key="00" * 16)))
    right = core.step
    monkeypatch.setattr(core, "step", lambda: time.sleep(0.01) or right())
    found = served.run_load(core, 2)
    assert found["requests"] == 0
    assert 0.05 <= found["elapsed_s"] < 5
    assert found["output_tokens_per_s"] > 0
    assert not core.has_work()


def test_a_model_that_does_not_fit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its plan: Small 4 in FP8 takes 119 GB, more than an H100 has."""
    monkeypatch.setattr(device_memory, "free_bytes", lambda: 80 * 10**9)
    monkeypatch.setattr(served, "make_model", lambda *_: pytest.fail("it is made"))
    tasks = served.subjects(CPU)["small4 fp8"]
    for load in ("64 concurrent", "256 concurrent"):
        assert "weights in fp8 take" in tasks[load]()["does not fit"]

    def refuses() -> EngineCore:
        raise ConfigError("no such thing", field="kv_dtype")

    with pytest.raises(ConfigError, match="no such thing"):
        served.fitting(refuses, served.run_load, 1)
