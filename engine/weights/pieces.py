"""Stored tensors -> the matrices of a parameter, mapped: nothing of them is read yet."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cierzo.engine.weights.companions import PACKED, Role
from cierzo.engine.weights.grids import GridMatrix
from cierzo.engine.weights.plan import ParameterPlan, Piece
from cierzo.engine.weights.quantised import Nvfp4Matrix, ScaledMatrix, StoredMatrix
from cierzo.engine.weights.reader import CheckpointReader


def stored_matrices(reader: CheckpointReader, plan: ParameterPlan) -> tuple[tuple[StoredMatrix, ...], ...]:
    """The matrices of each expert, or of a parameter that is one, one above the other."""
    whole = plan.experts[0][0]
    if len(plan.spec.shape) == 3 and not plan.apart:  # a stack of experts, whose gate and up share a scale
        return tuple((matrix,) for matrix in _each(reader, whole))
    if plan.reordered:
        rows, heads = plan.spec.shape[0], plan.spec.rotated_heads or 1
        return ((next(_each(reader, whole, halves_first(rows, heads))),),)
    return tuple(tuple(next(_each(reader, piece)) for piece in pieces) for pieces in plan.experts)


def halves_first(rows: int, heads: int) -> Tensor:
    """int64 [rows]: for each row in the order of (i, i + d/2) pairs, its place in that of (2i, 2i+1) pairs.

    [heads, d/2, 2] -> [heads, 2, d/2]: rotary pairs of Mistral-native wq and wk lie next to each other.
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _each(reader: CheckpointReader, piece: Piece, order: Tensor | None = None) -> Iterator[StoredMatrix]:
    """The [n,k] of a piece, or each expert's of a stack."""
    tensors = {role: reader.read(tensor.name) for role, tensor in piece.scales.items()}
    codes = reader.read(piece.tensor.name)
    if codes.dim() == 4:  # experts' rows in blocks
        codes = codes.flatten(2)
    if len(piece.shape or piece.tensor.shape) == 2:
        yield _matrix(piece, "", codes, tensors, order)
        return
    for expert, of_expert in enumerate(codes):
        alone = {role: tensor if role == "shape" else tensor[expert] for role, tensor in tensors.items()}
        yield _matrix(piece, f"[{expert}]", of_expert, alone, order)


def _matrix(
    piece: Piece, place: str, codes: Tensor, tensors: dict[Role, Tensor], order: Tensor | None
) -> StoredMatrix:
    """The [n,k] of codes and what lies beside them. place: of an expert in its stack."""
    group = piece.group
    name = piece.tensor.name
    if group is None:
        return ScaledMatrix(name + place, codes, order=order)
    scale_name = piece.scales["scale"].name + place
    activations = tensors["activation scale"].reshape(1) if "activation scale" in tensors else None
    if group.storage == "nvfp4":
        return Nvfp4Matrix(name.removesuffix(PACKED) + place, codes, tensors["scale"], tensors["global scale"])
    if group.storage == "fp8" and group.strategy == "tensor":
        return ScaledMatrix(name + place, codes, tensors["scale"].reshape(1), scale_name, order, activations)
    n, k = piece.shape[-2:]
    return GridMatrix(
        name + place,
        group,
        (n, k),
        codes,
        tensors["scale"],
        scale_name,
        torch.arange(n) if order is None else order,
        (0, k),
        tensors.get("zero point"),
        tensors.get("shape"),
        activations if group.storage == "fp8" else None,
    )
