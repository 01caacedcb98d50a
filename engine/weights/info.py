"""Description and size of a checkpoint, from config and headers alone: `cierzo info`. No torch, no tensor data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

from cierzo.engine.checkpoint_format import ADAPTER_REMEDY, CheckpointFormat, adapter_files
from cierzo.engine.model.config import GqaConfig, MlaConfig, ModelConfig
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.companions import num_weights
from cierzo.engine.weights.headers import TensorInfo, read_checkpoint_headers
from cierzo.engine.weights.names import map_names

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
_TOKENIZER_FILE = "tokenizer.json"
_LABEL_WIDTH = 18


class ComponentSize(msgspec.Struct, frozen=True):
    """Stored parameters of one component, and how many of them one token's computation uses."""

    name: str
    parameters: int
    active_parameters: int
    num_bytes: int


class CheckpointInfo(msgspec.Struct, frozen=True):
    """A checkpoint's architecture and sizes; `str()` is what `cierzo info` prints."""

    folder: str
    format: str
    model: ModelConfig
    components: tuple[ComponentSize, ...]
    dtypes: tuple[str, ...]
    num_tensors: int
    num_shards: int
    kv_bytes_per_token: int
    has_tokenizer: bool
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
        return sum(component.num_bytes for component in self.components)

    def __str__(self) -> str:
        rows = [("format", self.format), *_model_rows(self.model), *self._size_rows()]
        return "\n".join(f"{label:<{_LABEL_WIDTH}}{text}" for label, text in rows)

    def _size_rows(self) -> Iterable[tuple[str, str]]:
        yield "tensors", f"{self.num_tensors:,} in {self.num_shards} file(s), {', '.join(self.dtypes)}"
        yield "parameters", f"{_millions(self.parameters)}, {self.num_bytes / 1e9:.3f} GB"
        for component in self.components:
            share = component.parameters / self.parameters
            yield f"  {component.name}", f"{_millions(component.parameters)} ({share:.1%})"
        yield "active per token", f"{_millions(self.active_parameters)} (the output head included)"
        yield "KV cache", f"{self.kv_bytes_per_token:,} bytes per token in bfloat16"
        tokenizer = _TOKENIZER_FILE if self.has_tokenizer else "none: prompts are token ids"
        yield "tokenizer", tokenizer
        if self.adapters:
            yield "adapter", f"{', '.join(self.adapters)}: NOT applied; {ADAPTER_REMEDY}"


def describe(path: Path | str) -> CheckpointInfo:
    """Read the config and all headers of a checkpoint folder.

    Raises CheckpointError where the config or the files are not as they should be; tensors are not compared with
    the architecture (loading does that).
    """
    folder = Path(path)
    format, tensors = read_checkpoint_headers(folder)
    model = read_model_config(folder)
    layout = model.cache_layout(block_tokens=1, dtype="bfloat16")
    return CheckpointInfo(
        folder=str(folder),
        format=str(format),
        model=model,
        components=_components(tensors, format, model),
        dtypes=tuple(sorted({info.dtype for info in tensors.values()})),
        num_tensors=len(tensors),
        num_shards=len({info.file for info in tensors.values()}),
        kv_bytes_per_token=layout.bytes_per_token,
        has_tokenizer=(folder / _TOKENIZER_FILE).is_file(),
        adapters=adapter_files(folder),
    )


def _components(
    tensors: dict[str, TensorInfo], format: CheckpointFormat, model: ModelConfig
) -> tuple[ComponentSize, ...]:
    """Scales of quantised matrices count as bytes of their component, not as parameters."""
    mapped = map_names(tensors, format)
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
            parameters[component] += num_weights(info, format)
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


def _model_rows(model: ModelConfig) -> Iterable[tuple[str, str]]:
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


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M"
