"""The rotary embedding's settings, in both spellings that checkpoints use, as transformers 5.23 reads them.

New: `rope_parameters` {rope_theta, rope_type, ...}. Old: `rope_theta` beside a `rope_scaling` that is null or
{rope_type or type, ...}. Where both are there, `rope_scaling` replaces the whole of `rope_parameters`
(`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`).
"""

from __future__ import annotations

import math

import msgspec

from cierzo.engine.fields import Fields
from cierzo.engine.model.config_defaults import ROPE_THETA


class YarnConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="yarn"):
    """YaRN's blend of frequencies by how often a pair turns; `magnitude` multiplies cos and sin."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    magnitude: float


class Llama3Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="llama3"):
    """Llama 3.1's blend of frequencies by wavelength: those shorter than original_positions / high_freq_factor
    stay, those longer than original_positions / low_freq_factor are divided by `factor`."""

    factor: float
    original_positions: int
    low_freq_factor: float
    high_freq_factor: float


class LinearConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="linear"):
    """Every frequency divided by `factor`."""

    factor: float


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dim` values of each head rotate, in pairs (2i, 2i+1) if `interleaved`, else (i, i + dim/2)."""

    dim: int
    theta: float
    interleaved: bool
    scaling: YarnConfig | Llama3Config | LinearConfig | None


def read_rope(fields: Fields, *, dim: int, interleaved: bool, rotated_share: float) -> tuple[RopeConfig, Fields]:
    """The rope settings, and the object they were read from (mistral4 keeps its query scaling there too).

    `rotated_share` is the share of a head's values that rotate: a partial_rotary_factor must agree with it.
    """
    parameters = fields.optional_section("rope_scaling" if fields.get("rope_scaling", None) else "rope_parameters")
    for holder in (parameters, fields):
        if holder.has("partial_rotary_factor"):
            share = holder.number("partial_rotary_factor")
            if not math.isclose(share, rotated_share):
                raise holder.error("partial_rotary_factor", share, f"{rotated_share:g}")
    for layer_type in ("full_attention", "sliding_attention"):  # settings of their own for some of the layers
        parameters.only(layer_type, (None,), default=None)
    theta = parameters if parameters.has("rope_theta") else fields
    rope = RopeConfig(
        dim=dim,
        theta=theta.number("rope_theta", ROPE_THETA, minimum=1.0),
        interleaved=interleaved,
        scaling=_scaling(fields, parameters),
    )
    return rope, parameters


def _scaling(fields: Fields, parameters: Fields) -> YarnConfig | Llama3Config | LinearConfig | None:
    spelling = "rope_type" if parameters.has("rope_type") else "type"
    kind = parameters.string(spelling, "default")
    match kind:
        case "default":
            return None
        case "linear":
            factor = parameters.number("factor", minimum=1.0)
            return None if factor == 1.0 else LinearConfig(factor=factor)
        case "llama3":
            return _llama3(fields, parameters)
        case "yarn":
            return _yarn(fields, parameters)
    raise parameters.error(spelling, kind, "default, linear, llama3 or yarn (others unsupported)")


def _original_positions(fields: Fields, parameters: Fields) -> int:
    """The length that the model was trained at: all of it where none is said."""
    outside = fields.has("original_max_position_embeddings")  # Phi-3's place for it, which transformers prefers
    longest = fields.integer("max_position_embeddings")
    return (fields if outside else parameters).integer("original_max_position_embeddings", longest)


def _llama3(fields: Fields, parameters: Fields) -> Llama3Config:
    low = parameters.number("low_freq_factor")
    if low <= 0.0:
        raise parameters.error("low_freq_factor", low, "above 0")
    high = parameters.number("high_freq_factor")
    if high <= low:
        raise parameters.error("high_freq_factor", high, f"above low_freq_factor {low:g}")
    return Llama3Config(
        factor=parameters.number("factor", minimum=1.0),
        original_positions=_original_positions(fields, parameters),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(fields: Fields, parameters: Fields) -> YarnConfig:
    parameters.only("truncate", (True,), default=True)
    longest = fields.integer("max_position_embeddings")
    original = _original_positions(fields, parameters)
    unsaid = parameters.get("factor") is None  # null: as far as the model goes
    factor = longest / original if unsaid else parameters.number("factor", minimum=1.0)
    return YarnConfig(
        factor=factor,
        original_positions=original,
        beta_fast=_positive(parameters, "beta_fast", 32.0),
        beta_slow=_positive(parameters, "beta_slow", 1.0),
        magnitude=_magnitude(parameters, factor),
    )


def _positive(parameters: Fields, name: str, default: float) -> float:
    """A number; the default where it is missing, null or 0."""
    return parameters.number(name) if parameters.get(name, None) else default


def _magnitude(parameters: Fields, factor: float) -> float:
    """The factor on cos and sin (transformers' `_compute_yarn_parameters`): given, or a ratio that is 1 for
    mscale = mscale_all_dim, or YaRN's own 0.1 ln(factor) + 1. Small 4's published form and the form with
    attention_factor 1.0 both give 1."""
    if parameters.has("attention_factor"):
        return parameters.number("attention_factor")
    mscale = parameters.number("mscale", 0.0) if parameters.has("mscale") else 0.0
    all_dim = parameters.number("mscale_all_dim", 0.0) if parameters.has("mscale_all_dim") else 0.0
    log = 0.1 * math.log(max(factor, 1.0))
    if mscale and all_dim:
        return (mscale * log + 1.0) / (all_dim * log + 1.0)
    return log + 1.0
