"""A model from its configuration: the parameters that it expects, and its weights as the kernels take them.

Which attention and which MLP a layer has, `config.attention` and `config.moe` say. Rank r of `world` holds its
share of the heads, of the MLP's and the experts' width and of the vocabulary's rows in lm_head; embeddings, norms
and MLA's latents are whole on every rank. Products that contract a divided width give partial sums, which
`all_reduce` adds up: the only thing ranks exchange.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model import gqa, mla, mlp, moe, vision
from cierzo.engine.model.config import MlaConfig, ModelConfig, MoeConfig
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.model.positions import Positions
from cierzo.engine.parameters import (
    AllReduce,
    MatrixRequest,
    MatrixSource,
    Parameter,
    Parameters,
    ParameterSpec,
    PlainMatrices,
    Shard,
    as_tensor,
)
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.block import BlockWeights, DecoderWeights

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def parameter_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Every parameter of the model, under its text-only name: as transformers' ForCausalLM classes save it. Those
    of a vision tower have the names that Mistral 3 is published with."""
    hidden, attention = config.hidden_size, config.attention
    found = {
        EMBEDDING: ParameterSpec((config.vocab_size, hidden)),
        FINAL_NORM: ParameterSpec((hidden,)),
        HEAD: ParameterSpec(
            (config.vocab_size, hidden), shard_axis=0, tied_to=EMBEDDING if config.tie_word_embeddings else None
        ),
    }
    for layer in range(config.num_layers):
        experts = _experts(config, layer)
        parts = {
            "": dict.fromkeys(NORMS, ParameterSpec((hidden,))),
            "self_attn.": mla.specs(config, attention)
            if isinstance(attention, MlaConfig)
            else gqa.specs(config, attention),
            "mlp.": moe.specs(hidden, experts) if experts else mlp.specs(hidden, config.mlp_width),
        }
        for part, specs in parts.items():
            found |= {f"model.layers.{layer}.{part}{name}": spec for name, spec in specs.items()}
    return found if config.vision is None else found | vision.specs(config.vision, hidden)


def build_model(
    config: ModelConfig,
    parameters: Mapping[str, Parameter],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    rank: int = 0,
    world: int = 1,
    all_reduce: AllReduce | None = None,
    matrices: MatrixSource | None = None,
) -> Decoder:
    """The model of this rank, from the parameters that `load_parameters` gave it (already cut for the rank).

    device: where the model runs; `matrices` carries the parameters there, in the form that the kernels want: by
    default as they are. `all_reduce` sums a [T,D] tensor over all ranks; needed from world 2 on. The operations
    must be bound (kernels.registry.bind) before the model runs. Raises CheckpointError for a parameter that is
    missing, left over, of the wrong shape or dtype.
    """
    if all_reduce is None:
        if world > 1:
            raise ValueError(f"world {world} needs an all_reduce")
        all_reduce = _alone
    shard = Shard(rank, world, all_reduce)
    _check(parameters, parameter_specs(config), shard, dtype)
    whole = Parameters(parameters, matrices or PlainMatrices(device))
    blocks: list[BlockWeights] = []
    for layer in range(config.num_layers):
        blocks += _layer(config, layer, whole.within(f"model.layers.{layer}."), shard)
    embedding, final_norm = whole[EMBEDDING], whole[FINAL_NORM]
    head = _head(config, whole, shard)
    weights = DecoderWeights(embedding, blocks, [], final_norm, config.rms_norm_eps, head)
    return Decoder(weights, Positions(config, torch.device(device)), shard, vision.build(config, whole))


def _layer(
    config: ModelConfig, layer: int, parameters: Parameters, shard: Shard
) -> tuple[BlockWeights, BlockWeights]:
    """Attention and MLP of one layer."""
    norms = [parameters[name] for name in NORMS]
    own, inner, eps = parameters.within("self_attn."), parameters.within("mlp."), config.rms_norm_eps
    attention, experts = config.attention, _experts(config, layer)
    return (
        mla.build(own, norms[0], config, attention, shard)
        if isinstance(attention, MlaConfig)
        else gqa.build(own, norms[0], config, attention, shard),
        moe.build(inner, norms[1], eps, experts) if experts else mlp.build(inner, norms[1], eps),
    )


def _experts(config: ModelConfig, layer: int) -> MoeConfig | None:
    """The experts of a layer; None for a dense one."""
    moe = config.moe
    return moe if moe is not None and layer >= moe.first_dense_layers else None


def _head(config: ModelConfig, parameters: Parameters, shard: Shard) -> Matrix:
    """The output head: this rank's rows of its own matrix, or of the embedding that takes its place."""
    if HEAD in parameters:
        return parameters.matrix(HEAD, role="head")
    rows = shard.width(config.vocab_size, "vocab_size")
    embedding = parameters.stored(EMBEDDING)
    tied = as_tensor(embedding)[shard.rank * rows : (shard.rank + 1) * rows]
    return parameters.derived(
        MatrixRequest("lm_head", tuple(tied.shape), lambda: tied, role="head", parts=(embedding,))
    )


def _alone(partial: Tensor) -> Tensor:
    """The sum over one rank."""
    return partial


def _check(
    parameters: Mapping[str, Parameter], specs: dict[str, ParameterSpec], shard: Shard, dtype: torch.dtype
) -> None:
    specs = {name: spec for name, spec in specs.items() if name in parameters or spec.tied_to is None}
    for name in [*(specs.keys() - parameters.keys()), *(parameters.keys() - specs.keys())]:
        raise CheckpointError(f"parameter {name} is {'missing' if name in specs else 'left over'}", field=name)
    for name, spec in specs.items():
        tensor, shape = parameters[name], list(spec.shape)
        if spec.shard_axis is not None:
            shape[spec.shard_axis] = shard.width(shape[spec.shard_axis], name)
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise CheckpointError(f"parameter {name} is {found}, must be {shape} {dtype}", field=name)
