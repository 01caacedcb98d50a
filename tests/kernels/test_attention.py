"""Every implementation of attention passes the same hostile cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from paged_cases import SEGMENTS, PagedCase, assert_attends, attend, expanded, make_case, make_queries
from rounding import Near, assert_near
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.ops import attention
from cierzo.kernels.ref import attention as ref
from cierzo.kernels.registry import bind, has_native, implementations

DTYPES = [torch.float32, torch.bfloat16]
H, NOPE, P, R, V = 3, 6, 4, 10, 7
SCALE = 0.3


def use(operation: str, name: str) -> None:
    bind(KernelsConfig(implementations={operation: name}), "cpu")


def choices(*operations: str) -> list[object]:
    """One test per implementation on this machine's CPU."""
    return [
        pytest.param(operation, row.name, id=f"{operation}-{row.name}")
        for operation in operations
        for row in implementations(operation, "cpu")
    ]


def run_twice(compute: Callable[[], Tensor], pages: list[Tensor]) -> Tensor:
    """The same bits both times, and nothing written into the pages."""
    before = [page.clone() for page in pages]
    first, second = compute(), compute()
    assert torch.equal(first, second)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, pages, strict=True))
    return first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_is_tight(dtype: torch.dtype) -> None:
    """It holds for scores and sums in fp32, not where a token is lost or scores are a tenth off."""
    case = make_case("decode_unequal", 8, 2, dtype, entry=(2, 2, 8))
    both = [context.unbind(1) for context in case.contexts]
    expected = attend(case.q, case.queries, both, SCALE)

    def attended(seen: slice = slice(None), factor: float = 1.0) -> Tensor:
        result = torch.zeros(expected.value.shape, dtype=dtype)
        for row, (k, v) in enumerate(both):
            scores = torch.einsum("hd,chd->hc", case.q[row].float(), k[seen].float()) * SCALE * factor
            weights = scores.softmax(-1).to(dtype).float()
            result[row] = torch.einsum("hc,chd->hd", weights, v[seen].float()).to(dtype)
        return result

    assert_near(attended(), expected)
    for wrong in (attended(slice(1, None)), attended(slice(None, -1)), attended(factor=1.1)):
        for row in range(3, 7):  # contexts of 6 to 64 tokens
            one = Near(expected.value[row : row + 1], expected.error[row : row + 1])
            with pytest.raises(AssertionError, match="times as far"):
                assert_near(wrong[row : row + 1], one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize(("operation", "implementation"), choices("gqa_prefill", "gqa_decode"))
def test_gqa(operation: str, implementation: str, name: str, dtype: torch.dtype) -> None:
    use(operation, implementation)
    group, shared, width = 3, 2, 8
    case = make_case(name, width, group * shared, dtype, entry=(2, shared, width))
    keys, values = case.pages[:, :, 0].contiguous(), case.pages[:, :, 1].contiguous()
    call = getattr(attention, operation)
    result = run_twice(lambda: call(case.q, keys, values, case.queries, SCALE), [keys, values])
    both = [context.repeat_interleave(group, dim=2).unbind(1) for context in case.contexts]
    assert_attends(result, case, both, SCALE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize(("operation", "implementation"), choices("mla_decode"))
def test_mla_decode(operation: str, implementation: str, name: str, dtype: torch.dtype) -> None:
    use(operation, implementation)
    case = make_case(name, R + P, H, dtype, entry=(R + P,))
    result = run_twice(lambda: attention.mla_decode(case.q, case.pages, case.queries, SCALE, rank=R), [case.pages])
    keys = [c[:, None].expand(-1, H, -1) for c in case.contexts]
    assert_attends(result, case, [(k, k[..., :R]) for k in keys], SCALE)


def kv_weights(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    return tuple((torch.randn(H, n, R, generator=random) * 0.3).to(dtype) for n in (NOPE, V))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize(("operation", "implementation"), choices("mla_prefill"))
def test_mla_prefill(operation: str, implementation: str, name: str, dtype: torch.dtype) -> None:
    use(operation, implementation)
    case = make_case(name, NOPE + P, H, dtype, entry=(R + P,))
    w_uk, w_uv = kv_weights(dtype)
    result = run_twice(
        lambda: attention.mla_prefill(case.q, case.pages, w_uk, w_uv, case.queries, SCALE), [case.pages]
    )
    assert_attends(result, case, [expanded(context, w_uk, w_uv, dtype) for context in case.contexts], SCALE)


def test_both_forms_of_mla_agree() -> None:
    bind(KernelsConfig(), "cpu")
    case = make_case("mixed", NOPE + P, H, torch.float32, entry=(R + P,))
    w_uk, w_uv = kv_weights(torch.float32)
    expanded = attention.mla_prefill(case.q, case.pages, w_uk, w_uv, case.queries, SCALE)
    wide = attention.mla_absorb(case.q, w_uk.transpose(1, 2))
    mixed = attention.mla_decode(wide, case.pages, case.queries, SCALE, R)
    torch.testing.assert_close(attention.mla_unabsorb(mixed, w_uv), expanded, rtol=1e-5, atol=1e-5)


def test_masks_of_long_prompts_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from cierzo.kernels.ref import attention as ref

    bind(KernelsConfig(), "cpu")
    case = make_case("chunk_after_context", 8, 2, torch.float32, entry=(2, 2, 8))
    keys, values = case.pages[:, :, 0].contiguous(), case.pages[:, :, 1].contiguous()
    whole = attention.gqa_prefill(case.q, keys, values, case.queries, SCALE)
    monkeypatch.setattr(ref, "MASK_ELEMENTS", 62)  # two rows of 31 at a time
    cut = attention.gqa_prefill(case.q, keys, values, case.queries, SCALE)
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("operation", "implementation"), choices("write_latents"))
def test_write_latents(operation: str, implementation: str) -> None:
    use(operation, implementation)
    pages = torch.full((4, 3, R + P), float("nan"))
    wide = torch.randn(3, R + P + 2)
    latents, rope_keys = wide[:, :R], wide[:, R : R + P]
    attention.write_latents(pages, torch.tensor([7, 0, 11]), latents, rope_keys)
    flat = pages.view(12, -1)
    assert torch.equal(flat[[7, 0, 11]], wide[:, : R + P])
    flat[[7, 0, 11]] = float("nan")
    assert flat.isnan().all()


@pytest.mark.parametrize(("operation", "implementation"), choices("write_keys_values"))
def test_write_keys_values(operation: str, implementation: str) -> None:
    use(operation, implementation)
    k_pages, v_pages = torch.full((2, 4, 3, 2, 4), float("nan")).unbind()
    wide = torch.randn(2, 4, 4)
    attention.write_keys_values(k_pages, v_pages, torch.tensor([9, 2]), wide[:, :2], wide[:, 2:])
    for pages, written in ((k_pages, wide[:, :2]), (v_pages, wide[:, 2:])):
        assert torch.equal(pages[3, 0], written[0])
        assert torch.equal(pages[0, 2], written[1])
        assert pages.isnan().sum() == pages.numel() - written.numel()


def paged(q_width: int = R + P) -> PagedCase:
    bind(KernelsConfig(), "cpu")
    return make_case("mixed", q_width, H, torch.float32, entry=(R + P,))


def test_errors_name_operation_argument_and_size() -> None:
    case = paged(q_width=R)
    with pytest.raises(ArgumentError, match=rf"mla_decode: pages .* must be {R} wide"):
        attention.mla_decode(case.q, case.pages, case.queries, SCALE, R)
    case = paged()
    with pytest.raises(ArgumentError, match=r"mla_decode: pages has dtype torch.bfloat16, q has torch.float32"):
        attention.mla_decode(case.q, case.pages.bfloat16(), case.queries, SCALE, R)
    with pytest.raises(ArgumentError, match="segments have 24 rows, q has 20"):
        attention.mla_decode(case.q[:20], case.pages, case.queries, SCALE, R)
    case.queries.contexts[1] = 11
    with pytest.raises(ArgumentError, match="12 rows in a context of 11"):
        attention.mla_decode(case.q, case.pages, case.queries, SCALE, R)


def test_fp8_pages_are_read_and_written_by_the_reference_and_refused_by_name_elsewhere() -> None:
    """Values that e4m3 holds come back as they were; what is too large is clamped."""
    random = torch.Generator().manual_seed(1)
    cached = torch.randn(20, 12, generator=random).to(torch.float8_e4m3fn).float()
    plain, pages = torch.zeros(5, 4, 12), torch.zeros(5, 4, 12).to(torch.float8_e4m3fn)
    slots = torch.randperm(20, generator=random)
    for memory in (plain, pages):
        ref.write_latents(memory, slots, cached[:, :8], cached[:, 8:])
    assert torch.equal(pages.float(), plain)
    queries = make_queries([(1, 20)], torch.tensor([0]), torch.arange(5, dtype=torch.int32)[None])
    q = torch.randn(1, 3, 12, generator=random)
    got = ref.mla_decode(q, pages, queries, 0.3, 8)
    assert torch.equal(got, ref.mla_decode(q, plain, queries, 0.3, 8))
    ref.write_latents(pages, slots[:1], torch.full((1, 8), 1e9), torch.full((1, 4), -float("inf")))
    assert pages.float().view(20, 12)[slots[0]].tolist() == [448.0] * 8 + [-448.0] * 4
    if has_native():
        from cierzo.kernels.cpu.launch import attention as native

        with pytest.raises(
            ArgumentError, match=r"pages have dtype torch\.float8_e4m3fn; on a CPU they are torch\.float32"
        ):
            native.mla_decode(q, pages, queries, 0.3, 8)
