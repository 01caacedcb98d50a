"""MLA's decoding and the product with each head's W_UV in one launch after attention, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ref import attention as ref
from cierzo.kernels.triton import mla, split, values
from cierzo.kernels.triton.split import Splits

H, R, P, V = 3, 32, 8, 24
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "WALKED", Splits(128, 1, 256, walked=(2, 2)))


def case(
    lengths: list[int], contexts: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, PagedQueries, Tensor]:
    random = torch.Generator().manual_seed(sum(contexts))
    pages = torch.randn(len(lengths) * 12, 32, R + P, generator=random).to(dtype)
    table = torch.randperm(len(pages), generator=random).view(len(lengths), 12).int()
    queries = PagedQueries.of(lengths, contexts, [*range(len(lengths))], table)
    q = torch.randn(sum(lengths) + 1, H, R + P, generator=random).to(dtype)  # the last row is padding
    return q, pages, queries, torch.randn(H, V, R, generator=random).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("live", [1, 4, 16])
def test_values_are_the_references_and_rounded_alike(
    live: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, pages, queries, w_uv = case([1, 1, 3, 1, 2], [1, 130, 300, 64, 65], dtype)
    monkeypatch.setattr(values, "live_tokens", lambda *_: live)
    found = values.mla_values(q, pages, queries, 0.2, w_uv)
    mixed = mla.mla_decode(q, pages, queries, 0.2, R)  # rounded to the dtype, as within the launch
    exact = torch.einsum("thr,hvr->thv", mixed.double(), w_uv.double())
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    wanted = ref.mla_values(q.float(), pages.float(), queries, 0.2, w_uv.float())
    torch.testing.assert_close(found.float(), wanted, rtol=3 * tolerance, atol=3 * tolerance)
    assert not found[-1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_programs_of_any_size(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, pages, queries, w_uv = case([1] * 9, [7, 130, 300, 64, 65, 380, 1, 2, 129], dtype)
    found = []
    for live in (1, 2, 16):
        monkeypatch.setattr(values, "live_tokens", lambda *_, live=live: live)
        found.append(values.mla_values(q, pages, queries, 0.2, w_uv))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone = PagedQueries.of([1], [300], [2], queries.block_tables)
    assert torch.equal(values.mla_values(q[2:3].clone(), pages, alone, 0.2, w_uv)[0], found[0][2])


def test_rounds_store_their_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, pages, queries, w_uv = case([1, 1, 3, 1], [200, 130, 300, 64], torch.float32)
    whole = values.mla_values(q, pages, queries, 0.2, w_uv)
    queries = PagedQueries.of([1, 1, 3, 1], [200, 130, 300, 64], [0, 1, 2, 3], queries.block_tables)
    monkeypatch.setattr(split, "PARTIAL_BYTES", 1)
    monkeypatch.setattr(values, "live_tokens", lambda *_: 4)
    assert torch.equal(values.mla_values(q, pages, queries, 0.2, w_uv), whole)


def test_tokens_of_a_program() -> None:
    found = [values.live_tokens(tokens, 32) for tokens in (0, 1, 16, 17, 64, 65, 256, 4096)]
    assert found == [1, 1, 1, 2, 4, 8, 16, 16]
    q, pages, queries, _ = case([1], [5], torch.float32)
    with pytest.raises(ArgumentError, match="w_uv is packed; on a GPU it must be a tensor"):
        values.mla_values(q, pages, queries, 0.2, object())  # type: ignore[arg-type]
