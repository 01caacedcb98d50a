"""The vision tower that config.json or params.json describes -> `VisionConfig`. No torch here.

A tower that is there and cannot be computed is refused, with the way to serve the text model alone. Some towers are
not read, and their models take text only: those of `llava` and `llava_next`, and Pixtral 12B's, which merges no
patches.
Source: transformers' `PixtralVisionConfig` and `Mistral3Config`; vLLM's pixtral.py.
"""

from __future__ import annotations

from cierzo.engine.checkpoint_format import TEXT_ONLY
from cierzo.engine.errors import CheckpointError
from cierzo.engine.fields import Fields
from cierzo.engine.model.config import VisionConfig
from cierzo.engine.model.config_defaults import PIXTRAL, ROPE_THETA

BREAK_TOKEN_ID, END_TOKEN_ID = 12, 13  # of every tokenizer of these models; config.json does not say them


def read_pixtral(outer: Fields, norm_eps: float) -> VisionConfig | None:
    """The tower of a `mistral3` config.json, whose defaults are filled in; None where there is no vision_config, or
    one that says no more than its type: checkpoints of the text model alone are wrapped so.

    norm_eps: of the text model, whose value transformers gives the projector's norm. Raises CheckpointError.
    """
    stated = outer.get("vision_config", None)
    if not stated or stated == {"model_type": "pixtral"}:
        return None
    try:
        outer.only("projector_hidden_act", ("gelu",))
        outer.only("vision_feature_layer", (-1, [-1]))
        outer.only("multimodal_projector_bias", (False,))
        merge, image_token_id = outer.integer("spatial_merge_size"), outer.integer("image_token_index", minimum=0)
        fields = outer.section("vision_config")
        fields.only("model_type", ("pixtral",), default="pixtral")
        fields.fill_in(PIXTRAL)
        fields.only("hidden_act", ("silu", "swish"))
        rope = fields.optional_section("rope_parameters")
        rope.only("rope_type", ("axial", "default"), default="axial")
        source = rope if rope.has("rope_theta") else fields
        return VisionConfig(
            **_sizes(fields),
            merge=merge,
            max_side_px=fields.integer("image_size"),
            rope_theta=source.number("rope_theta", ROPE_THETA, minimum=1.0),
            projector_norm_eps=norm_eps,
            image_token_id=image_token_id,
            break_token_id=BREAK_TOKEN_ID,
            end_token_id=END_TOKEN_ID,
        )
    except CheckpointError as error:
        raise _with_remedy(error) from None


def read_encoder(params: Fields, norm_eps: float) -> VisionConfig | None:
    """The tower of a params.json; None without `vision_encoder`, and where it merges no patches (Pixtral 12B).

    norm_eps: of the text model. Raises CheckpointError, also for a field that is unknown.
    """
    encoder = params.get("vision_encoder", None)
    if not isinstance(encoder, dict) or not encoder.get("mm_projector_id"):
        return None
    fields = params.section("vision_encoder")
    try:
        fields.only("mm_projector_id", ("patch_merge",))
        fields.only("adapter_bias", (False,))  # vLLM has biases where it is not said, and no norm
        fields.only("add_pre_mm_projector_layer_norm", (True,))
        longest = fields.integer("image_size")
        config = VisionConfig(
            **_sizes(fields),
            merge=fields.integer("spatial_merge_size"),
            max_side_px=fields.integer("max_image_size", longest),
            rope_theta=fields.number("rope_theta", minimum=1.0),
            projector_norm_eps=norm_eps,
            image_token_id=fields.integer("image_token_id", minimum=0),
            break_token_id=fields.integer("image_break_token_id", BREAK_TOKEN_ID, minimum=0),
            end_token_id=fields.integer("image_end_token_id", END_TOKEN_ID, minimum=0),
        )
        fields.refuse_unread(())
    except CheckpointError as error:
        raise _with_remedy(error) from None
    return config


def _sizes(fields: Fields) -> dict[str, int]:
    """The fields that both files name alike."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden % heads or hidden // heads % 4:  # a quarter of the values turns by a row, in pairs
        raise fields.error("num_attention_heads", heads, f"a divisor of {hidden}, into heads of a multiple of 4")
    fields.only("head_dim", (hidden // heads, None), default=None)
    fields.only("num_channels", (3,))
    return {
        "hidden_size": hidden,
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": heads,
        "mlp_width": fields.integer("intermediate_size"),
        "patch": fields.integer("patch_size"),
    }


def _with_remedy(error: CheckpointError) -> CheckpointError:
    return CheckpointError(f"{error.message}; {TEXT_ONLY}", field=error.field, limit=error.limit, value=error.value)
