"""Norms, rope and dense products against fp64 formulas, as near as their roundings leave them."""

from __future__ import annotations

import pytest
import torch
from rounding import SUM, Near, assert_near, exact, gated_mlp, product, rounded, times, total
from torch import Tensor

from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.ops import linear, norm, rope
from cierzo.kernels.registry import bind, implementations

DTYPES = [torch.float32, torch.bfloat16]


def use(operation: str, name: str) -> None:
    bind(KernelsConfig(implementations={operation: name}), "cpu")


def choices(operation: str) -> list[str]:
    return [row.name for row in implementations(operation, "cpu")]


def random_rows(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A strided view."""
    values = torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)[:, 1 : width + 1]


def normed(x: Tensor, weight: Tensor, eps: float) -> Near:
    """Mean of squares, root and product in fp32; the row is rounded before it meets the weight, and after."""
    wide = x.double()
    value = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    row = rounded(Near(value, (x.shape[1] + 6) * SUM * value.abs()), x.dtype)
    return rounded(times(row, exact(weight)), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("implementation", choices("rms_norm"))
def test_rms_norm(implementation: str, rows: int, dtype: torch.dtype) -> None:
    use("rms_norm", implementation)
    x, weight = random_rows(rows, 13, dtype), random_rows(1, 13, dtype, 1)[0]
    before = x.clone()
    result = norm.rms_norm(x, weight, 0.1)
    assert result.dtype == dtype
    assert_near(result, normed(x, weight, 0.1))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", choices("add_rms_norm"))
def test_add_rms_norm(implementation: str, dtype: torch.dtype) -> None:
    use("add_rms_norm", implementation)
    x, residual = random_rows(5, 13, dtype), random_rows(5, 13, dtype, 1).contiguous()
    weight = random_rows(1, 13, dtype, 2)[0]
    summed = x + residual
    result = norm.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, summed)
    assert result.dtype == dtype
    assert_near(result, normed(summed, weight, 1e-6))


# Small 4's inverse frequencies, as transformers and vLLM compute them
SMALL4 = """
1.000000e+00 7.498942e-01 5.623413e-01 4.216965e-01 3.162278e-01 2.371374e-01 1.778279e-01 1.333521e-01
1.000000e-01 7.498942e-02 5.623413e-02 4.216965e-02 3.162278e-02 2.190385e-02 1.506835e-02 1.028190e-02
6.947115e-03 4.637266e-03 3.048268e-03 1.964031e-03 1.231464e-03 7.424794e-04 4.210589e-04 2.139725e-04
8.413462e-05 5.858549e-06 4.393292e-06 3.294504e-06 2.470529e-06 1.852636e-06 1.389281e-06 1.041814e-06
"""


def test_yarn_frequencies_of_small4() -> None:
    expected = torch.tensor([float(word) for word in SMALL4.split()], dtype=torch.float64)
    inv_freq = rope.yarn_inv_freq(64, 10000.0, 128.0, 8192, 32.0, 1.0)
    assert inv_freq.dtype == torch.float32
    torch.testing.assert_close(inv_freq.double(), expected, rtol=5e-7, atol=0.0)


def test_default_frequencies() -> None:
    torch.testing.assert_close(rope.default_inv_freq(8, 10000.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))


@pytest.mark.parametrize("implementation", choices("rope_tables"))
def test_rope_tables(implementation: str) -> None:
    use("rope_tables", implementation)
    positions, inv_freq = torch.tensor([0, 3, 262143]), torch.tensor([1.0, 0.25])
    cos, sin = rope.rope_tables(positions, inv_freq, 1.5)
    angles = positions.double()[:, None] * inv_freq.double()
    torch.testing.assert_close(cos.double(), angles.cos() * 1.5, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(sin.double(), angles.sin() * 1.5, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("implementation", choices("apply_rope"))
def test_apply_rope(implementation: str, interleaved: bool, dtype: torch.dtype) -> None:
    """In place on the last values of each head, as complex numbers; the others stay."""
    use("apply_rope", implementation)
    heads = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = heads.clone()
    angles = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    x = heads[..., 3:]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    cos, sin = exact(angles.cos()[:, None]), exact(angles.sin()[:, None])
    turned = (
        total(times(exact(first), cos), times(exact(-second), sin)),
        total(times(exact(second), cos), times(exact(first), sin)),
    )
    parts = [torch.stack(both, -1) for both in zip(*turned, strict=True)]
    joined = [part.flatten(-2) if interleaved else torch.cat(part.unbind(-1), -1) for part in parts]
    rope.apply_rope(heads[..., 3:], angles.cos(), angles.sin(), interleaved)
    assert_near(heads[..., 3:], rounded(Near(*joined), dtype))
    assert torch.equal(heads[..., :3], before[..., :3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_dense_products(rows: int, dtype: torch.dtype) -> None:
    x = random_rows(rows, 11, dtype)
    gate, up = random_rows(7, 11, dtype, 1), random_rows(7, 11, dtype, 2)
    down = random_rows(11, 7, dtype, 3)
    expected = product(exact(x), gate)
    for implementation in choices("linear"):
        use("linear", implementation)
        result = linear.linear(x, gate)
        assert result.dtype == dtype
        assert_near(result, rounded(expected, dtype))
    for implementation in choices("lm_head"):
        use("lm_head", implementation)
        logits = linear.lm_head(x, gate)
        assert logits.dtype == torch.float32
        assert_near(logits, rounded(expected, dtype if implementation == "torch" else torch.float32))
    for implementation in choices("gated_mlp"):
        use("gated_mlp", implementation)
        gate_up = torch.cat([gate, up])
        inner = gated_mlp(exact(x), gate_up, down, dtype, each=implementation == "torch")
        assert_near(linear.gated_mlp(x, gate_up, down), rounded(inner, dtype))
