"""Every operation has a case with arguments that it takes; its bytes and operations are those counted by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cierzo.bench.gpu import calls
from cierzo.bench.gpu.calls import CASES
from cierzo.bench.gpu.cases import Maker, Size
from cierzo.engine.cost.operations import stored
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.formats.device import quantise
from cierzo.kernels.formats.number_formats import DEVICE_FORMATS, NUMBER_FORMATS, PACKED_FORMATS
from cierzo.kernels.pack import pack
from cierzo.kernels.registry import bind, has_native, implementations, operations

TINY4 = ModelSizes(
    name="tiny4", hidden=64, heads=2, vocab=500, mlp_width=32, query_rank=48, rank=32, rope=16, nope=16,
    value_dim=32, experts=8, top_k=2, expert_width=32, shared_width=32,
)  # fmt: skip
TINY3 = ModelSizes(name="tiny3", hidden=64, heads=4, vocab=500, mlp_width=96, kv_heads=2, head_dim=32)
DECODE = Size(name="decode 2", sequences=2, rows_each=1, context=64)
PREFILL = Size(name="prefill 64", sequences=1, rows_each=64, context=64)
SIZES = {size.name: size for size in (DECODE, PREFILL)}
MODELS = {"tiny4": TINY4, "tiny3": TINY3}


# What a call moves and computes, counted by hand: (bytes, operations). Values and weights have 2 bytes, codes 1;
# scales, angles and logits 4; ids and positions 8. "decode 2" has 2 rows of 64 values, each at the end of a context
# of 64 tokens; "prefill 64" the 64 rows of one context, which see 64 * 65 / 2 = 2080 pairs. The experts are CHOSEN.
Counted = tuple[int, int]
CHOSEN = [[0, 1], [1, 5]]  # three distinct ones
EXPERTS = (3 + 1) * 3 * 32 * 64 * 2  # bytes: gate, up and down of these and of the shared one
MLA_DECODE = ((2 * 64 * 48 + 2 * 2 * 48 + 2 * 2 * 32) * 2, 2 * 128 * 2 * (48 + 32))  # pages, queries, results
MLA_PREFILL = (
    (64 * 48 + 64 * 2 * 32 + 64 * 2 * 32 + 2 * (16 + 32) * 32) * 2,  # and the weights that expand latents
    2 * 64 * 2 * (16 + 32) * 32 + 2 * 2080 * 2 * (32 + 32),
)
GQA_DECODE = ((2 * 2 * 64 * 2 * 32 + 2 * 2 * 4 * 32) * 2, 4 * 128 * 4 * 32)
GQA_PREFILL = ((2 * 64 * 2 * 32 + 2 * 64 * 4 * 32) * 2, 4 * 2080 * 4 * 32)
TINY4_DECODE: dict[str, Counted] = {
    "rms_norm": ((2 * 64 + 64 + 2 * 64) * 2, 0),
    "add_rms_norm": ((4 * 2 * 64 + 64) * 2, 0),
    "rms_norm_fp8": ((2 * 64 + 64) * 2 + 2 * 64 + 2 * 4, 0),
    "add_rms_norm_fp8": ((3 * 2 * 64 + 64) * 2 + 2 * 64 + 2 * 4, 0),
    "rope_tables": (2 * 8 + 2 * 2 * 8 * 4, 0),
    "apply_rope": (2 * 2 * 2 * 16 * 2 + 2 * 2 * 8 * 4, 0),
    "linear": ((64 * 64 + 2 * 64 + 2 * 64) * 2, 2 * 2 * 64 * 64),
    "linear_terms": ((64 * 64 + 2 * 64 + 2 * 64) * 2, 2 * 2 * 64 * 64),
    "lm_head": (500 * 64 * 2 + 2 * 64 * 2 + 2 * 500 * 4, 2 * 2 * 64 * 500),
    "gated_mlp": ((3 * 32 * 64 + 2 * 2 * 64) * 2, 2 * 2 * 3 * 32 * 64),
    "route": ((8 * 64 + 2 * 64) * 2 + 2 * 2 * (8 + 4), 2 * 2 * 64 * 8),
    "route_groups": ((8 * 64 + 2 * 64) * 2 + 2 * 2 * (8 + 4), 2 * 2 * 64 * 8),
    "group_by_expert": (2 * 2 * 8 + 2 * 2 * 8 + 9 * 8, 0),
    "expert_mlp": (EXPERTS + 2 * 2 * 64 * 2, 2 * 2 * (2 + 1) * 3 * 32 * 64),
    "expert_terms": (EXPERTS + 2 * 2 * 64 * 2, 2 * 2 * (2 + 1) * 3 * 32 * 64),
    "sum_terms": (2 * ((2 + 1 + 1) * 64 * 2 + 2 * 4), 0),  # two experts, the shared one, the sum; weights
    "write_latents": (2 * 2 * 48 * 2, 0),
    "write_normed_latents": (2 * 2 * 48 * 2 + 32 * 2 + 2 * 2 * 8 * 4, 0),
    "norm_latents": (2 * 2 * 48 * 2 + 32 * 2 + 2 * 2 * 8 * 4 + (2 * 2 + 1) * 48 * 2, 0),
    "latents_of": (  # sums, residual in and out; weights of norms and the product; latents, entries, angles
        (3 * 2 * 64 + 64 + (48 + 48) * 64 + 48 + 2 * 48 + 32 + 2 * 48) * 2 + 2 * 2 * 8 * 4,
        2 * 2 * 64 * (48 + 48),
    ),
    "absorbed_queries": (  # latents, both weights, queries, angles
        (2 * 48 + 64 * 48 + 2 * 16 * 32 + 2 * 2 * (32 + 16)) * 2 + 2 * (16 + 1) * 4,
        2 * 2 * 48 * 64 + 2 * 2 * 2 * 16 * 32,
    ),
    "rotate_and_absorb": ((2 * 16 * 32 + 2 * 2 * 48) * 2 + 2 * (16 + 1) * 4, 2 * 2 * 2 * 16 * 32),
    "mla_absorb": ((2 * 16 * 32 + 2 * 2 * (16 + 32)) * 2, 2 * 2 * 2 * 16 * 32),
    "mla_unabsorb": ((2 * 32 * 32 + 2 * 2 * (32 + 32)) * 2, 2 * 2 * 2 * 32 * 32),
    "mla_decode": MLA_DECODE,
    "mla_values": (  # pages, queries, results, and each head's W_UV
        (2 * 64 * 48 + 2 * 2 * 48 + 2 * 2 * 32 + 2 * 32 * 32) * 2,
        2 * 128 * 2 * (48 + 32) + 2 * 2 * 2 * 32 * 32,
    ),
    "copy_blocks": (2 * 4 * 16 * 48 * 2, 0),
    "gather_blocks": (2 * 4 * 16 * 48 * 2, 0),
    "scatter_blocks": (2 * 4 * 16 * 48 * 2, 0),
    "add_bias": (200 * (8 + 8 + 4 + 2 * 4), 0),  # row, id, bias; the logit in and out
    "apply_penalties": (200 * (8 + 8 + 8 + 2 * 4), 0),
    "mask_tokens": (200 * (8 + 8 + 4), 0),
    "mask_bits": (2 * (500 * 4 + 16 * 4 + 8), 0),
    "peaks": (2 * 500 * 4, 0),
    "draw": (2 * 500 * 4, 0),
    "log_probabilities": (2 * 500 * 4 * 2, 0),
    "top_tokens": (2 * 500 * 4, 0),
}
TINY3_DECODE: dict[str, Counted] = {
    "rope_tables": (2 * 8 + 2 * 2 * 16 * 4, 0),
    "apply_rope": (2 * 2 * (4 + 2) * 32 * 2 + 2 * 2 * 16 * 4, 0),
    "linear": ((64 * 128 + 2 * 128 + 2 * 64) * 2, 2 * 2 * 128 * 64),
    "gated_mlp": ((3 * 96 * 64 + 2 * 2 * 64) * 2, 2 * 2 * 3 * 96 * 64),
    "write_keys_values": (2 * 2 * 2 * 2 * 32 * 2, 0),
    "rotate_and_write_keys_values": (2 * 2 * (4 + 2 + 2) * 32 * 2 + 2 * 2 * 16 * 4, 0),
    "gqa_decode": GQA_DECODE,
    "copy_blocks": (2 * 4 * 16 * 64 * 2, 0),
}
PREFILLS: dict[str, dict[str, Counted]] = {
    "tiny4": {
        "linear": ((64 * 64 + 64 * 64 + 64 * 64) * 2, 2 * 64 * 64 * 64),
        "lm_head": (500 * 64 * 2 + 64 * 2 + 500 * 4, 2 * 64 * 500),  # of the last row alone
        "expert_mlp": (EXPERTS + 2 * 64 * 64 * 2, 2 * 64 * (2 + 1) * 3 * 32 * 64),
        "mla_prefill": MLA_PREFILL,
    },
    "tiny3": {"gqa_prefill": GQA_PREFILL},
}
BY_HAND = {
    ("tiny4", "decode 2"): TINY4_DECODE,
    ("tiny3", "decode 2"): TINY3_DECODE,
    ("tiny4", "prefill 64"): PREFILLS["tiny4"],
    ("tiny3", "prefill 64"): PREFILLS["tiny3"],
}


class PackedMaker(Maker):
    """Makes weights as the CPU's native kernels read them, in bf16."""

    def plain(self, *shape: int) -> Any:
        """See Maker."""
        return pack(self.noise(*shape) * 0.02, "bf16")

    def matrix(self, *shape: int, paired: bool = False, block: tuple[int, int] | None = None) -> Any:
        """See Maker."""
        return pack(self.noise(*shape) * 0.02, "bf16", paired=paired)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calls, "random_experts", lambda _, size: torch.tensor(CHOSEN * (size.rows // 2)))
    yield
    bind(KernelsConfig(), "cpu")


OF_IMAGES = {"image_attention", "gelu"}  # no step of text has them; tests/kernels/triton/test_triton_vision.py


def test_every_operation_that_is_no_composition_has_a_case() -> None:
    single = {name for name in operations() if not implementations(name, "cuda")[0].calls} - OF_IMAGES
    missing = single - set(CASES)
    assert not missing, f"bench/gpu/calls.py needs a case of {sorted(missing)}"
    assert set(CASES) == single


@pytest.mark.parametrize("operation", CASES)
def test_an_operation_runs_at_each_size_that_it_has(operation: str) -> None:
    ran = set()
    for model, size in itertools.product(MODELS.values(), SIZES.values()):
        for choice in implementations(operation, "cpu"):
            make = (PackedMaker if choice.name == "native" else Maker)(cold_bytes=0)
            if CASES[operation].has(model, size):
                _bind_all(choice.name)
                choice.load()(*CASES[operation].make(model, size, make)[0][0])
                ran.add(choice.name)
    assert ran == {choice.name for choice in implementations(operation, "cpu")}


def _bind_all(name: str) -> None:
    """Bind every operation that has this implementation to it."""
    named = [one for one in operations() if name in {choice.name for choice in implementations(one, "cpu")}]
    bind(KernelsConfig(implementations=dict.fromkeys(named, name)), "cpu")


def test_bytes_and_operations_are_those_counted_by_hand() -> None:
    counted = set()
    for (model, size), by_name in BY_HAND.items():
        for operation, by_hand in by_name.items():
            assert CASES[operation].has(MODELS[model], SIZES[size])
            _, work = CASES[operation].make(MODELS[model], SIZES[size], Maker(cold_bytes=0))
            assert (work.num_bytes, work.operations) == by_hand, (operation, model, size)
            counted.add(operation)
    assert counted == set(CASES)


@pytest.mark.parametrize("format", NUMBER_FORMATS)
def test_weights_are_counted_with_the_bytes_that_they_have(format: str) -> None:
    """The matrix has whole panels and groups: padding is the implementation's own."""
    plain = torch.ones(3, 64, 128).bfloat16()
    made = [pack(plain, format)] if format in PACKED_FORMATS and has_native() else []
    made += [quantise(plain, format)] if format in DEVICE_FORMATS else []
    for matrix in made:
        assert matrix.num_bytes == stored(format, 3 * 64, 128)


def test_a_shared_prefix_is_read_once_and_a_window_leaves_what_it_leaves() -> None:
    size = Size(name="", sequences=3, rows_each=1, context=100, shared=64)
    assert size.queries() == (3, 3 * 100, 3 * 36 + 64)
    assert size.queries(window=40) == (3, 3 * 40, 3 * 36 + 4)
    assert size.queries(window=30) == (3, 3 * 30, 3 * 30)
    assert Size(name="", sequences=2, rows_each=3, context=5).queries() == (6, 2 * (3 + 4 + 5), 2 * 5)


@pytest.mark.parametrize(
    "operation", ["mla_decode", "mla_prefill", "gqa_decode", "gqa_prefill", "write_latents", "gather_blocks"]
)
def test_cold_pages_fill_more_than_a_cache(operation: str) -> None:
    """Each call has its own, so that none finds its context where the one before left it."""
    cold_bytes, known = 1 << 18, CASES[operation]
    model, size = next(one for one in itertools.product(MODELS.values(), SIZES.values()) if known.has(*one))
    call, other = (known.make(model, size, Maker(cold_bytes=number)) for number in (cold_bytes, 0))
    pages = [one for arguments in call[0] for one in arguments if isinstance(one, torch.Tensor) and one.dim() > 2]
    pages = [one for one in pages if one.shape[1] == calls.BLOCK_TOKENS]
    assert sum({one.data_ptr(): one.nbytes for one in pages}.values()) >= cold_bytes
    assert len(call[0]) > len(other[0]) == 1
    assert call[1] == other[1]


def test_cold_weights_fill_more_than_a_cache() -> None:
    make = Maker(cold_bytes=1 << 14)
    assert len(make.cold(lambda: (make.matrix(32, 64),))) == (1 << 14) // (32 * 64 * 2) + 1
