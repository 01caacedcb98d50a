"""The plan of a GPU's memory: weights by their formats, and a refusal with the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cierzo.cli import main
from cierzo.engine import device_memory
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.errors import ConfigError
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.shapes import shape_of

H100, H200 = 79 << 30, 139 << 30


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
    assert device_memory.kv_room_bytes(model, "nvfp4", H100) > 4 << 30
    assert device_memory.kv_room_bytes(model, "fp8", H200) > 12 << 30
    with pytest.raises(ConfigError, match=r"the GPU has 79.0 GiB free; weights in fp8 take 11\d.\d GiB"):
        device_memory.kv_room_bytes(model, "fp8", H100)


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
    told = "cierzo: config_error: the GPU has 16.0 GiB free; weights in nvfp4 take 64.5 GiB, workspaces 4: nothing"
    assert capsys.readouterr().err.startswith(told)


def test_without_a_driver_nothing_is_known() -> None:
    if device_memory.free_bytes() is not None:
        pytest.skip("there is a GPU")
    assert device_memory.free_bytes() is None
