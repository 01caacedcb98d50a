"""Checkpoint spellings -> the one spelling that models use: `model.layers.N...`, `lm_head.weight`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from cierzo.engine.errors import CheckpointError

# A multimodal checkpoint nests the text model: Mistral 3's published spelling, and that of transformers 5.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_FUSED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
_INV_FREQ = ".rotary_emb.inv_freq"  # old llama checkpoints store this buffer; it follows from the config


@dataclass(slots=True)
class NameMap:
    """Where each parameter comes from; every tensor of the checkpoint is in exactly one of the fields.

    whole: parameter -> its tensor.
    experts: fused parameter -> {(expert, part): tensor}, for checkpoints that keep each expert's matrices apart.
        Part 0 and 1 of `gate_up_proj` are the gate's and the up projection's rows; `down_proj` has part 0 alone.
    vision: tensors of the vision tower and its projector.
    ignored: buffers that follow from the config.
    """

    whole: dict[str, str] = field(default_factory=dict)
    experts: dict[str, dict[tuple[int, int], str]] = field(default_factory=dict)
    vision: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def map_names(names: Iterable[str]) -> NameMap:
    """Sort tensor names; raises CheckpointError when two of them are the same parameter."""
    mapped = NameMap()
    for name in names:
        if name.startswith(_VISION):
            mapped.vision.append(name)
        elif name.endswith(_INV_FREQ):
            mapped.ignored.append(name)
        else:
            _place(mapped, name, _plain(name))
    return mapped


def _plain(name: str) -> str:
    for prefix, plain in _PREFIXES:
        if name.startswith(prefix):
            return plain + name[len(prefix) :]
    return name


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
