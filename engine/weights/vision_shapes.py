"""Shape of the vision tower of Small 3.1, 3.2 and 4, at true size and in proportion. No torch here.

Names, shapes and config keys are those of the published folders, which transformers 5.23 reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from cierzo.engine.fields import Fields
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.config_json import parse_config
from cierzo.engine.weights.shapes import NamedShape, factor_of, named_model_config, shape_of

IMAGE_TOKEN_ID = 10
PATCH, MERGE, MAX_SIDE_PX = 14, 2, 1540
_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A tower with its projector (true size: model.md 1.7). Heads of 64 values, an MLP of four times the width."""

    num_heads: int = 16
    num_layers: int = 24

    @property
    def hidden_size(self) -> int:
        """Width of the tower."""
        return 64 * self.num_heads

    def tensors(self, text_width: int) -> Iterator[NamedShape]:
        """(name, shape) of every parameter; text_width: hidden size of the text model."""
        hidden, width = self.hidden_size, 4 * self.hidden_size
        yield "vision_tower.patch_conv.weight", (hidden, 3, PATCH, PATCH)
        yield "vision_tower.ln_pre.weight", (hidden,)
        for layer in range(self.num_layers):
            prefix = f"vision_tower.transformer.layers.{layer}"
            yield f"{prefix}.attention_norm.weight", (hidden,)
            yield from ((f"{prefix}.attention.{name}_proj.weight", (hidden, hidden)) for name in "qkvo")
            yield f"{prefix}.ffn_norm.weight", (hidden,)
            yield from ((f"{prefix}.feed_forward.{name}_proj.weight", (width, hidden)) for name in ("gate", "up"))
            yield f"{prefix}.feed_forward.down_proj.weight", (hidden, width)
        yield "multi_modal_projector.norm.weight", (hidden,)
        yield "multi_modal_projector.patch_merger.merging_layer.weight", (hidden, MERGE**2 * hidden)
        yield "multi_modal_projector.linear_1.weight", (text_width, hidden)
        yield "multi_modal_projector.linear_2.weight", (text_width, text_width)

    def around(self, text: Mapping[str, object]) -> dict[str, object]:
        """config.json, of Mistral 3 around that of a text model."""
        return {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "dtype": text["dtype"],
            "image_token_index": IMAGE_TOKEN_ID,
            "model_type": "mistral3",
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "spatial_merge_size": MERGE,
            "text_config": dict(text),
            "tie_word_embeddings": False,
            "vision_config": {
                **self._sizes(),
                "attention_dropout": 0.0,
                "head_dim": 64,
                "hidden_act": "silu",
                "initializer_range": 0.02,
                "model_type": "pixtral",
                "rope_parameters": {"rope_theta": _THETA, "rope_type": "axial"},
            },
            "vision_feature_layer": -1,
        }

    def encoder(self) -> dict[str, object]:
        """The `vision_encoder` of a params.json."""
        return {
            **self._sizes(),
            "adapter_bias": False,
            "add_pre_mm_projector_layer_norm": True,
            "image_break_token_id": 12,
            "image_end_token_id": 13,
            "image_token_id": IMAGE_TOKEN_ID,
            "max_image_size": MAX_SIDE_PX,
            "mm_projector_id": "patch_merge",
            "rope_theta": _THETA,
            "spatial_merge_size": MERGE,
        }

    def _sizes(self) -> dict[str, object]:
        return {
            "hidden_size": self.hidden_size,
            "image_size": MAX_SIDE_PX,
            "intermediate_size": 4 * self.hidden_size,
            "num_attention_heads": self.num_heads,
            "num_channels": 3,
            "num_hidden_layers": self.num_layers,
            "patch_size": PATCH,
        }


def vision_shape_of(scale: str | float) -> VisionShape:
    """The tower beside a text model of this scale, of which `shape_of` says more: heads and layers in proportion.

    Raises ConfigError for a factor outside (0, 1].
    """
    presets = {"tiny": VisionShape(2, 2), "mini": VisionShape(4, 6), "full": VisionShape()}
    if str(scale) in presets:
        return presets[str(scale)]
    whole, factor = VisionShape(), factor_of(scale, "vision_scale")
    return VisionShape(max(1, round(whole.num_heads * factor)), max(1, round(whole.num_layers * factor)))


def planned_model_config(name: str, text_only: bool) -> ModelConfig | None:
    """Give the config of a model by its name alone, as `named_model_config` does; small4's with its vision tower,
    unless its text alone is served. None for other names."""
    found = named_model_config(name)
    if name != "small4" or text_only or found is None:
        return found
    outer = VisionShape().around(shape_of(name, "full").config("bfloat16"))
    return msgspec.structs.replace(found, vision=parse_config(Fields(outer)).vision)
