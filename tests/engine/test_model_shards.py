"""Ranks: the shapes they hold, what they refuse, and that two of them together compute what one does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import ORACLES, make_queries, parameters_of, read_config
from torch import Tensor

from cierzo.cache.pool import KVPool
from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.build import build_model, parameter_specs
from cierzo.engine.model.positions import query_scale
from cierzo.engine.parameters import AllReduce, ParameterSpec
from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import bind

WORLD = 2
TOKENS = torch.arange(12) * 7
LOGIT_ROWS = torch.tensor([11, 0, 1, 2, 3, 5, 8, 9, 10])
NAMES = ["moe_two_shared", "moe_no_q_lora", "moe_dense_first", "moe_tied", "mistral", "ministral3"]


def cut(whole: Tensor, spec: ParameterSpec, rank: int, world: int) -> Tensor:
    """A rank's share, by the letter of ParameterSpec: each section divided on its own."""
    if spec.shard_axis is None:
        return whole
    sections = whole.chunk(spec.sections, dim=spec.shard_axis)
    return torch.cat([section.chunk(world, dim=spec.shard_axis)[rank] for section in sections], dim=spec.shard_axis)


class Meeting:
    """An all-reduce among threads: every rank brings its part, every rank leaves with the sum."""

    def __init__(self, world: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def of(self, rank: int) -> AllReduce:
        def all_reduce(partial: Tensor) -> Tensor:
            self.parts[rank] = partial
            self.barrier.wait()
            total = torch.stack(self.parts).sum(0)
            self.barrier.wait()
            return total

        return all_reduce


def compute(
    name: str,
    rank: int,
    world: int,
    all_reduce: AllReduce | None,
    token_ids: Tensor = TOKENS,
    expert_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One step of 9 prompt and 3 generated rows of one sequence -> this rank's logits of LOGIT_ROWS."""
    config = read_config(name)
    specs = parameter_specs(config)
    parameters = {key: cut(value, specs[key], rank, world).to(dtype) for key, value in parameters_of(name).items()}
    model = build_model(
        config, parameters, device="cpu", dtype=dtype, rank=rank, world=world, all_reduce=all_reduce
    )
    pool = KVPool(config.cache_layout(4, str(dtype).removeprefix("torch."), world), 8, "cpu")
    tables = torch.tensor([[5, 2, 7]], dtype=torch.int32)
    slots = torch.tensor([20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31])
    expanded, absorbed = make_queries([(9, 9, 0)], tables), make_queries([(3, 12, 0)], tables)
    inputs = StepRows(token_ids, torch.arange(12), slots, 9, expanded, absorbed, expert_ids)
    return model.logits(inputs, pool, LOGIT_ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_compute_what_one_does(name: str) -> None:
    bind(KernelsConfig(), "cpu")
    logits = compute(name, 0, 1, None)
    meeting = Meeting(WORLD)
    with ThreadPoolExecutor(WORLD) as threads:
        ranks = list(threads.map(lambda rank: compute(name, rank, WORLD, meeting.of(rank)), range(WORLD)))
    torch.testing.assert_close(torch.cat(ranks, dim=-1), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_one_call_is_its_operations_one_by_one(name: str, dtype: torch.dtype) -> None:
    bind(KernelsConfig(), "cpu")
    together = compute(name, 0, 1, None, dtype=dtype)
    blocks = ("decoder", "mla_block", "gqa_block", "mlp_block", "moe_block")
    bind(KernelsConfig(implementations=dict.fromkeys(blocks, "composed")), "cpu")
    assert torch.equal(compute(name, 0, 1, None, dtype=dtype), together)


@pytest.mark.parametrize("name", ["moe", "moe_dense_first", "moe_groups"])
def test_chosen_experts_surface_however_it_is_computed(name: str) -> None:
    """In one call, operation by operation, and on each of two ranks; of the layers that have experts alone."""
    config = read_config(name)
    assert config.moe is not None
    shape = (config.num_layers - config.moe.first_dense_layers, len(TOKENS), config.moe.experts_per_token)
    chosen = torch.full((4, *shape), -1)
    bind(KernelsConfig(), "cpu")
    logits = compute(name, 0, 1, None, expert_ids=chosen[0])
    assert torch.equal(logits, compute(name, 0, 1, None))
    meeting = Meeting(WORLD)
    with ThreadPoolExecutor(WORLD) as threads:
        list(threads.map(lambda r: compute(name, r, WORLD, meeting.of(r), TOKENS, chosen[1 + r]), range(WORLD)))
    blocks = ("decoder", "mla_block", "gqa_block", "mlp_block", "moe_block")
    bind(KernelsConfig(implementations=dict.fromkeys(blocks, "composed")), "cpu")
    compute(name, 0, 1, None, expert_ids=chosen[3])
    for each in chosen[1:]:
        assert torch.equal(each, chosen[0])
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < config.moe.num_experts
    distinct = chosen[0].sort(-1).values.diff(dim=-1)
    assert bool((distinct > 0).all())  # a token's experts are different ones


def test_a_place_for_experts_that_does_not_fit_is_refused() -> None:
    """C++ would write beyond its end."""
    bind(KernelsConfig(), "cpu")
    for wrong in (
        torch.zeros(2, 12, 2).long(),
        torch.zeros(1, 11, 2).long(),
        torch.zeros(1, 12, 3).long(),
        torch.zeros(1, 12, 2),
        torch.zeros(1, 2, 12).long().mT,
    ):
        with pytest.raises(ArgumentError, match=r"decoder: expert ids must be contiguous int64 \[1, 12, 2\]"):
            compute("moe_dense_first", 0, 1, None, expert_ids=wrong)
    with pytest.raises(ArgumentError, match=r"decoder: expert ids must be contiguous int64 \[0, 12\]"):
        compute("mistral", 0, 1, None, expert_ids=torch.zeros(0, 12, 2).long())


@pytest.mark.parametrize("token_id", [-1, 96, 2**40])
def test_a_token_beyond_the_vocabulary_is_refused_or_seen(token_id: int) -> None:
    """In C++ its row is NaN, and so are those of its sequence that attend to it."""
    table = bind(KernelsConfig(), "cpu")
    tokens = TOKENS.clone()
    tokens[5] = token_id
    if not table.uses_native:
        with pytest.raises(IndexError):
            compute("mistral", 0, 1, None, tokens)
        return
    assert compute("mistral", 0, 1, None, tokens)[LOGIT_ROWS >= 5].isnan().all()


def test_token_ids_of_another_width_are_refused() -> None:
    """C++ would read two as one."""
    bind(KernelsConfig(), "cpu")
    with pytest.raises(ArgumentError, match=r"decoder: token_ids must have dtype torch\.int64"):
        compute("mistral", 0, 1, None, TOKENS.int())


def test_a_rank_holds_its_share() -> None:
    """Heads, widths and the head's vocabulary are halved; norms, embeddings, router and latents are whole."""
    specs = parameter_specs(read_config("moe_two_shared"))
    halved = {
        name.removeprefix("model.layers.0.")
        for name, spec in specs.items()
        if spec.shard_axis is not None and ".1." not in name
    }
    assert halved == {
        "lm_head.weight",
        "self_attn.q_b_proj.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    }
    gate_up = specs["model.layers.0.mlp.experts.gate_up_proj"]
    assert gate_up == ParameterSpec((8, 48, 48), shard_axis=1, sections=2)


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_specs_are_what_transformers_saves(name: str) -> None:
    specs = parameter_specs(read_config(name))
    assert {key: spec.shape for key, spec in specs.items() if spec.tied_to is None} == {
        key: tuple(value.shape) for key, value in parameters_of(name).items()
    }


def refused(match: str, name: str = "mistral", world: int = 1, **changes: Tensor | None) -> None:
    config = read_config(name)
    parameters = {key: value for key, value in (parameters_of(name) | changes).items() if value is not None}
    with pytest.raises(CheckpointError, match=match):
        build_model(
            config, parameters, device="cpu", dtype=torch.float32, world=world, all_reduce=lambda partial: partial
        )


def test_parameters_that_do_not_fit_are_named() -> None:
    key = "model.norm.weight"
    refused(f"parameter {key} is missing", **{key: None})
    refused("parameter lm_head.bias is left over", **{"lm_head.bias": torch.zeros(96)})
    refused(rf"parameter {key} is \[47\] torch.float32, must be \[48\]", **{key: torch.zeros(47)})
    refused(rf"parameter {key} is \[48\] torch.float64", **{key: torch.zeros(48).double()})
    refused(r"lm_head.weight 96 cannot be divided among 5 ranks", world=5)


def test_one_key_value_head_is_not_divided() -> None:
    """Half a head has an even width, so that only the count can tell."""
    config = read_config("llama_tied")
    specs = parameter_specs(config)
    parameters = {key: cut(value, specs[key], 0, WORLD) for key, value in parameters_of("llama_tied").items()}
    with pytest.raises(CheckpointError, match="num_key_value_heads 1 cannot be divided among 2 ranks"):
        build_model(
            config, parameters, device="cpu", dtype=torch.float32, world=WORLD, all_reduce=lambda partial: partial
        )


def test_several_ranks_need_an_all_reduce() -> None:
    with pytest.raises(ValueError, match="world 2 needs an all_reduce"):
        build_model(read_config("mistral"), {}, device="cpu", dtype=torch.float32, world=WORLD)


def test_query_scale_of_small4() -> None:
    """Exactly 1 up to position 8191."""
    positions = torch.tensor([0, 8191, 8192, 16384, 32768, 65536, 131072, 262143, 1048575])
    expected = [1.0, 1.0, 1.069315, 1.109861, 1.160944, 1.219723, 1.283321, 1.346574, 1.485203]
    scale = query_scale(positions, 0.1, 8192)
    assert scale.dtype == torch.float32
    assert scale[:2].tolist() == [1.0, 1.0]
    torch.testing.assert_close(scale, torch.tensor(expected), rtol=1e-6, atol=0.0)


def test_bfloat16_runs_and_stays_near_float32() -> None:
    """All in bf16, both forms: within a few of its 8 bits of the float32 model."""
    bind(KernelsConfig(), "cpu")
    for name in ("moe", "mistral"):
        config = read_config(name)
        parameters = {key: value.bfloat16() for key, value in parameters_of(name).items()}
        model = build_model(config, parameters, device="cpu", dtype=torch.bfloat16)
        pool = KVPool(config.cache_layout(4, "bfloat16"), 8, "cpu")
        tables = torch.tensor([[5, 2, 7]], dtype=torch.int32)
        slots = torch.tensor([20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31])
        queries = make_queries([(9, 9, 0)], tables), make_queries([(3, 12, 0)], tables)
        inputs = StepRows(TOKENS, torch.arange(12), slots, 9, *queries)
        logits, exact = model.logits(inputs, pool, LOGIT_ROWS), compute(name, 0, 1, None)
        assert logits.dtype == torch.float32
        assert (logits - exact).norm() / exact.norm() < 0.1
