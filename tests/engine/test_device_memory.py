"""The plan of a GPU's memory: weights by their formats, and a refusal with the numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_memory import peak_bytes

from cierzo.bench.gpu import served
from cierzo.cache.pool import KVPool
from cierzo.cli import main
from cierzo.engine import device_memory
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.device_memory import StepLimits
from cierzo.engine.errors import ConfigError
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.shapes import shape_of
from cierzo.engine.worker import launches, scoring
from cierzo.engine.worker.graphs import DecodeGraphs
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cuda.launch import device as cuda_device
from cierzo.kernels.registry import bind
from cierzo.kernels.triton import flash, split
from cierzo.kernels.triton.launch import dry_run
from cierzo.kernels.triton.split import Splits

H100, H200 = 79 << 30, 139 << 30
LIMITS = StepLimits(budget_tokens=8192, max_running=256, graph_sequences=256, max_model_len=131_072)
META = torch.device("meta")


def write_config(folder: Path, name: str) -> Path:
    (folder / "config.json").write_text(json.dumps(shape_of(name, "full").config("bfloat16")), encoding="utf-8")
    return folder


def full(folder: Path, name: str) -> ModelConfig:
    return read_model_config(write_config(folder, name))


@pytest.mark.parametrize(
    ("name", "weights", "gigabytes"),
    [
        ("small4", "bf16", 238),
        ("small4", "fp8", 119),
        ("small4", "nvfp4", 69),
        ("small3", "bf16", 47),
        ("small3", "fp8", 25),
    ],
)
def test_weights_of_the_published_models(tmp_path: Path, name: str, weights: str, gigabytes: int) -> None:
    """model.md 1.8 and 1.11: 238.8, 120.9, 70.8, 47.1 and 24.9 GB; vision, and here attention in FP8, apart."""
    assert weight_bytes(full(tmp_path, name), NumberFormats(weights=weights)) / 1e9 == pytest.approx(
        gigabytes, rel=0.02
    )


def test_four_bits_fit_an_h100_and_eight_an_h200(tmp_path: Path) -> None:
    model = full(tmp_path, "small4")
    assert device_memory.kv_room_bytes(model, "nvfp4", H100, LIMITS, 11_520) > 4 << 30
    assert device_memory.kv_room_bytes(model, "fp8", H200, LIMITS, 11_520) > 12 << 30
    with pytest.raises(ConfigError, match=r"the GPU has 79.0 GiB free; weights in fp8 take 11\d.\d GiB"):
        device_memory.kv_room_bytes(model, "fp8", H100, LIMITS, 11_520)


def test_the_cache_takes_what_is_left_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "free_bytes", lambda: H100)
    write_config(tmp_path, "small4")
    options = {"model": str(tmp_path), "device": "cuda", "weights": "nvfp4", "kv_dtype": "fp8", "block_tokens": 64}
    config = resolve(EngineOptions(**options))
    pool = config.cache.num_blocks * config.layout.bytes_per_block
    assert 4 << 30 < pool < 12 << 30
    assert config.overlap
    with pytest.raises(ConfigError, match=r"kv_cache_gib must be at most .*, got 60"):
        resolve(EngineOptions(**options, kv_cache_gib=60))
    with pytest.raises(ConfigError, match=r"one of auto, bf16, fp8, nvfp4 \(int4 has no kernels on a GPU\)"):
        resolve(EngineOptions(**{**options, "weights": "int4"}))


def test_a_server_for_a_card_that_is_too_small_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_memory, "free_bytes", lambda: 16 << 30)
    folder = write_config(tmp_path, "small4")
    assert main(["serve", str(folder), "--device", "cuda", "--weights", "nvfp4"]) == 2
    told = (
        "cierzo: config_error: the GPU has 16.0 GiB free; weights in nvfp4 take 64.5 GiB, workspaces 4.00: nothing"
    )
    assert capsys.readouterr().err.startswith(told)


def test_without_a_driver_nothing_is_known() -> None:
    if device_memory.free_bytes() is not None:
        pytest.skip("there is a GPU")
    assert device_memory.free_bytes() is None


# --- workspaces --------------------------------------------------------------------------------------------

MODELS = [
    ("small4", "nvfp4", "bf16"),
    ("small4", "fp8", "fp8"),
    ("small3", "bf16", "bf16"),
    ("small3", "fp8", "fp8"),
]


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[EngineConfig, Decoder, KVPool]]]:
    """Makes a published model of two layers on meta tensors, for an H200."""
    monkeypatch.setattr(device_memory, "free_bytes", lambda: H200)
    monkeypatch.setattr(cuda_device, "require", lambda: None)
    bind(KernelsConfig(), "cuda")

    def make(name: str, weights: str, activations: str, **limits: int) -> tuple[EngineConfig, Decoder, KVPool]:
        options: dict[str, Any] = {"activations": activations, "kv_dtype": "fp8", "layers": 2, **limits}
        config = served.make_config(name, weights, **options)
        return config, served.make_model(config, META), KVPool(config.layout, 1, META)

    with torch.inference_mode():
        yield make
    bind(KernelsConfig(), "cpu")


@pytest.mark.parametrize(("name", "weights", "activations"), MODELS[1:])
def test_the_sum_of_a_launched_step_covers_what_it_allocates(
    on_meta: Callable[..., Any], name: str, weights: str, activations: str
) -> None:
    config, model, pool = on_meta(name, weights, activations, budget_tokens=8192, max_running=256)
    most = 0
    longest = 256 * config.scheduler.max_model_len  # of all sequences
    for rows, logit_rows in launches.steps(config.scheduler, config.cache.block_tokens, [8192], longest):
        most = max(most, peak_bytes(partial(dry_run, model.logits, rows, pool, logit_rows)))
    planned = device_memory.launched_bytes(config.model, 8192)
    assert most <= planned + 4 * 256 * config.model.vocab_size  # logits
    assert planned <= 1.75 * most


@pytest.mark.parametrize("sizes", [(1, 32_768), (64, 131_072), (256, 524_288), (512, 8_388_608)])
@pytest.mark.parametrize(("name", "weights", "activations"), MODELS)
def test_the_sum_of_a_recorded_step_covers_what_it_allocates(
    on_meta: Callable[..., Any], name: str, weights: str, activations: str, sizes: tuple[int, int]
) -> None:
    """4.3 GiB of Small 3's 512 sequences, which no plan knew: partial results grow with the bound."""
    config, model, pool = on_meta(name, weights, activations, max_running=512, max_model_len=131_072)
    peaks: list[int] = []
    launched: list[Any] = []

    def record(work: Callable[[], None]) -> Any:
        peaks.append(peak_bytes(lambda: launched.extend(dry_run(work))))

    graphs = DecodeGraphs(
        model,
        pool,
        max_running=512,
        max_model_len=131_072,
        cached_tokens=8_388_608,
        device=META,
        record=record,
    )
    graphs._bounds = {sizes[0]: [sizes[1]]}
    graphs.record_all(torch.empty(512, 4096, dtype=torch.int32, device=META), None)
    planned = device_memory.replayed_bytes(config.model, *sizes, 131_072)
    assert peaks[0] <= planned + 4 * 512 * config.model.vocab_size  # the logits that all write
    assert planned <= 1.5 * peaks[0]
    numbers = Counter(one.kernel.name for one in launched).values()
    once = sum(number for number in numbers if number == 1)  # a step's own, whatever the number of layers
    of_layers = 18 * (len(launched) - once)  # with the published 36
    assert of_layers + once <= 36 * device_memory.LAUNCHES_PER_LAYER


def test_the_step_that_is_recorded_first_holds_the_most(on_meta: Callable[..., Any]) -> None:
    """All others find their memory in its own."""
    _, model, pool = on_meta("small4", "nvfp4", "bf16", max_running=32)
    peaks: list[int] = []
    graphs = DecodeGraphs(
        model,
        pool,
        max_running=32,
        max_model_len=131_072,
        cached_tokens=1_000_000,
        device=META,
        record=lambda work: peaks.append(peak_bytes(partial(dry_run, work))),  # type: ignore[arg-type, func-returns-value]
    )
    graphs.record_all(torch.empty(32, 4096, dtype=torch.int32, device=META), None)
    assert len(peaks) == len(graphs) > 20
    assert 1.25 * peaks[0] > max(peaks) > 2 * min(peaks)  # some smaller ones have a program for each part


def test_constants_of_kernels_are_the_kernels_own() -> None:
    walked = Splits(*device_memory.WALKED, walked=split.WALKED.walked)
    assert (Splits(*device_memory.CUT), walked) == (split.SPLITS, split.WALKED)
    assert Splits(*device_memory.APART, joined=split.WALKED.walked) == walked.apart()
    ours = device_memory.ROWS, device_memory.PROGRAMS, device_memory.PARTIAL_BYTES
    assert ours == (split.ROWS, split.PROGRAMS, split.PARTIAL_BYTES)
    assert device_memory.WORKSPACE_TOKENS == flash.WORKSPACE_TOKENS
    assert device_memory.SCORED_ROWS == scoring.BLOCK_ROWS


def test_recorded_steps_of_many_sequences_leave_less_to_the_cache(tmp_path: Path) -> None:
    model = full(tmp_path, "small3")
    few, many = (StepLimits(8192, 1024, number, 131_072) for number in (0, 1024))
    rooms = [device_memory.kv_room_bytes(model, "fp8", H200, limits, 163_840) for limits in (few, many)]
    assert rooms[0] - rooms[1] > 1 << 30
    replayed = device_memory.replayed_bytes(model, 1024, 1_000_000, 131_072)
    assert replayed > 1 << 30
    assert device_memory.workspace_bytes(model, many, 1_000_000) > 2 * replayed  # each is run before it is recorded
    sampled = 4 * 4 * 2048 * model.vocab_size + device_memory.drawn_bytes(2048, model.vocab_size)
    # more than any step's tensors
    assert device_memory.workspace_bytes(model, StepLimits(1024, 2048, 0, 4096), 0) == sampled
