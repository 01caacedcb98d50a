"""Vision towers as config.json and params.json describe them, and descriptions that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import transformers
from tiny_folders import changed, write_config
from vision_oracle import BREAK, ENCODER, END, IMAGE

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.config import VisionConfig
from cierzo.engine.model.config_defaults import PIXTRAL, ROPE_THETA, WRAPPERS
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.published import native_params
from cierzo.engine.weights.shapes import shape_of
from cierzo.engine.weights.vision_shapes import vision_shape_of

TEXT = shape_of("small4", "full").config("bfloat16")
OUTER: dict[str, Any] = vision_shape_of("full").around(TEXT)
TOWER: dict[str, Any] = OUTER["vision_config"]
NOTHING: dict[str, Any] = {}
REMEDY = "; --text-only serves the text model alone"
SMALL4 = VisionConfig(  # model.md 1.7
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    mlp_width=4096,
    patch=14,
    merge=2,
    max_side_px=1540,
    rope_theta=10000.0,
    projector_norm_eps=1e-6,
    image_token_id=IMAGE,
    break_token_id=BREAK,
    end_token_id=END,
)


def read_hf(folder: Path, tower: Any = NOTHING, text_only: bool = False, **outer: Any) -> VisionConfig | None:
    """A reading of Small 4's config.json with changes; `...` takes a field out."""
    inner = changed(TOWER, tower) if isinstance(tower, dict) else tower
    values = changed(OUTER | {"vision_config": inner}, outer)
    return read_model_config(write_config(folder, values), text_only).vision


def read_native(folder: Path, text_only: bool = False, **changes: Any) -> VisionConfig | None:
    """A reading of Small 4's params.json, with changes to its vision_encoder."""
    encoder = changed(vision_shape_of("full").encoder(), changes)
    params = native_params(TEXT) | {"vision_encoder": encoder}
    (folder / "params.json").write_bytes(msgspec.json.encode(params))
    return read_model_config(folder, text_only).vision


def test_both_files_tell_the_published_tower(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    assert read_hf(tmp_path / "hf") == read_native(tmp_path / "native") == SMALL4
    assert (SMALL4.head_dim, SMALL4.unit_px, SMALL4.num_parameters(4096)) == (64, 28, 428_472_320)
    assert SMALL4.num_parameters(5120) == 438_958_080


def test_defaults_are_those_of_transformers() -> None:
    theirs = transformers.PixtralVisionConfig()
    assert {name: getattr(theirs, name) for name in PIXTRAL} == PIXTRAL
    assert theirs.rope_parameters["rope_theta"] == ROPE_THETA
    outer = transformers.Mistral3Config()
    assert {name: getattr(outer, name) for name in WRAPPERS["mistral3"]} == WRAPPERS["mistral3"]


def test_older_spellings_are_the_same(tmp_path: Path) -> None:
    """As Small 3.1 was published: the base beside the sizes, and what is default left out."""
    tower = {"rope_parameters": ..., "rope_theta": 10000.0, "num_channels": ..., "model_type": "pixtral"}
    left_out = dict.fromkeys(("image_token_index", "spatial_merge_size", "projector_hidden_act"), ...)
    assert read_hf(tmp_path, tower, **left_out, vision_feature_layer=[-1]) == SMALL4
    found = read_hf(tmp_path, {"rope_parameters": {"rope_theta": 500.0}})
    assert found is not None
    assert found.rope_theta == 500.0


def test_a_type_alone_is_no_tower(tmp_path: Path) -> None:
    """As folders of the text model alone are wrapped."""
    assert read_hf(tmp_path, vision_config={"model_type": "pixtral"}) is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tower": {"model_type": "siglip_vision_model"}}, "vision_config.model_type"),
        ({"tower": {"hidden_act": "gelu"}}, "vision_config.hidden_act"),
        ({"tower": {"hidden_act": ...}}, "vision_config.hidden_act"),  # the class has gelu
        ({"tower": {"num_attention_heads": 24}}, "vision_config.num_attention_heads"),
        ({"tower": {"head_dim": 32}}, "vision_config.head_dim"),
        ({"tower": {"num_channels": 4}}, "vision_config.num_channels"),
        ({"tower": {"patch_size": [14, 16]}}, "vision_config.patch_size"),
        ({"tower": {"rope_parameters": {"rope_type": "yarn"}}}, "vision_config.rope_parameters.rope_type"),
        ({"tower": [1]}, "vision_config"),
        ({"vision_feature_layer": -2}, "vision_feature_layer"),
        ({"vision_feature_layer": [-1, 3]}, "vision_feature_layer"),
        ({"multimodal_projector_bias": True}, "multimodal_projector_bias"),
        ({"projector_hidden_act": "gelu_pytorch_tanh"}, "projector_hidden_act"),
        ({"spatial_merge_size": 0}, "spatial_merge_size"),
    ],
)
def test_another_tower_is_refused_unless_it_is_left_aside(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} is .*{REMEDY}") as caught:
        read_hf(tmp_path, **changes)
    assert caught.value.field == field
    assert read_hf(tmp_path, **changes, text_only=True) is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mm_projector_id": "perceiver"}, "mm_projector_id"),
        ({"adapter_bias": True}, "adapter_bias"),
        ({"adapter_bias": ...}, "adapter_bias"),
        ({"add_pre_mm_projector_layer_norm": False}, "add_pre_mm_projector_layer_norm"),
        ({"spatial_merge_size": ...}, "spatial_merge_size"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"deepstack_layers": [1]}, "deepstack_layers"),
    ],
)
def test_another_encoder_is_refused_unless_it_is_left_aside(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"params\.json: vision_encoder\.{field} is .*{REMEDY}") as caught:
        read_native(tmp_path, **changes)
    assert caught.value.field == f"vision_encoder.{field}"
    assert read_native(tmp_path, **changes, text_only=True) is None


def test_towers_that_are_not_used(tmp_path: Path) -> None:
    assert read_hf(tmp_path, None) is read_hf(tmp_path, vision_config=...) is None
    assert read_native(tmp_path, mm_projector_id=..., adapter_bias=True) is None  # Pixtral 12B
    assert read_native(tmp_path, mm_projector_id="") is None


def test_the_largest_side_and_the_ids_are_read(tmp_path: Path) -> None:
    found = read_native(tmp_path, max_image_size=980, image_break_token_id=20, image_end_token_id=21)
    assert found is not None
    assert (found.max_side_px, found.break_token_id, found.end_token_id) == (980, 20, 21)
    found = read_native(tmp_path, max_image_size=..., image_break_token_id=..., image_end_token_id=...)
    assert found is not None
    assert (found.max_side_px, found.break_token_id, found.end_token_id) == (1540, BREAK, END)
    found = read_hf(tmp_path, {"image_size": 560}, image_token_index=7)
    assert found is not None
    assert (found.max_side_px, found.image_token_id) == (560, 7)
    assert set(ENCODER) == set(vision_shape_of("tiny").encoder())
