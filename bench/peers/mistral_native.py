"""The same weights in the Mistral-native layout (params.json, consolidated safetensors), which vLLM takes for MLA.

Transformers stacks the experts: `gate_up_proj` is [E, 2F, D], `down_proj` [E, D, F]. The native layout wants each
expert's w1, w3 and w2 by name. Row-major, those are slices that follow each other, so the data of a file stays as
it is, byte for byte, and only its header is written anew.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = {
    r"model\.embed_tokens\.weight": "tok_embeddings.weight",
    r"model\.norm\.weight": "norm.weight",
    r"lm_head\.weight": "output.weight",
    r"model\.layers\.(\d+)\.input_layernorm\.weight": r"layers.\1.attention_norm.weight",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"layers.\1.ffn_norm.weight",
    r"model\.layers\.(\d+)\.self_attn\.q_a_proj\.weight": r"layers.\1.attention.wq_a.weight",
    r"model\.layers\.(\d+)\.self_attn\.q_a_layernorm\.weight": r"layers.\1.attention.q_a_norm.weight",
    r"model\.layers\.(\d+)\.self_attn\.q_b_proj\.weight": r"layers.\1.attention.wq_b.weight",
    r"model\.layers\.(\d+)\.self_attn\.kv_a_proj_with_mqa\.weight": r"layers.\1.attention.wkv_a_with_mqa.weight",
    r"model\.layers\.(\d+)\.self_attn\.kv_a_layernorm\.weight": r"layers.\1.attention.kv_a_norm.weight",
    r"model\.layers\.(\d+)\.self_attn\.kv_b_proj\.weight": r"layers.\1.attention.wkv_b.weight",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight": r"layers.\1.attention.wo.weight",
    r"model\.layers\.(\d+)\.mlp\.gate\.weight": r"layers.\1.gate.weight",
    r"model\.layers\.(\d+)\.mlp\.shared_experts\.gate_proj\.weight": r"layers.\1.shared_experts.w1.weight",
    r"model\.layers\.(\d+)\.mlp\.shared_experts\.down_proj\.weight": r"layers.\1.shared_experts.w2.weight",
    r"model\.layers\.(\d+)\.mlp\.shared_experts\.up_proj\.weight": r"layers.\1.shared_experts.w3.weight",
}
EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
COPY_BYTES = 1 << 26
Header = dict[str, dict[str, Any]]


def convert(source: Path, target: Path) -> None:
    """Write the mistral4 checkpoint `source` into the folder `target`. Raises KeyError for an unknown tensor."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "params.json").write_text(json.dumps(params(config), indent=2) + "\n", encoding="utf-8")
    shards = sorted(source.glob("*.safetensors"))
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"consolidated-{number:05d}-of-{len(shards):05d}.safetensors"
        placed |= dict.fromkeys(_rename(shard, target / name), name)
    index = {"metadata": {}, "weight_map": placed}
    (target / "consolidated.safetensors.index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")


def params(config: dict[str, Any]) -> dict[str, Any]:
    """params.json of a mistral4 config.json, as the makers of Small 4 write it: no magnitude term in YaRN."""
    rope = config["rope_parameters"]
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_attention_heads"],
        "rope_theta": rope["rope_theta"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "tied_embeddings": config["tie_word_embeddings"],
        "max_position_embeddings": config["max_position_embeddings"],
        "max_seq_len": config["max_position_embeddings"],
        "dtype": config["dtype"],
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_rope_head_dim": config["qk_rope_head_dim"],
        "qk_nope_head_dim": config["qk_nope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "llama_4_scaling": {
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "beta": rope["llama_4_scaling_beta"],
        },
        "yarn": {
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "factor": rope["factor"],
            "apply_scale": False,
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
        },
        "moe": {
            "expert_parallel": 1,
            "expert_model_parallel": 1,
            "route_every_n": 1,
            "first_k_dense_replace": config["first_k_dense_replace"],
            "num_experts": config["n_routed_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
            "num_expert_groups": config["n_group"],
            "num_expert_groups_per_tok": config["topk_group"],
            "routed_scale": config["routed_scaling_factor"],
            "expert_hidden_dim": config["moe_intermediate_size"],
            "num_shared_experts": config["n_shared_experts"],
        },
    }


def _rename(source: Path, target: Path) -> list[str]:
    """Write `target` with the data of `source` behind a header of native names; return the names."""
    with source.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        old: Header = json.loads(file.read(size))
        new = dict(_native(old))
        header = json.dumps({"__metadata__": {"format": "pt"}, **new}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # the data starts on a multiple of 8 bytes
        with target.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(file, out, COPY_BYTES)
    return list(new)


def _native(old: Header) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in old.items():
        if name == "__metadata__":
            continue
        experts = EXPERTS.fullmatch(name)
        yield from _experts(experts, entry) if experts else [(_native_name(name), entry)]


def _native_name(name: str) -> str:
    for pattern, native in NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(native)
    raise KeyError(f"{name}: no tensor of this name in the Mistral-native layout")


def _experts(match: re.Match[str], entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The slices of a stack of experts: [E, 2F, D] is w1, w3 of expert 0, w1, w3 of expert 1, ..."""
    layer, kind = match.groups()
    count, rows, columns = entry["shape"]
    parts = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    begin, end = entry["data_offsets"]
    step = (end - begin) // (count * len(parts))
    for index in range(count * len(parts)):
        expert, part = divmod(index, len(parts))
        span = [begin + index * step, begin + (index + 1) * step]
        shape = [rows // len(parts), columns]
        yield (
            f"layers.{layer}.experts.{expert}.{parts[part]}.weight",
            {"dtype": entry["dtype"], "shape": shape, "data_offsets": span},
        )
