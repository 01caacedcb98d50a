"""First pass of loading: what each parameter is read from, planned and checked by the headers alone.

Every parameter has its tensors, of the right shape and dtype, and no tensor is left over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import ParameterSpec
from cierzo.engine.weights.headers import FLOAT_DTYPES, TensorInfo
from cierzo.engine.weights.names import PACKED, NameMap, Role, companion
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS

E4M3 = "F8_E4M3"
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor and the scales beside it: a whole parameter, or one matrix of an expert.

    format: the number format of its codes; "": floating-point weights.
    """

    tensor: TensorInfo
    format: str = ""
    scales: Mapping[Role, TensorInfo] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensor and its scales."""
        return (self.tensor, *self.scales.values())


@dataclass(frozen=True, slots=True)
class ParameterPlan:
    """The pieces that a parameter is read from.

    experts: the pieces of each expert, which lie one above the other; a parameter stored whole is one piece.
    apart: each expert has pieces of its own. reordered: its rows are brought from the native order of rotary pairs.
    """

    spec: ParameterSpec
    experts: tuple[tuple[Piece, ...], ...]
    apart: bool
    reordered: bool

    @property
    def tensors(self) -> Iterator[TensorInfo]:
        """Every tensor that is read."""
        return (tensor for pieces in self.experts for piece in pieces for tensor in piece.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes that are read."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def is_plain(self) -> bool:
        """Whether it is one floating-point tensor with its rows in order."""
        return not (self.apart or self.reordered or self.experts[0][0].format)


def plan_parameters(
    tensors: Mapping[str, TensorInfo], specs: Mapping[str, ParameterSpec], mapped: NameMap
) -> dict[str, ParameterPlan]:
    """A plan for each parameter; a tied one that is not stored has none.

    Raises CheckpointError naming the tensor, and what was expected and found, when one is missing, left over, of
    another shape or of no dtype that fits.
    """
    absent = [name for name in specs if name not in mapped.whole and name not in mapped.experts]
    missing = [name for name in absent if specs[name].tied_to is None]
    if missing:
        raise CheckpointError(f"tensor {missing[0]} is missing{_others(missing)}", field=missing[0])
    planner = _Planner(tensors, mapped)
    plans = {name: planner.parameter(name, spec) for name, spec in specs.items() if name not in absent}
    used = {tensor.name for plan in plans.values() for tensor in plan.tensors} | {*mapped.vision, *mapped.ignored}
    left_over = [name for name in tensors if name not in used]
    if left_over:
        raise CheckpointError(
            f"tensor {left_over[0]} has no place in this model{_others(left_over)}", field=left_over[0]
        )
    return plans


class _Planner:
    """The tensors of a checkpoint and their names in the model."""

    def __init__(self, tensors: Mapping[str, TensorInfo], mapped: NameMap) -> None:
        self._tensors = tensors
        self._mapped = mapped

    def parameter(self, name: str, spec: ParameterSpec) -> ParameterPlan:
        """The plan of one that is stored."""
        if name not in self._mapped.whole:
            return ParameterPlan(spec, tuple(self._experts(name, spec.shape)), apart=True, reordered=False)
        piece = self._piece(self._mapped.whole[name], spec.shape)
        reordered = spec.rotated_heads is not None and self._mapped.format.layout == "native"
        if reordered and piece.format not in (
            "",
            "fp8",
        ):  # none is published: 4 bits are for experts
            matrix, title = piece.tensor.name.removesuffix(PACKED), NUMBER_FORMATS[piece.format].title
            raise CheckpointError(
                f"{matrix} is {title}, and its rotary pairs lie in the native order (unsupported)",
                field=matrix,
                limit=", ".join((E4M3, *FLOAT_DTYPES)),
                value=title,
            )
        return ParameterPlan(spec, ((piece,),), apart=False, reordered=reordered)

    def _experts(self, name: str, shape: Shape) -> Iterator[tuple[Piece, ...]]:
        """The matrices of every expert. Parts of a gate_up_proj are gate and up."""
        parts, num_parts = self._mapped.experts[name], 2 if name.endswith("gate_up_proj") else 1
        each = (shape[1] // num_parts, shape[2])
        for expert in range(shape[0]):
            for part in range(num_parts):
                if (expert, part) not in parts:
                    raise CheckpointError(f"{name}: part {part} of expert {expert} is missing", field=name)
            yield tuple(self._piece(parts[expert, part], each) for part in range(num_parts))
        for (expert, _), tensor in parts.items():
            if expert >= shape[0]:
                raise CheckpointError(f"tensor {tensor}: there are {shape[0]} experts only", field=tensor)

    def _piece(self, name: str, shape: Shape) -> Piece:
        """The tensor `name`, of this shape, and the scales that it needs; other scales beside it are left over."""
        info = self._tensors[name]
        if name.endswith(PACKED) and self._mapped.format.scheme == "nvfp4":
            return self._nvfp4(info, shape)
        if info.dtype == E4M3:
            return self._fp8(info, shape)
        _check(info, FLOAT_DTYPES, [shape])
        return Piece(info)

    def _nvfp4(self, info: TensorInfo, shape: Shape) -> Piece:
        group = NUMBER_FORMATS["nvfp4"].group
        n, k = shape[0], shape[-1]
        if len(shape) != 2 or k % group:
            raise _misfit(info, "shape", f"[n, k], k a multiple of {group}, for NVFP4", list(shape))
        _check(info, ("U8",), [(n, k // 2)])
        scale, whole = self._scale(info, "scale"), self._scale(info, "global scale")
        _check(scale, (E4M3,), [(n, k // group)])
        _check(whole, FLOAT_DTYPES, [(1,), ()])
        scales = {"scale": scale, "global scale": whole, **self._activation_scale(info, shape)}
        return Piece(info, "nvfp4", scales)

    def _fp8(self, info: TensorInfo, shape: Shape) -> Piece:
        _check(info, (E4M3,), [shape])
        if len(shape) not in (2, 3):
            raise _misfit(info, "dtype", ", ".join(FLOAT_DTYPES), info.dtype)
        scale = self._scale(info, "scale")
        _check(scale, FLOAT_DTYPES, [(), (1,)] if len(shape) == 2 else [(shape[0], 1, 1)])
        return Piece(info, "fp8", {"scale": scale, **self._activation_scale(info, shape)})

    def _scale(self, info: TensorInfo, role: Role) -> TensorInfo:
        """A companion without which the tensor means nothing."""
        name = self._mapped.companions.get(info.name, {}).get(role)
        if name is None:
            missing = companion(info.name, role, self._mapped.format)
            raise CheckpointError(
                f"tensor {info.name} is {info.dtype}, and its {role} {missing} is missing", field=missing
            )
        return self._tensors[name]

    def _activation_scale(self, info: TensorInfo, shape: Shape) -> dict[Role, TensorInfo]:
        """A companion that few computations use, and that may be missing; but it must be one."""
        name = self._mapped.companions.get(info.name, {}).get("activation scale")
        if name is None:
            return {}
        _check(self._tensors[name], FLOAT_DTYPES, [(), (1,)] if len(shape) == 2 else [shape[:1], (shape[0], 1, 1)])
        return {"activation scale": self._tensors[name]}


def _check(info: TensorInfo, dtypes: tuple[str, ...], shapes: list[Shape]) -> None:
    if info.shape not in shapes:
        raise _misfit(info, "shape", " or ".join(str(list(shape)) for shape in shapes), list(info.shape))
    if info.dtype not in dtypes:
        limit = dtypes[0] if len(dtypes) == 1 else f"one of {', '.join(dtypes)}"
        raise _misfit(info, "dtype", limit, info.dtype)


def _misfit(info: TensorInfo, what: str, limit: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"tensor {info.name}: {what} {value}, expected {limit}", field=info.name, limit=limit, value=value
    )


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
