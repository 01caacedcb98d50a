"""abi.h in ctypes: one structure of arguments per operation. Fields, order and letters as there."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
FORMATS = {"float32": 0, "bf16": 1, "int8": 2, "int4": 3, "nvfp4": 4}
KV_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


def _fields(text: str) -> list[tuple[str, type]]:
    """`"p: x weight | i64: rows width | f32: eps | i32: dtype"` -> the fields, in this order."""
    kinds = {"p": c_void_p, "i64": c_int64, "i32": c_int32, "f32": c_float}
    found: list[tuple[str, type]] = []
    for part in text.split("|"):
        kind, _, names = part.partition(":")
        found += [(name, kinds[kind.strip()]) for name in names.split()]
    return found


class Matrix(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: data | i64: experts n k expert_bytes | i32: format paired")


class NormArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: x | i64: rows width x_stride | p: residual | i64: residual_stride | p: weight out | i64: out_stride"
        "| f32: eps | i32: dtype"
    )


class RopeArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: x | i64: rows heads width turned row_stride head_stride | p: cos sin scale | i32: interleaved dtype"
    )


class RopeTablesArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: positions | i64: rows | p: inv_freq | i64: width | p: cos sin | f32: magnitude")


class LinearArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: x | i64: rows x_stride | p: weight out | i64: out_stride | i32: dtype out_dtype")


class GatedMlpArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: x | i64: rows x_stride | p: gate_up down out | i64: out_stride | i32: dtype")


class RouteArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: x | i64: rows x_stride | p: weight | i64: top_k groups top_groups | p: ids weights"
        "| f32: scale | i32: renormalise dtype"
    )


class GroupArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: ids | i64: pairs experts | p: order starts")


class ExpertMlpArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: x | i64: rows x_stride | p: gate_up down shared_gate_up shared_down weights | i64: slots"
        "| p: order starts out | i64: out_stride | i32: dtype"
    )


class PagedArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: query_starts context_lengths table_rows block_tables | i64: segments table_stride block_tokens rows"
    )


class WriteLatentsArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: pages slots | i64: rows rank rope | p: latents | i64: latent_stride | p: rope_keys | i64: rope_stride"
        "| i32: kv_format dtype"
    )


class WriteKeysValuesArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: key_pages value_pages slots | i64: rows heads width | p: keys values | i64: key_stride value_stride"
        "| i32: kv_format dtype"
    )


class WriteNormedLatentsArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: pages slots | i64: rows rank rope | p: kv | i64: kv_stride | p: norm_weight cos sin | f32: eps"
        "| i32: interleaved kv_format dtype"
    )


class RotateAndWriteArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: key_pages value_pages slots | i64: rows query_heads kv_heads width | p: qkv | i64: qkv_stride"
        "| p: cos sin | i32: interleaved kv_format dtype"
    )


class MlaAbsorbArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: q | i64: rows q_stride nope rope | p: w_uk out | i32: dtype")


class MlaUnabsorbArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: latents | i64: rows row_stride head_stride | p: w_uv out | i32: dtype")


class MlaDecodeArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = [
        *_fields("p: q | i64: heads rank rope q_stride q_head_stride | p: pages"),
        ("paged", PagedArgs),
        *_fields("p: out | f32: scale | i32: kv_format dtype"),
    ]


class MlaPrefillArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = [
        *_fields("p: q | i64: heads rank rope nope value_width q_stride q_head_stride | p: pages w_uk w_uv"),
        ("paged", PagedArgs),
        *_fields("p: out | f32: scale | i32: kv_format dtype"),
    ]


class GqaArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = [
        *_fields("p: q | i64: query_heads kv_heads width q_stride q_head_stride | p: key_pages value_pages"),
        ("paged", PagedArgs),
        *_fields("p: out | f32: scale | i32: kv_format dtype"),
    ]


class ImageAttentionArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: q keys values | i64: rows heads width q_stride k_stride v_stride | p: out | f32: scale | i32: dtype"
    )


class GeluArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: x | i64: rows width x_stride | p: out | i32: dtype")


class PackArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: source | i64: experts n k expert_stride row_stride column_stride | p: target | i64: expert_bytes"
        "| p: refused | i32: format paired dtype"
    )


class ReadMemoryArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: values | i64: count | p: sum")


class PackNvfp4Args(ctypes.Structure):
    """One expert's NVFP4 codes and scales, and where their packed form goes."""

    _fields_ = _fields("p: codes scales whole | i64: n k | p: target | i32: paired")


class PeaksArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: logits | i64: rows vocab stride | p: values ids")


class LogProbabilitiesArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: logits | i64: rows vocab stride | p: out")


class TopTokensArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: scores | i64: rows vocab stride count | p: values ids")


class DrawArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: logits | i64: rows vocab stride| p: temperatures top_ks top_ps min_ps seeds samples positions token_ids"
    )


class PenaltiesArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: logits | i64: rows vocab stride entries"
        "| p: at_rows token_ids output_counts repetition presence frequency wrong"
    )


class MaskBitsArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: logits | i64: rows vocab stride entries | p: at_rows bits wrong")


class BlockInput(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: x residual out | i64: rows hidden | i32: dtype kv_format")


class StepArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = [
        *_fields("p: cos sin query_scale slots | i64: num_expanded"),
        ("expanded", PagedArgs),
        ("absorbed", PagedArgs),
        *_fields("p: expert_ids"),
    ]


class MlaLayer(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: norm down query_norm query_up kv_norm w_uk w_uk_t w_uv output | i64: heads nope rope rank value_width"
        "| f32: eps latent_eps scale | i32: interleaved"
    )


class MlaBlockArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = [("input", BlockInput), *_fields("p: layer step pages")]


class GqaLayer(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: norm qkv output | i64: query_heads kv_heads width | f32: eps scale")


class GqaBlockArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = [("input", BlockInput), *_fields("p: layer step key_pages value_pages")]


class MlpLayer(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: norm gate_up down | f32: eps")


class MlpBlockArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = [("input", BlockInput), *_fields("p: layer")]


class MoeLayer(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: norm router gate_up down shared_gate_up shared_down | i64: top_k groups top_groups"
        "| f32: eps scale | i32: renormalise"
    )


class MoeBlockArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = [("input", BlockInput), *_fields("p: layer expert_ids")]


class LayerHalf(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields("p: layer pages value_pages | i32: kind")


class DecoderModel(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: embedding | i64: vocab hidden | p: halves | i64: count | p: final_norm head | f32: eps"
        "| i32: dtype kv_format"
    )


class DecoderArgs(ctypes.Structure):
    """As in abi.h."""

    _fields_ = _fields(
        "p: model token_ids | i64: rows | p: step logit_rows | i64: logit_count | p: logits image_rows"
        "| p: image_embeddings | i64: image_count"
    )
