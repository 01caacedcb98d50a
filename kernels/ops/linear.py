"""Dense products. Letters: T tokens, D hidden width, F MLP width, N outputs, M rows, vocab.

A DeviceMatrix whose `activations` are "fp8" is multiplied with rows in FP8 (formats/activations.py), by its static
scales or each row by its own. Rows may come quantised already, by those scales (norm.rms_norm_fp8); what lies
between the products of an MLP may be rounded to the dtype before it is quantised.
"""

from __future__ import annotations

from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.formats.activations import Rows, takes_fp8
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.registry import bound


def linear(x: Rows, weight: Matrix) -> Tensor:
    """x @ weight^T -> new [T,N], in x's dtype. x [T,D], weight [N,D], one dtype, fp32 accumulation."""
    check.sizes("linear", x=(x, "T D"), weight=(weight, "N D"))
    check.same_dtype("linear", x=x, weight=weight)
    _check_rows("linear", x, weight)
    return bound.linear(x, weight)


def linear_terms(x: Rows, weight: Matrix) -> Summands:
    """linear, or its terms, where a kernel computes them apart: for operations that add terms as they read them."""
    check.sizes("linear_terms", x=(x, "T D"), weight=(weight, "N D"))
    check.same_dtype("linear_terms", x=x, weight=weight)
    _check_rows("linear_terms", x, weight)
    return bound.linear_terms(x, weight)


def lm_head(hidden: Tensor, weight: Matrix) -> Tensor:
    """Logits of the rows that sample -> fp32 [M,N]. hidden [M,D], weight [N,D] of one dtype."""
    check.sizes("lm_head", hidden=(hidden, "M D"), weight=(weight, "N D"))
    check.same_dtype("lm_head", hidden=hidden, weight=weight)
    return bound.lm_head(hidden, weight)


def gated_mlp(x: Rows, gate_up: Matrix, down: Matrix) -> Tensor:
    """(silu(x gate^T) * (x up^T)) down^T -> new [T,D]. x [T,D], gate_up [2F,D], down [D,F], one dtype.

    The first F rows of gate_up are the gate; a PackedMatrix of it is `paired`. With Small 4's weights the product
    may exceed fp16's range: no implementation may compute it in fp16.
    Source: Shazeer 2020, arXiv 2002.05202 (SwiGLU).
    """
    names = check.sizes("gated_mlp", x=(x, "T D"), gate_up=(gate_up, "G D"), down=(down, "D F"))
    check.require("gated_mlp", names["G"] == 2 * names["F"], f"gate_up {list(gate_up.shape)} is not [2F,D]")
    check.same_dtype("gated_mlp", x=x, gate_up=gate_up, down=down)
    _check_rows("gated_mlp", x, gate_up)
    return bound.gated_mlp(x, gate_up, down)


def _check_rows(operation: str, x: Rows, weight: Matrix) -> None:
    check.require(
        operation, isinstance(x, Tensor) or takes_fp8(weight), "x is quantised, and the weights take it as it is"
    )
