"""Checkpoint spellings -> the one spelling that models use: `model.layers.N...`, `lm_head.weight`.

A quantised matrix has companions beside it (companions.py), which are no parameters of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from cierzo.engine.checkpoint_format import CheckpointFormat
from cierzo.engine.errors import CheckpointError
from cierzo.engine.weights.companions import Role, is_of_cache, owner_of, without_ending

# A multimodal checkpoint nests the text model: as Mistral 3 and LLaVA are published, and as transformers 5 has it.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
VISION = ("vision_tower.", "multi_modal_projector.")  # as the models name them
PATCHES = "vision_tower.patch_conv.weight"  # that every tower has
_VISION = {
    "hf": (*VISION, "image_newline", *(f"model.{prefix}" for prefix in VISION), "model.image_newline"),
    "native": ("vision_encoder.", "vision_language_adapter.", "pre_mm_projector_norm.", "patch_merger."),
}
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_STACKS = (".experts.gate_up_proj", ".experts.down_proj")  # of all experts' matrices: without ".weight"
_FUSED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
_INV_FREQ = ".rotary_emb.inv_freq"  # old llama checkpoints store this buffer; it follows from the config

_NATIVE_OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_NATIVE_INNER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "gate": "mlp.gate",
}
_NATIVE_MLPS = {"feed_forward": "mlp", "shared_experts": "mlp.shared_experts"}
_NATIVE_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_NATIVE_INNER |= {f"{a}.{w}": f"{b}.{p}" for a, b in _NATIVE_MLPS.items() for w, p in _NATIVE_PARTS.items()}
_NATIVE_VISION = {
    "vision_encoder.patch_conv": "vision_tower.patch_conv",
    "vision_encoder.ln_pre": "vision_tower.ln_pre",
    "pre_mm_projector_norm": "multi_modal_projector.norm",
    "patch_merger.merging_layer": "multi_modal_projector.patch_merger.merging_layer",
    "vision_language_adapter.w_in": "multi_modal_projector.linear_1",
    "vision_language_adapter.w_out": "multi_modal_projector.linear_2",
}
_NATIVE_TOWER = {
    **{name: name for name in ("attention_norm", "ffn_norm")},
    **{f"attention.w{letter}": f"attention.{letter}_proj" for letter in "qkvo"},
    **{f"feed_forward.{native}": f"feed_forward.{part}" for native, part in _NATIVE_PARTS.items()},
}
_TOWER_LAYER = re.compile(r"vision_(?:encoder|tower)\.transformer\.layers\.(\d+)\.(.+)")
_NATIVE_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_NATIVE_EXPERT = re.compile(r"experts\.(\d+)\.(w[123])")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(slots=True)
class NameMap:
    """Where each parameter comes from; every tensor of the checkpoint is in exactly one of the fields but `vision`.

    whole: parameter -> its tensor.
    experts: fused parameter -> {(expert, part): tensor}, for checkpoints that keep each expert's matrices apart.
        Part 0 and 1 of `gate_up_proj` are the gate's and the up projection's rows; `down_proj` has part 0 alone.
    companions: tensor of a quantised matrix -> {role: tensor}. The matrix itself may be missing.
    vision: tensors of the vision tower and its projector, of which a model that sees has some in the other fields.
    ignored: buffers that follow from the config, and scales of keys and values, which are not stored so.
    """

    format: CheckpointFormat
    whole: dict[str, str] = field(default_factory=dict)
    experts: dict[str, dict[tuple[int, int], str]] = field(default_factory=dict)
    companions: dict[str, dict[Role, str]] = field(default_factory=dict)
    vision: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def map_names(names: Iterable[str], format: CheckpointFormat, sees: bool = False) -> NameMap:
    """Sort tensor names; raises CheckpointError when two of them are the same parameter. sees: the model has the
    vision tower, whose tensors are sorted like the others'."""
    mapped, present = NameMap(format), set(names := list(names))
    for name in names:
        if name.startswith(_VISION[format.layout]):
            mapped.vision.append(name)
            if not sees:
                continue
        if name.endswith(_INV_FREQ) or is_of_cache(name, format):
            mapped.ignored.append(name)
        elif (owner := owner_of(name, format, present)) is not None:
            mapped.companions.setdefault(owner[0], {})[owner[1]] = name
        else:
            _place(mapped, name, plain_name(name, format))
    return mapped


def native_name(name: str) -> str:
    """The native spelling of a parameter ("model.layers.0.mlp.gate.weight" -> "layers.0.gate.weight"). Experts are
    named one by one: "model.layers.0.mlp.experts.3.up_proj.weight". Raises KeyError for an unknown one."""
    stem, dot, suffix = name.rpartition(".")
    if name.startswith(VISION):
        return _native_vision(stem) + dot + suffix
    layer = _HF_LAYER.fullmatch(stem)
    if layer is None:
        return {hf: native for native, hf in _NATIVE_OUTER.items()}[stem] + dot + suffix
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", layer[2])
    if expert is not None:
        part = {hf: native for native, hf in _NATIVE_PARTS.items()}[expert[2]]
        return f"layers.{layer[1]}.experts.{expert[1]}.{part}{dot}{suffix}"
    return f"layers.{layer[1]}." + {hf: native for native, hf in _NATIVE_INNER.items()}[layer[2]] + dot + suffix


def _native_vision(stem: str) -> str:
    layer = _TOWER_LAYER.fullmatch(stem)
    if layer is None:
        return {hf: native for native, hf in _NATIVE_VISION.items()}[stem]
    inner = {hf: native for native, hf in _NATIVE_TOWER.items()}[layer[2]]
    return f"vision_encoder.transformer.layers.{layer[1]}.{inner}"


def plain_name(name: str, format: CheckpointFormat) -> str:
    """The models' name of a tensor; an unknown one stays as it is, and has no place in any model."""
    if format.layout == "native":
        stem = without_ending(name, format)
        return name if stem == name else _plain_native(stem) + ".weight"
    stem = without_ending(name, format)
    if stem.endswith(_STACKS) and format.quantisation.groups:
        name = stem
    elif stem != name:
        name = stem + ".weight"
    for prefix, plain in _PREFIXES:
        if name.startswith(prefix):
            return plain + name[len(prefix) :]
    return name


def _plain_native(stem: str) -> str:
    layer = _NATIVE_LAYER.fullmatch(stem)
    if layer is None:
        tower = _TOWER_LAYER.fullmatch(stem)
        if tower is not None and tower[2] in _NATIVE_TOWER:
            return f"vision_tower.transformer.layers.{tower[1]}.{_NATIVE_TOWER[tower[2]]}"
        return _NATIVE_OUTER.get(stem) or _NATIVE_VISION.get(stem, stem)
    expert = _NATIVE_EXPERT.fullmatch(layer[2])
    if expert is not None:
        return f"model.layers.{layer[1]}.mlp.experts.{expert[1]}.{_NATIVE_PARTS[expert[2]]}"
    return f"model.layers.{layer[1]}.{_NATIVE_INNER[layer[2]]}" if layer[2] in _NATIVE_INNER else stem


def _place(mapped: NameMap, name: str, plain: str) -> None:
    match = _EXPERT.fullmatch(plain)
    if match is None:
        earlier = mapped.whole.setdefault(plain, name)
    else:
        fused, part = _FUSED[match[3]]
        parts = mapped.experts.setdefault(f"{match[1]}.{fused}", {})
        earlier = parts.setdefault((int(match[2]), part), name)
    if earlier != name:
        raise CheckpointError(f"tensors {earlier} and {name} are the same parameter", field=name)
