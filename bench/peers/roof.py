"""The least time that a cell can take: bytes of the weights that it touches over the machine's read bandwidth, or
operations over its matrix rate (in int8 where weights have 9 bits or less, else in bf16), whichever is slower.

Bytes are those of the weights; the KV cache is left out (2 % of them at 32 requests of 192 tokens). A batch of b
tokens meets E (1 - (1 - K / E)^b) distinct experts of E in a layer, if each token picks K at random. The tokens of
small4-mini agree a little more: 27.7 and 80.5 experts were counted for 8 and 32, where this says 28.7 and 81.7,
so that the true roof is 3 % and 1 % higher there.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cierzo.bench.peers.ceilings import Limits
from cierzo.bench.peers.cells import Cell

GIGA = 1e9
INT8_BITS = 9  # a weight of 8 bits with its share of a scale


class Work(msgspec.Struct, frozen=True):
    """Weights of a model, in elements: those that every token meets, one expert's, the head's; and its attention.

    `attention` is multiply-adds per pair of query and key, in all layers and heads.
    """

    common: int
    expert: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    head: int
    attention: int

    def read(self, num_tokens: int) -> float:
        """Elements that a step of `num_tokens` reads, head included."""
        missed = (1 - self.experts_per_token / self.num_experts) ** num_tokens if self.num_experts else 0.0
        return self.common + self.head + self.num_layers * self.num_experts * (1 - missed) * self.expert

    def multiplied(self) -> int:
        """Elements that one token is multiplied with, without the head."""
        return self.common + self.num_layers * self.experts_per_token * self.expert


def work(config: dict[str, Any]) -> Work:
    """Of a config.json of Mistral Small 4 (mistral4) or 3 (mistral)."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    head = config["vocab_size"] * hidden
    if config["model_type"] == "mistral4":
        nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        query_rank, latent = config["q_lora_rank"], config["kv_lora_rank"]
        expert = 3 * hidden * config["moe_intermediate_size"]
        attention = (
            hidden * (query_rank + latent + rope)
            + query_rank * heads * (nope + rope)
            + latent * heads * (nope + value)
            + heads * value * hidden
        )
        common = attention + config["n_routed_experts"] * hidden + config["n_shared_experts"] * expert
        return Work(
            layers * common,
            expert,
            layers,
            config["n_routed_experts"],
            config["num_experts_per_tok"],
            head,
            layers * heads * (nope + rope + value),
        )
    size, kv_heads = config["head_dim"], config["num_key_value_heads"]
    common = 2 * hidden * size * (heads + kv_heads) + 3 * hidden * config["intermediate_size"]
    return Work(layers * common, 0, layers, 0, 0, head, layers * heads * 2 * size)


def roof(cell: Cell, config: dict[str, Any], weight_bits: float, limits: Limits) -> float | None:
    """Tokens per second of a decode or prefill cell at the machine's limit; None for other cells."""
    model = work(config)
    bytes_per_s = limits.read_gb_per_s * GIGA
    rate = limits.int8_gop_per_s if weight_bits <= INT8_BITS else limits.bf16_gop_per_s
    multiply_adds_per_s = rate * GIGA / 2
    if cell.kind == "decode":
        arithmetic_s = cell.batch * (model.multiplied() + model.head) / multiply_adds_per_s
        return cell.batch / max(model.read(cell.batch) * weight_bits / 8 / bytes_per_s, arithmetic_s)
    if cell.kind == "prefill":
        tokens = cell.prompt_tokens
        pairs = tokens * (tokens + 1) / 2  # causal
        arithmetic_s = (tokens * model.multiplied() + model.head + pairs * model.attention) / multiply_adds_per_s
        return tokens / max(model.read(tokens) * weight_bits / 8 / bytes_per_s, arithmetic_s)
    return None
