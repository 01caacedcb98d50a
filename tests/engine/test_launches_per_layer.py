"""Launches of a layer in a decode step, by a dry run of models of full width: what a recorded graph's nodes are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cierzo.bench.gpu import cases, predicted, served
from cierzo.bench.gpu.cases import Size
from cierzo.cache.pool import KVPool
from cierzo.engine import device_memory
from cierzo.engine.cost.launched import launched_work
from cierzo.engine.cost.weights import NumberFormats
from cierzo.engine.cost.work import StepShape
from cierzo.engine.weights.shapes import named_model_config
from cierzo.engine.worker import launches
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cuda.launch import device as cuda_device
from cierzo.kernels.registry import bind
from cierzo.kernels.triton.launch import CHAINED, dry_run

META = torch.device("meta")
SMALL4 = [
    *("latents_of", "absorbed_queries", "mla_attend", "values", "linear"),
    *("add_rms_norm", "route_groups_bf16_bf16", "expert_gate_up", "expert_down"),
]
FP8 = [
    *("latents_of", "absorbed_queries", "mla_attend", "values"),
    *("quantise_rows", "linear", "add_rms_norm", "route_groups_bf16_bf16", "quantise_pairs", "expert_gate_up"),
    *("quantise_rows", "expert_down"),
]


@pytest.fixture(autouse=True)
def _on_a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device_memory, "free_bytes", lambda: 139 << 30)
    monkeypatch.setattr(cuda_device, "require", lambda: None)
    bind(KernelsConfig(), "cuda")
    with torch.inference_mode():
        yield
    bind(KernelsConfig(), "cpu")


def of_a_step(name: str, weights: str, activations: str, rows: int, layers: int, decodes: bool = True) -> list[str]:
    """Kernels that a step launches, in order: of sequences with a row each, or of a prompt."""
    options: dict[str, Any] = {"activations": activations, "kv_dtype": "fp8", "max_running": 256}
    config = served.make_config(name, weights, layers=layers, **options)
    pool = KVPool(config.layout, 1, META)
    model = served.make_model(config, META)
    (step, logit_rows), *_ = (
        found
        for found in launches.steps(config.scheduler, config.cache.block_tokens, [rows], 4096)
        if (found[0].num_expanded, len(found[0].absorbed.contexts)) == ((0, rows) if decodes else (rows, 0))
    )
    return [one.kernel.name for one in dry_run(model.logits, step, pool, logit_rows)]


def of_a_layer(name: str, weights: str, activations: str, sequences: int) -> list[str]:
    """Kernels that the second of two layers launches, in order."""
    found = of_a_step(name, weights, activations, sequences, layers=2)
    first = found.index("expert_down") + 1
    return found[first : found.index("expert_down", first) + 1]


@pytest.mark.parametrize("sequences", [1, 64])
def test_small_4(sequences: int) -> None:
    assert of_a_layer("small4", "nvfp4", "bf16", sequences) == SMALL4
    assert of_a_layer("small4", "fp8", "fp8", sequences) == FP8


def test_most_are_set_up_while_those_before_them_run() -> None:
    names = {function.__name__ for function in CHAINED}
    assert {"_add_rms_norm", "_latents_of", "_absorbed_queries", "_mla_attend", "_values", "_linear"} <= names
    assert {"_expert_gate_up", "_expert_down"} <= names


def priced(name: str, weights: str, activations: str, rows: int, decodes: bool) -> Counter[str]:
    """Kernels of the operations that are priced for each layer of such a step."""
    model, sizes = named_model_config(name), {"small4": cases.SMALL4, "small3": cases.SMALL3}[name]
    assert model is not None
    if decodes:
        shape = StepShape.of([(63, 1)] * rows, generated=True)
        size = Size(name="", sequences=rows, rows_each=1, context=64)  # short: in one round
    else:
        shape = StepShape.of([(0, rows)], generated=False)
        size = Size(name="", sequences=1, rows_each=rows, context=rows)
    formats = NumberFormats(weights=weights, activations=activations)
    found: Counter[str] = Counter()
    for work in launched_work(model, model.cache_layout(64, "fp8"), formats, shape):
        if work.num_bytes and work.calls >= model.num_layers:
            for call in predicted.as_called(work.operation, sizes, size, work.format):
                found.update(one.kernel.name for one in predicted.launches(call.operation, call.arguments))
    return Counter({kernel: number for kernel, number in found.items() if kernel not in predicted.ONCE})


@pytest.mark.parametrize("rows", [1, 64, 128, 256])
@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [("small4", "nvfp4", "bf16"), ("small4", "fp8", "fp8"), ("small3", "fp8", "bf16"), ("small3", "fp8", "fp8")],
)
def test_what_is_priced_is_what_a_layer_launches(
    name: str, weights: str, activations: str, rows: int, decodes: bool
) -> None:
    three, two = (Counter(of_a_step(name, weights, activations, rows, layers, decodes)) for layers in (3, 2))
    assert priced(name, weights, activations, rows, decodes) == three - two


def test_a_step_of_prompts_and_generated_tokens_absorbs_queries_by_themselves() -> None:
    model = named_model_config("small4")
    assert model is not None
    shape = StepShape(*(64.0,) * 6, sampled=64.0)
    works = launched_work(model, model.cache_layout(64, "fp8"), NumberFormats(weights="fp8"), shape)
    found = {work.operation: work for work in works if work.num_bytes}
    assert {
        "latents_of",
        "linear_in",
        "apply_rope",
        "rotate_and_absorb",
        "mla_prefill",
        "mla_values",
    } <= found.keys()
    assert "absorbed_queries" not in found
