"""Parameters of a model, between the checkpoint that stores them and the model that computes with them.

A model says which parameters it expects (`ParameterSpec`); engine/weights loads them (`Parameter`), and the model
takes them from a view (`Parameters`), which has a `MatrixSource` give every matrix in the form that kernels want.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.kernels.formats.number_formats import MatrixRole as MatrixRole
from cierzo.kernels.formats.packed import Matrix

AllReduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter that a model expects, and how it is cut among ranks.

    shape: the whole, unsharded shape, as the checkpoint stores it ([out, in] for a linear layer).
    shard_axis: the axis cut into `world` equal slices; None: every rank holds the whole.
    sections: how many equal sections the shard axis consists of, each cut on its own (2 for a fused gate_up,
        so that a rank gets its slice of the gate and its slice of the up projection, in this order).
    tied_to: the parameter that takes this one's place (of the head, the embedding) where the checkpoint stores this
        one not at all or with the same values. With values of its own it is loaded, as transformers 5 loads it.
    rotated_heads: how many heads the rows consist of whose values the rotary embedding pairs as (i, i + d/2).
        Mistral-native checkpoints store such rows in the order of pairs (2i, 2i+1), and are brought into this one.
    """

    shape: tuple[int, ...]
    shard_axis: int | None = None
    sections: int = 1
    tied_to: str | None = None
    rotated_heads: int | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's place among `world` ranks, and the sum of a tensor over all of them."""

    rank: int
    world: int
    all_reduce: AllReduce

    def width(self, whole: int, field: str) -> int:
        """This rank's share of a divided width. Raises CheckpointError if it does not divide."""
        if whole % self.world:
            raise CheckpointError(
                f"{field} {whole} cannot be divided among {self.world} ranks",
                field=field,
                limit=f"a multiple of {self.world}",
                value=whole,
            )
        return whole // self.world


class LazyParameter(Protocol):
    """A parameter [n,k] or [E,n,k] whose values are computed when they are asked for, each time anew."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, k) or (E, n, k)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `tensor()`."""
        ...

    def __getitem__(self, rows: slice) -> LazyParameter:
        """A stretch of the first axis."""
        ...

    def tensor(self) -> Tensor:
        """All values, in memory of their own."""
        ...

    def joined(self, parts: Sequence[Parameter]) -> LazyParameter:
        """`parts`, of which this is one, joined along n."""
        ...


Parameter = Tensor | LazyParameter


def as_tensor(parameter: Parameter) -> Tensor:
    """The values of a parameter."""
    return parameter if isinstance(parameter, Tensor) else parameter.tensor()


def above_each_other(parts: Sequence[Parameter]) -> Parameter:
    """[n,k] parameters, or [E,n,k] ones, joined along n."""
    if len(parts) == 1:
        return parts[0]
    for part in parts:
        if not isinstance(part, Tensor):
            return part.joined(parts)
    return torch.cat([as_tensor(part) for part in parts], dim=-2)


@dataclass(frozen=True, slots=True)
class MatrixRequest:
    """A matrix that a model wants, before anybody knows its number format.

    key: names it among the model's matrices, such as "model.layers.3.self_attn.o_proj". shape: [n,k] or [E,n,k].
    make: gives its values; called at most once, and not at all where the matrix was packed at an earlier start.
    paired: a gate above an up projection, whose rows a kernel reads in pairs. role: decides the number format.
    parts: the parameters that `make` reads.
    """

    key: str
    shape: tuple[int, ...]
    make: Callable[[], Parameter]
    paired: bool = False
    role: MatrixRole = "linear"
    parts: tuple[Parameter, ...] = ()


class MatrixSource(Protocol):
    """Gives a model its matrices, in whatever form the kernels want them, and its other tensors, where they run."""

    def tensor(self, stored: Parameter) -> Tensor:
        """A parameter that nothing is multiplied with: norms, the embedding."""
        ...

    def matrix(self, request: MatrixRequest) -> Matrix:
        """The matrix that is asked for; `request.make` may be called now, later or never."""
        ...


class PlainMatrices:
    """Gives matrices as they are, as plain tensors: what the plain-torch reference multiplies with."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    def tensor(self, stored: Parameter) -> Tensor:
        """The tensor itself, on the device."""
        return as_tensor(stored).to(self._device)

    def matrix(self, request: MatrixRequest) -> Matrix:
        """The values that are stored, on the device."""
        return as_tensor(request.make()).to(self._device)


class Parameters:
    """A layer's view of the model's parameters: `Parameters(all, matrices, "layers.3.")["mlp.gate.weight"]`."""

    def __init__(self, parameters: Mapping[str, Parameter], matrices: MatrixSource, prefix: str = "") -> None:
        self._parameters = parameters
        self._matrices = matrices
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        """The values of a parameter that is used as it is, where the model runs."""
        return self._matrices.tensor(self.stored(name))

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._parameters

    def stored(self, name: str) -> Parameter:
        """A parameter as it was loaded, on the host: a matrix is carried nowhere before its format is known."""
        return self._parameters[self._prefix + name]

    def within(self, prefix: str) -> Parameters:
        """The view one level down."""
        return Parameters(self._parameters, self._matrices, self._prefix + prefix)

    def matrix(self, *names: str, paired: bool = False, role: MatrixRole = "linear") -> Matrix:
        """The named parameters, one above the other along their rows."""
        parts = tuple(self.stored(name) for name in names)
        shape = (*parts[0].shape[:-2], sum(part.shape[-2] for part in parts), parts[0].shape[-1])
        make = partial(above_each_other, parts)
        return self.derived(MatrixRequest(" + ".join(names), shape, make, paired, role, parts))

    def derived(self, request: MatrixRequest) -> Matrix:
        """A matrix made of this layer's parameters; its key is prefixed with the layer's."""
        return self._matrices.matrix(replace(request, key=self._prefix + request.key))
