"""First pass of loading: what each parameter is read from, planned and checked by the headers alone.

Every parameter has its tensors, of the right shape and dtype, and no tensor is left over.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field

from cierzo.engine.checkpoint_format import TEXT_ONLY
from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import ParameterSpec
from cierzo.engine.quantisation import WeightGroup
from cierzo.engine.weights.companions import PACKED, Role, companion, without_ending
from cierzo.engine.weights.headers import FLOAT_DTYPES, TensorInfo
from cierzo.engine.weights.names import PATCHES, VISION, NameMap, plain_name
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS

E4M3 = "F8_E4M3"
WORD_BITS = 32  # of packed integers
_CODES = (E4M3, "I8", "I32", "U8")  # dtypes that mean nothing without a scale
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor and the scales beside it: a whole parameter, or one matrix of an expert.

    format: how its codes are stored (engine/quantisation.py); "": floating-point weights. shape: of the weights.
    group: what the config declares of it.
    """

    tensor: TensorInfo
    format: str = ""
    scales: Mapping[Role, TensorInfo] = field(default_factory=dict)
    shape: Shape = ()
    group: WeightGroup | None = None

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
        remedy = f"; {TEXT_ONLY}" if missing[0].startswith(VISION) else ""
        raise CheckpointError(f"tensor {missing[0]} is missing{_others(missing)}{remedy}", field=missing[0])
    planner = _Planner(tensors, mapped)
    plans = {name: planner.parameter(name, spec) for name, spec in specs.items() if name not in absent}
    used = {tensor.name for plan in plans.values() for tensor in plan.tensors} | {*mapped.ignored}
    used |= set(vision_left_aside(mapped, specs))
    left_over = [name for name in tensors if name not in used]
    if left_over:
        raise CheckpointError(
            f"tensor {left_over[0]} has no place in this model{_others(left_over)}", field=left_over[0]
        )
    return plans


def sees(specs: Container[str]) -> bool:
    """Whether a model with these parameters has a vision tower."""
    return PATCHES in specs


def vision_left_aside(mapped: NameMap, specs: Container[str]) -> list[str]:
    """The tensors of a vision tower that a model without one does not use; empty where the model has it."""
    return [] if sees(specs) else mapped.vision


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
        if reordered and piece.format == "nvfp4":  # none is published: 4 bits are for experts
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
        if info.dtype not in _CODES:
            _check(info, FLOAT_DTYPES, [shape])
            return Piece(info)
        group = self._group(info, shape)
        dtype, stored = _stored(info, group, shape)
        _check(info, (dtype,), [stored])
        scales: dict[Role, TensorInfo] = {"scale": self._scale(info, "scale")}
        _check(scales["scale"], *_scale_forms(group, shape))
        if group.storage == "nvfp4":
            scales["global scale"] = self._scale(info, "global scale")
            _check(scales["global scale"], FLOAT_DTYPES, [(*shape[:-2], 1), shape[:-2]])
        if group.zero_points:
            scales["zero point"] = self._scale(info, "zero point")
            _check(scales["zero point"], *_zero_point_form(group, shape))
        scales |= self._shape(info, group) | self._activations(info, shape)
        return Piece(info, group.storage, scales, shape, group)

    def _group(self, info: TensorInfo, shape: Shape) -> WeightGroup:
        """The group that the config declares for a tensor of codes. Raises CheckpointError if there is none."""
        format = self._mapped.format
        names = without_ending(info.name, format), plain_name(info.name, format).removesuffix(".weight")
        group = format.quantisation.group_of(*names)
        dtype = None if group is None else _stored(info, group, shape)[0]
        if group is None or len(shape) not in (2, 3):
            raise _misfit(info, "dtype", f"one of {', '.join(FLOAT_DTYPES)}", info.dtype)
        if dtype != info.dtype:
            raise _misfit(info, "dtype", f"one of {', '.join((dtype or '', *FLOAT_DTYPES))}", info.dtype)
        return group

    def _scale(self, info: TensorInfo, role: Role) -> TensorInfo:
        """A companion without which the tensor means nothing."""
        name = self._mapped.companions.get(info.name, {}).get(role)
        if name is None:
            missing = companion(info.name, role, self._mapped.format)
            raise CheckpointError(
                f"tensor {info.name} is {info.dtype}, and its {role} {missing} is missing", field=missing
            )
        return self._tensors[name]

    def _shape(self, info: TensorInfo, group: WeightGroup) -> dict[Role, TensorInfo]:
        """The weights' shape, stored beside packed integers, whose last word may not be full."""
        if group.storage != "packed":
            return {}
        found = self._scale(info, "shape")
        _check(found, ("I64", "I32"), [(len(info.shape),)])
        return {"shape": found}

    def _activations(self, info: TensorInfo, shape: Shape) -> dict[Role, TensorInfo]:
        """Companions that few computations use, and that may be missing; but they must be such."""
        found: dict[Role, TensorInfo] = {}
        each = [(), (1,)] if len(shape) == 2 else [shape[:1], (shape[0], 1), (shape[0], 1, 1)]
        for role, dtypes in _OF_ACTIVATIONS.items():
            name = self._mapped.companions.get(info.name, {}).get(role)
            if name is not None:
                _check(self._tensors[name], dtypes, each)
                found[role] = self._tensors[name]
        return found


_OF_ACTIVATIONS: dict[Role, tuple[str, ...]] = {
    "activation scale": FLOAT_DTYPES,
    "activation zero point": ("I8", E4M3, *FLOAT_DTYPES),
}


def _stored(info: TensorInfo, group: WeightGroup, shape: Shape) -> tuple[str, Shape]:
    """Dtype and shape of the codes of weights of this shape. Raises CheckpointError where groups do not fill k."""
    *outer, k = shape
    if group.strategy in ("group", "tensor_group") and k % group.columns:
        title = str(group).partition(",")[0]
        raise _misfit(info, "shape", f"[n, k], k a multiple of {group.columns}, for {title}", list(shape))
    match group.storage:
        case "fp8":
            return E4M3, shape
        case "int8":
            return "I8", shape
        case "packed":
            return "I32", (*outer, -(-k * group.bits // WORD_BITS))
    blocks = (*outer, k // group.columns, group.columns // 2)  # as gpt-oss has them
    return "U8", blocks if len(info.shape) == 4 else (*outer, k // 2)


def _scale_forms(group: WeightGroup, shape: Shape) -> tuple[tuple[str, ...], list[Shape]]:
    """Dtypes and shapes that the scales of weights of this shape may have."""
    *experts, n, k = shape
    dtypes = {"nvfp4": (E4M3,), "mxfp4": ("U8", "F8_E8M0")}.get(group.storage, FLOAT_DTYPES)
    if group.strategy == "tensor":
        return dtypes, [(*experts, 1, 1)] if experts else [(), (1,)]
    if group.strategy == "channel":
        return dtypes, [(*experts, n, 1), (*experts, n)]
    return dtypes, [(*experts, -(-n // group.rows), -(-k // group.columns))]


def _zero_point_form(group: WeightGroup, shape: Shape) -> tuple[tuple[str, ...], list[Shape]]:
    """Dtypes and shapes of zero points, which are packed along n where the codes are along k."""
    if group.storage != "packed" or group.strategy == "tensor":
        return ("I8",), _scale_forms(group, shape)[1]
    *experts, n, k = shape
    columns = 1 if group.strategy == "channel" else k // group.columns
    return ("I32",), [(*experts, -(-n * group.bits // WORD_BITS), columns)]


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
