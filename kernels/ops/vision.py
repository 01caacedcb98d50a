"""Operations of an image's tower that a text model has not.

Letters: T patches of one image, H heads, d their width, M rows, N values of a row.
"""

from __future__ import annotations

from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.registry import bound


def image_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """softmax(q keys^T * scale) values, head by head, every row seeing all of them -> new [T,H,d], in q's dtype.

    q, keys, values [T,H,d] of one dtype, bf16 or fp32; rows may be strided, the heads of a row lie side by side.
    The softmax is fp32. An image is a call of its own: patches of another would be seen as well. T is at least 1.
    """
    names = check.sizes("image_attention", q=(q, "T H d"), keys=(keys, "T H d"), values=(values, "T H d"))
    check.same_dtype("image_attention", q=q, keys=keys, values=values)
    check.require("image_attention", names["T"] > 0, "there are no rows")
    for name, x in (("q", q), ("keys", keys), ("values", values)):
        together = x.stride(2) == 1 and x.stride(1) == names["d"]
        check.require("image_attention", together, f"heads of {name} must lie side by side, strides {x.stride()}")
    return bound.image_attention(q, keys, values, scale)


def gelu(x: Tensor) -> Tensor:
    """x/2 (1 + erf(x / sqrt 2)), computed in fp32 and rounded once -> new [M,N], in x's dtype, bf16 or fp32.

    The exact form, not the one by tanh. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
    """
    check.sizes("gelu", x=(x, "M N"))
    return bound.gelu(x)
