"""lm_head in FP8, on a GPU's kernels in Triton's interpreter: logits, what is compiled, plans and prices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from gpu_engine import gpu_kernels, load, make_config

from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.cost.work import StepShape, step_work
from cierzo.engine.model.build import parameter_specs
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.weights import matrices
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.engine.worker import launches
from cierzo.kernels.formats.activations import takes_fp8
from cierzo.kernels.formats.device import DeviceMatrix, dequantise
from cierzo.kernels.ops import compose

LARGEST_ERROR = 0.028  # of the logits' spread: number_formats.py's bound on normally distributed weights


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with gpu_kernels(monkeypatch):
        yield


def heads(folder: Path, like: str, *formats: str) -> tuple[EngineConfig, list[Decoder]]:
    """A tiny model with its head in each of the formats."""
    config = make_config(folder, like, "hf")
    return config, [load(config, *formats, head=head) for head in ("", "fp8")]


@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("fp8", "fp8")], ids=str)
def test_logits_differ_by_the_stated_error(tmp_path: Path, formats: tuple[str, str]) -> None:
    """Of hidden rows at random; and they are, to rounding, those of the dequantised head."""
    _, (plain, coded) = heads(tmp_path, "small4", *formats)
    head = coded.weights.head
    assert isinstance(head, DeviceMatrix)
    assert (head.format, head.woven, takes_fp8(head)) == ("fp8", head.shape[1] % 64 == 0, False)
    rows, width = 7, head.shape[1]
    random = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(rows, width, generator=random).bfloat16() for _ in range(2))
    every = torch.arange(rows)
    found, expected = (compose.head(one.weights, x, residual.clone(), every) for one in (coded, plain))
    error = (found - expected).pow(2).mean().sqrt() / expected.std()
    assert 0.01 < error < LARGEST_ERROR
    alone = compose.head(coded.weights, x[3:4], residual[3:4].clone(), every[:1])
    assert torch.equal(alone[0], found[3])
    assert not isinstance(plain.weights.head, DeviceMatrix)
    values = dequantise(head) - plain.weights.head.float()
    assert values.pow(2).mean().sqrt() / plain.weights.head.float().std() < LARGEST_ERROR


def test_what_a_server_compiles_is_that_of_its_head(tmp_path: Path) -> None:
    config, models = heads(tmp_path, "small3", "bf16", "bf16")
    for model, head in zip(models, ("bf16", "fp8"), strict=True):
        on_gpu = msgspec.structs.replace(config, device="cuda", head=head)
        with CheckpointReader(Path(config.checkpoint)) as reader:
            specs = parameter_specs(config.model)
            parameters = load_parameters(reader, specs, dtype=torch.bfloat16, device="cpu")
            weights = launches.weights_on_meta(on_gpu, parameters)
        found, expected = (
            {one.key for one in launches.launches(on_gpu, some).configurations} for some in (weights, model.weights)
        )
        assert found == expected
        assert any("'fp8" in key for key in found) == (head == "fp8")


def test_a_head_is_quantised_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, (_, whole) = heads(tmp_path, "small3", "bf16", "bf16")
    monkeypatch.setattr(matrices, "ROWS", 37)
    pieces = load(config, "bf16", "bf16", head="fp8")
    for one in ("codes", "scales"):
        found, expected = (getattr(model.weights.head, one) for model in (pieces, whole))
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_plans_and_prices_count_the_bytes_of_the_head(tmp_path: Path) -> None:
    config = make_config(tmp_path, "small4", "hf")
    model, vocab, hidden = config.model, config.model.vocab_size, config.model.hidden_size
    for weights in ("bf16", "fp8", "nvfp4"):
        plain, coded = NumberFormats(weights=weights), NumberFormats(weights=weights, head="fp8")
        assert weight_bytes(model, plain) - weight_bytes(model, coded) == vocab * (2 * hidden - hidden - 4)
    step = StepShape.of([(9, 1)], generated=True)
    both = NumberFormats(weights="fp8", activations="fp8", head="fp8")
    found = {one.operation: one for one in step_work(model, config.layout, both, step)}
    assert (found["lm_head"].rate, found["lm_head"].format) == ("bf16", "fp8")
    assert (found["linear"].rate, found["linear"].format) == ("fp8", "fp8 x fp8")
