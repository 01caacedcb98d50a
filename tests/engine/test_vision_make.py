"""Random checkpoints with a vision tower, in the layouts that Mistral publishes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from header_folders import VISION
from vision_oracle import image

from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.errors import CheckpointError, ConfigError
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.weights.shapes import shape_of
from cierzo.engine.weights.vision_shapes import vision_shape_of
from cierzo.engine.worker.runner import load_model

CASES = [("small4", "hf"), ("small4", "hf-fp8"), ("small4", "native-nvfp4"), ("small3", "hf"), ("small3", "native")]


@pytest.mark.parametrize(("like", "name"), CASES)
def test_they_are_served_with_their_tower(tmp_path: Path, like: str, name: str) -> None:
    folder = make_checkpoint(tmp_path / "made", like=like, checkpoint_format=name, vision=True)
    options, features = {"kv_cache_gib": 0.01, "max_model_len": 64}, []
    for weights in ("bf16", "int8", "int4"):  # of the text: the tower's stay plain
        config = resolve(EngineOptions(model=str(folder), weights=weights, **options))  # type: ignore[arg-type]
        tower = load_model(config)[0].tower
        assert tower is not None
        found = tower.embed(image(3, 2))
        assert (found.shape, found.dtype) == ((6, config.model.hidden_size), torch.bfloat16)
        assert found.isfinite().all()
        features.append(found)
    assert all(torch.equal(features[0], other) for other in features)
    config = resolve(EngineOptions(model=str(folder), text_only=True, **options))  # type: ignore[arg-type]
    assert load_model(config)[0].tower is None


@pytest.mark.parametrize("like", ["small4", "small3"])
def test_the_tower_has_its_published_size(tmp_path: Path, like: str) -> None:
    width = shape_of(like, "full").hidden_size
    sizes = [torch.Size(shape).numel() for _, shape in vision_shape_of("full").tensors(width)]
    assert len(sizes) == VISION
    assert sum(sizes) == {"small4": 428_472_320, "small3": 438_958_080}[like]  # model.md 1.8 and 1.11


def test_its_bytes_count_where_it_is_used(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "made", like="small4", vision=True)
    formats = NumberFormats(weights="int8", on_gpu=False)
    seeing, blind = (read_model_config(folder, text_only) for text_only in (False, True))
    tensors = vision_shape_of("tiny").tensors(seeing.hidden_size)
    parameters = sum(torch.Size(shape).numel() for _, shape in tensors)
    assert weight_bytes(seeing, formats) - weight_bytes(blind, formats) == 2 * parameters


def test_a_tower_that_is_not_whole_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """A config that tells of a tower, and no tensors of it."""
    folder = make_checkpoint(tmp_path / "made", like="small3", vision=True)
    without = make_checkpoint(tmp_path / "without", like="small3", checkpoint_format="hf")
    (without / "config.json").write_bytes((folder / "config.json").read_bytes())
    config = resolve(EngineOptions(model=str(without), kv_cache_gib=0.01))
    missing = (
        r"tensor vision_tower\.patch_conv\.weight is missing \(and 23 more\); --text-only serves the text model"
    )
    with pytest.raises(CheckpointError, match=missing):
        load_model(config)
    config = resolve(EngineOptions(model=str(without), kv_cache_gib=0.01, text_only=True))
    assert load_model(config)[0].tower is None


def test_a_tower_may_have_a_scale_of_its_own(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "made", like="small4", vision=True, vision_scale=0.125)
    vision = read_model_config(folder).vision
    assert vision is not None
    assert (vision.num_heads, vision.num_layers, read_model_config(folder).hidden_size) == (2, 3, 128)
    with pytest.raises(ConfigError, match="vision_scale must be tiny, mini, full or a number in"):
        make_checkpoint(tmp_path / "other", like="small4", vision=True, vision_scale="3")
