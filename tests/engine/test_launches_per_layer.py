"""Launches of a layer in a decode step, by a dry run of models of full width: what a recorded graph's nodes are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cierzo.bench.gpu import served
from cierzo.cache.pool import KVPool
from cierzo.engine import device_memory
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


def of_a_layer(name: str, weights: str, activations: str, sequences: int) -> list[str]:
    """What the second of two layers launches, in order."""
    options = {"activations": activations, "kv_dtype": "fp8", "layers": 2, "max_running": 64}
    config = served.make_config(name, weights, **options)
    pool = KVPool(config.layout, 1, META)
    model = served.make_model(config, META)
    (rows, logit_rows), *_ = (
        step
        for step in launches.steps(config.scheduler, config.cache.block_tokens, [sequences], 4096)
        if not step[0].num_expanded and len(step[0].absorbed.contexts) == sequences
    )
    found = [one.kernel.name for one in dry_run(model.logits, rows, pool, logit_rows)]
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
