"""Kernels of a vision tower on a GPU: those that images launch are compiled before a server is ready."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_engine import gpu_kernels, load
from vision_oracle import image

from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker import launches
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.registry import bind
from cierzo.kernels.triton.launch import Configuration, dry_run

META = torch.device("meta")


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with gpu_kernels(monkeypatch):
        yield


def tiny(folder: Path) -> EngineConfig:
    made = make_checkpoint(folder / "model", like="small3", vision=True)
    return resolve(
        EngineOptions(model=str(made), max_running=2, budget_tokens=4, max_model_len=32, kv_cache_gib=0.01)
    )


def test_images_launch_what_is_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path)
    model = load(config, "fp8", "bf16")
    found = launches.launches(config, model.weights).configurations
    assert {"image_attend", "gelu", "apply_rope"} <= {one.name for one in found}
    keys, launched = {one.key for one in found}, set[str]()
    monkeypatch.setattr("gpu_engine.CPU", META)
    tower = load(config, "fp8", "bf16").tower
    assert tower is not None
    for rows, columns in ((1, 1), (1, 2), (3, 5), (1, 55), (31, 33), (55, 55)):
        seen = dry_run(tower.embed, torch.empty(28 * rows, 28 * columns, 3, device=META))
        launched |= {one.kernel.key for one in seen if isinstance(one.kernel, Configuration)}
    assert launched
    assert launched <= keys


def test_an_image_is_seen_as_by_the_reference(tmp_path: Path) -> None:
    model, pixels = load(tiny(tmp_path), "fp8", "bf16"), image(1, 2)
    assert model.tower is not None
    found = model.tower.embed(pixels)
    bind(KernelsConfig(instruction_set="reference"), "cpu")
    expected = model.tower.embed(pixels)
    assert (found - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()
