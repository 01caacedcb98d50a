"""Description and size of a checkpoint, from config and headers alone. No torch, no tensor data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cierzo.engine.checkpoint_format import (
    ADAPTER_REMEDY,
    CheckpointFormat,
    adapter_files,
    find_layout,
    found_layouts,
    left_aside,
)
from cierzo.engine.errors import CheckpointError, size
from cierzo.engine.fields import naming_unreadable
from cierzo.engine.model.config import GqaConfig, MlaConfig, ModelConfig, VisionConfig
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.companions import num_weights
from cierzo.engine.weights.headers import TensorInfo, read_checkpoint_headers, read_tensors
from cierzo.engine.weights.names import NameMap, map_names

if TYPE_CHECKING:  # imports torch
    from cierzo.engine.parameters import ParameterSpec

# The first that a parameter's name contains is its component.
_COMPONENTS = (
    ("embed_tokens", "embedding"),
    ("lm_head", "output head"),
    ("norm", "norms"),
    (".self_attn.", "attention"),
    (".shared_experts.", "shared experts"),
    (".mlp.experts", "routed experts"),
    (".mlp.gate.", "routers"),
    (".mlp.", "dense MLP"),
)
LABEL_WIDTH = 18
Rows = Iterable[tuple[str, str]]
SpecsOf = Callable[[ModelConfig], "Mapping[str, ParameterSpec]"]


class ComponentSize(msgspec.Struct, frozen=True):
    """Stored parameters of one component, and how many of them one token's computation uses."""

    name: str
    parameters: int
    active_parameters: int
    num_bytes: int


class CheckpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint's architecture and sizes, as far as they can be read; `str()` is what `cierzo info` prints.

    layouts: those that are there whole, the one that is read first. format, model: None where they cannot be read;
    then there are no components. stored: bytes by the dtypes of the tensors. activation_scales: how many there are.
    notes: sentences on how quantised weights are served.
    """

    folder: str
    layouts: tuple[str, ...]
    format: str | None
    model: ModelConfig | None
    components: tuple[ComponentSize, ...]
    stored: dict[str, int]
    num_tensors: int
    num_shards: int
    vision_tensors: int
    vision_bytes: int
    activation_scales: int
    notes: tuple[str, ...]
    kv_bytes_per_token: int
    adapters: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """All stored parameters."""
        return sum(component.parameters for component in self.components)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token's computation uses: of the embedding one row, counted as none."""
        return sum(component.active_parameters for component in self.components)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.stored.values())

    def __str__(self) -> str:
        return as_text(self.rows())

    def rows(self) -> Rows:
        """Labels and what is printed beside them."""
        if self.format is not None:
            yield "format", self.format
        if len(self.layouts) > 1:
            yield "layouts", f"{' and '.join(self.layouts)}; {self.layouts[0]} is read, the other left aside"
        if self.model is not None:
            yield from _model_rows(self.model)
        if self.num_tensors:
            yield "tensors", f"{self.num_tensors:,} in {self.num_shards} file(s), {size(self.num_bytes)}"
            yield "stored as", ", ".join(f"{dtype} {size(held)}" for dtype, held in self.stored.items())
        if self.activation_scales:
            what = "used only with --weights fp8 --activations fp8 on a GPU, else ignored"
            yield "activations", f"{self.activation_scales:,} scales of them are stored: {what}"
        for note in self.notes:
            yield "quantisation", note
        yield from self._component_rows()
        if self.model is not None:
            yield "KV cache", f"{self.kv_bytes_per_token:,} bytes per token in bfloat16"
        if self.model is not None and self.model.vision is not None:
            yield "vision tower", _tower(self.model.vision, self.vision_tensors, self.vision_bytes)
        elif self.vision_tensors:
            yield "vision tower", left_aside(self.vision_tensors, self.vision_bytes)
        if self.adapters:
            yield "adapter", f"{', '.join(self.adapters)}: NOT applied; {ADAPTER_REMEDY}"

    def _component_rows(self) -> Rows:
        if not self.components:
            return
        yield "parameters", _millions(self.parameters)
        for component in self.components:
            share = component.parameters / self.parameters
            yield f"  {component.name}", f"{_millions(component.parameters)} ({share:.1%})"
        yield "active per token", f"{_millions(self.active_parameters)} (the output head included)"


def as_text(rows: Rows) -> str:
    """Rows of labels and texts, one a line."""
    return "\n".join(f"{label:<{LABEL_WIDTH}}{text}" for label, text in rows)


def describe(path: Path | str) -> CheckpointInfo:
    """Read the config and all headers of a checkpoint folder.

    Raises CheckpointError where the config or the files are not as they should be; tensors are not compared with
    the architecture (loading does that, and `examine`).
    """
    info, wrong = examine(path)
    if wrong:
        raise wrong[0]
    return info


def examine(
    path: Path | str, specs_of: SpecsOf | None = None, text_only: bool = False
) -> tuple[CheckpointInfo, list[CheckpointError]]:
    """Read what can be read of a checkpoint folder, and tell what keeps it from being loaded.

    specs_of: gives a model's parameters; with it, tensors are compared with the architecture. text_only: without
    its vision tower. Raises CheckpointError only for a folder of which nothing can be read.
    """
    folder, wrong = Path(path), list[CheckpointError]()
    with naming_unreadable(folder):
        return _examined(folder, specs_of, text_only, wrong), wrong


def _examined(
    folder: Path, specs_of: SpecsOf | None, text_only: bool, wrong: list[CheckpointError]
) -> CheckpointInfo:
    format, tensors, model = None, dict[str, TensorInfo](), None
    try:
        format, tensors = read_checkpoint_headers(folder)
    except CheckpointError as error:
        wrong.append(error)
        with suppress(CheckpointError):
            tensors = read_tensors(folder, CheckpointFormat(find_layout(folder), "plain"))
    try:
        model = read_model_config(folder, text_only)
    except CheckpointError as error:
        wrong += [error] if error.message not in [one.message for one in wrong] else []
    mapped = NameMap(format or CheckpointFormat(find_layout(folder), "plain"))
    try:
        mapped = map_names(tensors, mapped.format, model is not None and model.vision is not None)
        if specs_of is not None and model is not None and format is not None:
            from cierzo.engine.weights.plan import plan_parameters

            plan_parameters(tensors, specs_of(model), mapped)
    except CheckpointError as error:
        wrong += [] if format is None else [error]  # by other names than the folder's own
    return _info(folder, format, tensors, model, mapped)


def _info(
    folder: Path,
    format: CheckpointFormat | None,
    tensors: dict[str, TensorInfo],
    model: ModelConfig | None,
    mapped: NameMap,
) -> CheckpointInfo:
    stored: Counter[str] = Counter()
    for info in tensors.values():
        stored[info.dtype] += info.num_bytes
    known = format is not None and model is not None
    return CheckpointInfo(
        folder=str(folder),
        layouts=found_layouts(folder),
        format=None if format is None else str(format),
        model=model,
        components=_components(tensors, mapped, model) if known and model is not None else (),
        stored=dict(stored.most_common()),
        num_tensors=len(tensors),
        num_shards=len({info.file for info in tensors.values()}),
        vision_tensors=len(mapped.vision),
        vision_bytes=sum(tensors[name].num_bytes for name in mapped.vision),
        activation_scales=sum("activation scale" in roles for roles in mapped.companions.values()),
        notes=() if format is None else tuple(format.quantisation.notes()),
        kv_bytes_per_token=0 if model is None else model.cache_layout(1, "bfloat16").bytes_per_token,
        adapters=adapter_files(folder),
    )


def _components(tensors: dict[str, TensorInfo], mapped: NameMap, model: ModelConfig) -> tuple[ComponentSize, ...]:
    """Scales of quantised matrices count as bytes of their component, not as parameters."""
    vision = set(mapped.vision)
    scales = {scale: owner for owner, roles in mapped.companions.items() for scale in roles.values()}
    plain = {tensor: name for name, tensor in mapped.whole.items()}
    plain |= {tensor: name for name, parts in mapped.experts.items() for tensor in parts.values()}
    parameters: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for name, info in tensors.items():
        owner = scales.get(name, name)
        component = "vision" if name in vision else _component(plain.get(owner, owner))
        num_bytes[component] += info.num_bytes
        if name not in scales:
            parameters[component] += num_weights(info, mapped.format)
    order = ["embedding", *(name for _, name in _COMPONENTS[3:]), "norms", "output head", "vision", "other"]
    return tuple(
        ComponentSize(name, parameters[name], _active(name, parameters, model), num_bytes[name])
        for name in order
        if name in parameters
    )


def _component(name: str) -> str:
    return next((component for part, component in _COMPONENTS if part in name), "other")


def _active(component: str, parameters: Counter[str], model: ModelConfig) -> int:
    """How many of a component's parameters take part in one token's computation."""
    if component == "embedding":  # a tied one is the output head as well, unless one is stored
        return parameters[component] if model.tie_word_embeddings and "output head" not in parameters else 0
    if component in ("vision", "other"):
        return 0
    if component == "routed experts" and model.moe is not None:
        return parameters[component] * model.moe.experts_per_token // model.moe.num_experts
    return parameters[component]


def _model_rows(model: ModelConfig) -> Rows:
    yield "architecture", model.architecture
    yield "layers", f"{model.num_layers}, hidden size {model.hidden_size:,}, vocabulary {model.vocab_size:,}"
    yield "attention", _attention(model)
    moe = model.moe
    if moe is None:
        yield "MLP", f"dense, width {model.mlp_width:,}"
    else:
        shared = f", {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
        dense = f", {moe.first_dense_layers} dense layer(s) first" if moe.first_dense_layers else ""
        experts = f"{moe.num_experts} experts, {moe.experts_per_token} per token{shared}"
        yield "MLP", f"{experts}, width {moe.expert_width:,}{dense}"
    longest = model.max_position_embeddings
    yield "positions", "not said: max_model_len must be given" if longest is None else f"{longest:,}"


def _attention(model: ModelConfig) -> str:
    match model.attention:
        case MlaConfig() as mla:
            heads = (
                f"MLA, {model.num_heads} heads of {mla.qk_nope_head_dim}+{mla.qk_rope_head_dim}/{mla.v_head_dim}"
            )
            query = "" if mla.q_lora_rank is None else f", query latent {mla.q_lora_rank}"
            return f"{heads}, latent {mla.kv_lora_rank}+{mla.qk_rope_head_dim}{query}"
        case GqaConfig() as gqa:
            return f"GQA, {model.num_heads} query and {gqa.num_kv_heads} KV heads of {gqa.head_dim}"


def _tower(vision: VisionConfig, num_tensors: int, num_bytes: int) -> str:
    sizes = f"{vision.num_layers} layers, hidden size {vision.hidden_size:,}, {vision.num_heads} heads"
    pixels = f"a token for {vision.unit_px} x {vision.unit_px} px, images of up to {vision.max_side_px:,} px a side"
    return f"{sizes}; {pixels}; {num_tensors:,} tensors, {size(num_bytes)} (--text-only leaves them aside)"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M"
