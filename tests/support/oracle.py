"""The independent implementation: a small random transformers model, and our model with the same weights.

`ORACLES` names the cases. `make_oracle(name)` builds the transformers model in float32; `Ours` drives our model
through pages that were poisoned with NaN, over a scattered block table whose unused entries are huge.
"""

from __future__ import annotations

import copy
import functools
import pathlib
import tempfile
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from cierzo.cache.pool import GqaPages, KVPool
from cierzo.engine.model.build import build_model
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.model.read_config import read_model_config
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import bind

HUGE = 2**30
TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 1 << 20,
    "initializer_range": 0.15,  # wide enough that the logits of so small a model differ from one another
    "pad_token_id": None,
    "attn_implementation": "eager",
}
MOE = {
    **TINY,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}


def _yarn(original_positions: int = 8192, factor: float = 128.0) -> dict[str, object]:
    """Small 4's, in the form that makes transformers leave YaRN's magnitude out of the softmax scale."""
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": factor,
        "original_max_position_embeddings": original_positions,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
        "llama_4_scaling_beta": 0.1,
    }


_DENSE = {**TINY, "num_key_value_heads": 2, "head_dim": 16}
# Ministral 3's rope settings, its original length and base so small that 43 tokens go far beyond it.
_MINISTRAL: dict[str, object] = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ORACLES: dict[str, tuple[str, dict[str, object]]] = {
    "moe": ("Mistral4", {**MOE, "rope_parameters": _yarn()}),
    "moe_groups": (
        "Mistral4",
        {**MOE, "rope_parameters": _yarn(), "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    ),
    "moe_no_q_lora": (
        "Mistral4",
        {
            **MOE,
            "rope_parameters": _yarn(),
            "q_lora_rank": None,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.7,
        },
    ),
    "moe_dense_first": ("Mistral4", {**MOE, "rope_parameters": _yarn(), "first_k_dense_replace": 1}),
    "moe_two_shared": (
        "Mistral4",
        {**MOE, "rope_parameters": _yarn(), "n_shared_experts": 2, "rope_interleave": False, "rms_norm_eps": 1e-5},
    ),
    "moe_tied": ("Mistral4", {**MOE, "rope_parameters": _yarn(), "tie_word_embeddings": True}),
    "moe_far": ("Mistral4", {**MOE, "rope_parameters": _yarn(original_positions=16, factor=8.0)}),
    "moe_8192": (
        "Mistral4",
        {
            **MOE,
            "rope_parameters": _yarn(),
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "attn_implementation": "sdpa",  # a whole score matrix of 8k x 8k would be slow
        },
    ),
    "mistral": ("Mistral", {**_DENSE, "sliding_window": None, "rope_parameters": _PLAIN}),
    "ministral3": ("Ministral3", {**_DENSE, "rope_parameters": _MINISTRAL}),
    "ministral3_magnitude": (  # as params.json's apply_scale true asks for it; tied like the 3B model
        "Ministral3",
        {**_DENSE, "rope_parameters": {**_MINISTRAL, "mscale_all_dim": 0.0}, "tie_word_embeddings": True},
    ),
    "llama3": ("Llama", {**TINY, "num_key_value_heads": 2, "rope_parameters": _LLAMA3}),
    "llama_linear": (
        "Llama",
        {**TINY, "num_key_value_heads": 2, "rope_parameters": {**_PLAIN, "rope_type": "linear", "factor": 4.0}},
    ),
    "llama": ("Llama", {**TINY, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_parameters": _PLAIN}),
    "llama_tied": (
        "Llama",
        {**TINY, "num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": _PLAIN},
    ),
}


@functools.cache
def make_oracle(name: str) -> transformers.PreTrainedModel:
    """The transformers model of a case, always the same one."""
    family, settings = ORACLES[name]
    torch.manual_seed(sorted(ORACLES).index(name))
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(settings))  # which it writes into
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:  # all ones by default: a norm that is skipped or swapped would pass
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


@torch.inference_mode()
def oracle_logits(name: str, tokens: list[int]) -> Tensor:
    """fp32 [len(tokens), vocab], in one forward pass."""
    return make_oracle(name)(torch.tensor([tokens])).logits[0].float()


def vocab_size(name: str) -> int:
    """Of a case."""
    return int(make_oracle(name).config.vocab_size)


def read_config(name: str) -> ModelConfig:
    """Our reading of the config.json that transformers writes for a case."""
    with tempfile.TemporaryDirectory() as folder:
        make_oracle(name).config.save_pretrained(folder)
        return read_model_config(pathlib.Path(folder))


def parameters_of(name: str) -> dict[str, Tensor]:
    """The oracle's weights, as it would save them."""
    state = dict(make_oracle(name).state_dict())
    if make_oracle(name).config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@dataclass
class Sequence:
    """A sequence in the pages: what is computed of it, and where."""

    blocks: list[int]
    computed: int = 0


class Ours:
    """Our model and a pool of pages. `step` computes one or more pieces of sequences, as the engine would."""

    def __init__(self, name: str, *, num_blocks: int = 64, block_tokens: int = 4) -> None:
        bind(KernelsConfig(), "cpu")
        self.config = read_config(name)
        self.model: Decoder = build_model(self.config, parameters_of(name), device="cpu", dtype=torch.float32)
        self.pool = KVPool(self.config.cache_layout(block_tokens, "float32"), num_blocks, "cpu")
        for layer in self.pool.layers:
            for pages in (layer.keys, layer.values) if isinstance(layer, GqaPages) else (layer.latents,):
                pages.fill_(float("nan"))
        self.block_tokens = block_tokens
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3))
        self.free: list[int] = order.tolist()

    def sequence(self) -> Sequence:
        """A sequence without tokens."""
        return Sequence([])

    def step(self, *pieces: tuple[Sequence, list[int], bool]) -> list[Tensor]:
        """Compute each piece (sequence, next tokens, whether they are generated) -> its logits [n, vocab]."""
        ordered = [piece for piece in pieces if not piece[2]] + [piece for piece in pieces if piece[2]]
        inputs = self._inputs(ordered)
        logits = self.model.logits(inputs, self.pool).split([len(tokens) for _, tokens, _ in ordered])
        return [logits[next(i for i, one in enumerate(ordered) if one is piece)] for piece in pieces]

    def _inputs(self, pieces: list[tuple[Sequence, list[int], bool]]) -> StepRows:
        tables = torch.full((len(pieces) + 1, 64 + max(len(p[0].blocks) + len(p[1]) for p in pieces)), HUGE)
        tables = tables.int()
        tokens, positions, slots = [], [], []
        groups: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
        for row, (sequence, piece, generated) in enumerate(pieces, start=1):
            start, end = sequence.computed, sequence.computed + len(piece)
            while len(sequence.blocks) * self.block_tokens < end:
                sequence.blocks.append(self.free.pop())
            sequence.computed = end
            tables[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
            tokens += piece
            positions += range(start, end)
            blocks = sequence.blocks
            slots += [
                blocks[p // self.block_tokens] * self.block_tokens + p % self.block_tokens
                for p in range(start, end)
            ]
            groups[generated].append((len(piece), end, row))
        return StepRows(
            torch.tensor(tokens),
            torch.tensor(positions),
            torch.tensor(slots),
            sum(length for length, _, _ in groups[False]),
            make_queries(groups[False], tables),
            make_queries(groups[True], tables),
        )


def make_queries(segments: list[tuple[int, int, int]], tables: Tensor) -> PagedQueries:
    """PagedQueries of (query length, context, table row) triples."""
    lengths, contexts = [s[0] for s in segments], [s[1] for s in segments]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = torch.tensor([s[2] for s in segments]).int()
    return PagedQueries(starts, torch.tensor(contexts).int(), rows, tables, lengths, contexts)
