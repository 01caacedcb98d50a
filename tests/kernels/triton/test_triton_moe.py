"""The experts' grouped launches in Triton's interpreter, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cierzo.kernels.formats import fp8
from cierzo.kernels.formats.definition import as_tensor
from cierzo.kernels.formats.device import DeviceMatrix, dequantise, quantise
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ref import moe as ref
from cierzo.kernels.triton import heuristics, moe

D, F, E = 128, 64, 5
FORMATS = ["plain", "fp8", "fp8 woven", "nvfp4", "mxfp4"]
# Relative to the largest output: fp32 in another order of addition; bf16 rounds what lies between the two products,
# an expert's output and the sum, each by up to 2^-8 of itself.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


def random_experts(format: str, dtype: torch.dtype, inner: int = F, unused: tuple[int, ...] = ()) -> list[Matrix]:
    """gate_up, down and the shared expert's; the weights of `unused` experts, or their scales, are NaN."""
    random = torch.Generator().manual_seed(7)
    shapes = (E, 2 * inner, D), (E, D, inner), (2 * inner, D), (D, inner)
    made: list[Matrix] = []
    for shape in shapes:
        values = torch.randn(*shape, generator=random).to(dtype)
        matrix = values if format == "plain" else quantise(values, format.split()[0])
        if format == "fp8 woven":
            assert isinstance(matrix, DeviceMatrix)
            matrix = fp8.weave(matrix)
        for expert in unused if len(shape) == 3 else ():
            poison(matrix, expert)
        made.append(matrix)
    return made


def poison(matrix: Matrix, expert: int) -> None:
    assert isinstance(matrix, DeviceMatrix | Tensor)
    if isinstance(matrix, Tensor):
        matrix[expert] = torch.nan
        return
    for tensor in (matrix.codes, matrix.scales, matrix.row_scales):
        if tensor is not None:
            tensor[expert].view(torch.uint8).fill_(0xFF)


def tokens_of(count: int, dtype: torch.dtype) -> Tensor:
    """Strided, aligned to 16 bytes, beside NaN."""
    wide = torch.full((count, D + 16), torch.nan)
    wide[:, :D] = torch.randn(count, D, generator=torch.Generator().manual_seed(count))
    return wide.to(dtype)[:, :D]


def choose(count: int, slots: int, experts: list[int]) -> Tensor:
    """int64 [count, slots]: distinct experts of a list, at random."""
    random = torch.Generator().manual_seed(count)
    rows = [torch.randperm(len(experts), generator=random)[:slots] for _ in range(count)]
    return torch.tensor(experts)[torch.stack(rows)] if rows else torch.zeros(0, slots, dtype=torch.int64)


def run(x: Tensor, ids: Tensor, weights: Tensor, matrices: list[Matrix], shared: bool) -> tuple[Tensor, Tensor]:
    """The kernels' result, and the reference's in fp32."""
    order, starts = ref.group_by_expert(ids, E)
    shared_matrices: list[Matrix | None] = [*matrices[2:]] if shared else [None, None]
    result = moe.expert_mlp(x, matrices[0], matrices[1], weights, order, starts, *shared_matrices)
    gate_up, down = wide(matrices[0]), wide(matrices[1])
    plain_shared = [wide(matrix) if shared else None for matrix in matrices[2:]]
    return result, ref.expert_mlp(x.float(), gate_up, down, weights, order, starts, *plain_shared)


def wide(matrix: Matrix) -> Tensor:
    """Not rounded to bf16: kernels do not."""
    return dequantise(matrix) if isinstance(matrix, DeviceMatrix) else as_tensor(matrix).float()


def close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    bound = TOLERANCE[dtype] * expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(result.float(), expected, rtol=0.0, atol=bound)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tokens", "slots", "shared"), [(0, 2, True), (1, 3, False), (2, 1, True), (33, 3, True)])
def test_expert_mlp(tokens: int, slots: int, shared: bool, format: str, dtype: torch.dtype) -> None:
    matrices = random_experts(format, dtype, unused=(1, 4))
    weights = torch.rand(tokens, slots, generator=torch.Generator().manual_seed(0))
    result, expected = run(tokens_of(tokens, dtype), choose(tokens, slots, [0, 2, 3]), weights, matrices, shared)
    close(result, expected, dtype)


@pytest.mark.parametrize("expert", [0, 2, E - 1])
def test_all_tokens_to_one_expert(expert: int) -> None:
    others = tuple(e for e in range(E) if e != expert)
    matrices = random_experts("plain", torch.bfloat16, unused=others)
    ids = torch.full((130, 1), expert)  # more than two tiles
    result, expected = run(tokens_of(130, torch.bfloat16), ids, torch.rand(130, 1), matrices, shared=True)
    close(result, expected, torch.bfloat16)


@pytest.mark.parametrize("inner", [48, 33, 8])
def test_widths_that_are_no_whole_tiles(inner: int) -> None:
    for dtype in TOLERANCE:
        matrices = random_experts("plain", dtype, inner)
        result, expected = run(tokens_of(5, dtype), choose(5, 2, [*range(E)]), torch.rand(5, 2), matrices, True)
        close(result, expected, dtype)


def test_a_shared_expert_of_another_width_or_format() -> None:
    dtype = torch.bfloat16
    x, ids, weights = tokens_of(5, dtype), choose(5, 2, [*range(E)]), torch.rand(5, 2)
    routed = random_experts("nvfp4", dtype)
    for other in (random_experts("plain", dtype), random_experts("nvfp4", dtype, inner=32)):
        result, expected = run(x, ids, weights, [*routed[:2], *other[2:]], shared=True)
        close(result, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", ["plain", "fp8", "nvfp4"])
def test_a_token_has_the_same_bits_alone_and_in_company(format: str, dtype: torch.dtype) -> None:
    matrices, x, ids = random_experts(format, dtype), tokens_of(70, dtype), choose(70, 2, [0, 1, 3])
    weights = torch.rand(70, 2, generator=torch.Generator().manual_seed(0))
    together, _ = run(x, ids, weights, matrices, shared=True)
    again, _ = run(x, ids, weights, matrices, shared=True)
    assert torch.equal(together, again)
    for row in (0, 35, 69):
        one = slice(row, row + 1)
        alone, _ = run(x[one], ids[one], weights[one].clone(), matrices, shared=True)  # .clone: aligned
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", ["plain", "fp8"])
@pytest.mark.parametrize(("tokens", "shared"), [(1, False), (5, True), (20, True)])
def test_descriptors_read_the_same(
    tokens: int, shared: bool, format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; a tile's rows may reach into those of the next expert, and past the last."""
    matrices = random_experts(format, dtype, unused=(1, 4))
    x, ids = tokens_of(tokens, dtype), choose(tokens, 2, [0, 2, 3])
    weights = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(0))
    by_pointers, _ = run(x, ids, weights, matrices, shared)
    found: list[set[str]] = []
    original = moe.launch

    def launch(configuration: Any, *arguments: Any, **named: Any) -> None:
        found.append(set(configuration.blocks))
        original(configuration, *arguments, **named)

    monkeypatch.setattr(moe, "launch", launch)
    monkeypatch.setattr(heuristics, "DESCRIBED_TOKENS", tokens)
    described, _ = run(x, ids, weights, matrices, shared)
    assert torch.equal(by_pointers, described)
    both = {"codes_ptr", "shared_codes_ptr"} if shared else {"codes_ptr"}
    assert found == [both, both | {"inner_ptr"}]


def test_values_beyond_fp16() -> None:
    x = torch.full((2, D), 100.0).bfloat16()
    matrices = random_experts("plain", torch.bfloat16)
    result, expected = run(x, choose(2, 2, [0, 1]), torch.rand(2, 2), matrices, shared=True)
    assert expected.abs().max() > 65504
    close(result, expected, torch.bfloat16)


def test_the_grid_has_a_program_for_every_tile() -> None:
    """And no more than one too many for an expert, however the tokens choose."""
    random = torch.Generator().manual_seed(0)
    for tokens in (0, 1, 3, 64, 65, 700):
        for slots in (1, 4):
            most = moe.most_tiles(tokens, slots, 128, 64, shared=False)
            for experts in (1, 5, 128):
                counts = torch.randint(0, experts, (tokens * slots,), generator=random).bincount(minlength=128)
                assert int(((counts + 63) // 64).sum()) <= most
    assert moe.most_tiles(1, 4, 128, 64, shared=True) == 5
    assert moe.most_tiles(8192, 4, 128, 64, shared=False) == 128 + (32768 - 128) // 64
