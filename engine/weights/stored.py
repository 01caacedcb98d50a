"""Tensors of a checkpoint -> StoredParameter: what a matrix consists of in each scheme, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.weights.headers import FLOAT_DTYPES, TensorInfo
from cierzo.engine.weights.names import PACKED, NameMap, Role, companion
from cierzo.engine.weights.quantised import Nvfp4Matrix, ScaledMatrix, StoredMatrix, StoredParameter
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.formats.nvfp4 import GROUP as SCALE_GROUP

FP8 = "F8_E4M3"


def is_stored(tensors: Mapping[str, TensorInfo], mapped: NameMap, name: str, rotated_heads: int | None) -> bool:
    """Whether a parameter is anything but one floating-point tensor with its rows in order."""
    if name not in mapped.whole:
        return True
    tensor = mapped.whole[name]
    reordered = rotated_heads is not None and mapped.format.layout == "native"
    return reordered or tensor.endswith(PACKED) or tensors[tensor].dtype == FP8


def read_stored(
    reader: CheckpointReader,
    mapped: NameMap,
    name: str,
    rotated_heads: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> StoredParameter:
    """The whole parameter `name`, unsharded; nothing of it is read yet. It has passed `check_matrix`."""
    if name in mapped.whole:
        tensor = mapped.whole[name]
        if len(reader.tensors[tensor].shape) == 3:
            return StoredParameter(_fused(reader, mapped, tensor), True, dtype, device)
        matrix = _matrix(reader, mapped, tensor)
        if rotated_heads is not None and mapped.format.layout == "native":
            matrix = _reordered(matrix, rotated_heads)
        return StoredParameter(((matrix,),), False, dtype, device)
    parts = mapped.experts[name]
    num_parts = 1 + max(part for _, part in parts)
    experts = tuple(
        tuple(_matrix(reader, mapped, parts[expert, part]) for part in range(num_parts))
        for expert in range(len(parts) // num_parts)
    )
    return StoredParameter(experts, True, dtype, device)


def halves_first(rows: int, heads: int) -> Tensor:
    """int64 [rows]: for each row in the order of (i, i + d/2) pairs, its place in that of (2i, 2i+1) pairs.

    [heads, d/2, 2] -> [heads, 2, d/2]: rotary pairs of Mistral-native wq and wk lie next to each other.
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _reordered(matrix: StoredMatrix, heads: int) -> ScaledMatrix:
    if isinstance(matrix, Nvfp4Matrix):  # no published checkpoint has it: experts alone are in 4 bits
        raise CheckpointError(
            f"{matrix.name} is NVFP4, and its rotary pairs lie in the native order (unsupported)",
            field=matrix.name,
            limit=", ".join((FP8, *FLOAT_DTYPES)),
            value="NVFP4",
        )
    return replace(matrix, order=halves_first(matrix.shape[0], heads))


def check_matrix(
    tensors: Mapping[str, TensorInfo], mapped: NameMap, name: str, shape: tuple[int, ...]
) -> Iterator[str]:
    """The tensor `name` and the companions that it needs fit a parameter of this shape; gives all their names.

    Companions that it does not need (a scale of a tensor that is not quantised) are not given: they are left over.
    Raises CheckpointError naming the tensor, what was expected and what was found.
    """
    info = tensors[name]
    yield name
    if name.endswith(PACKED) and mapped.format.scheme == "nvfp4":
        n, k = shape[0], shape[-1]
        if len(shape) != 2 or k % SCALE_GROUP:
            raise _misfit(info, "shape", f"[n, k], k a multiple of {SCALE_GROUP}, for NVFP4", list(shape))
        _check(info, ("U8",), [(n, k // 2)])
        scales = _companion(tensors, mapped, info, "scale")
        _check(scales, (FP8,), [(n, k // SCALE_GROUP)])
        whole = _companion(tensors, mapped, info, "global scale")
        _check(whole, FLOAT_DTYPES, [(1,), ()])
        yield from (scales.name, whole.name)
    elif info.dtype == FP8:
        _check(info, (FP8,), [shape])
        if len(shape) not in (2, 3):
            raise _misfit(info, "dtype", ", ".join(FLOAT_DTYPES), info.dtype)
        scale = _companion(tensors, mapped, info, "scale")
        _check(scale, FLOAT_DTYPES, [(), (1,)] if len(shape) == 2 else [(shape[0], 1, 1)])
        yield scale.name
    else:
        check_plain(info, shape)
        return
    yield from _check_activation_scale(tensors, mapped, info, shape)


def check_plain(info: TensorInfo, shape: tuple[int, ...]) -> None:
    """A floating-point tensor of this shape."""
    _check(info, FLOAT_DTYPES, [shape])


def _check_activation_scale(
    tensors: Mapping[str, TensorInfo], mapped: NameMap, info: TensorInfo, shape: tuple[int, ...]
) -> Iterator[str]:
    """Few computations use it, and so it may be missing; but it must be one."""
    name = mapped.companions.get(info.name, {}).get("activation scale")
    if name is not None:
        _check(tensors[name], FLOAT_DTYPES, [(), (1,)] if len(shape) == 2 else [shape[:1], (shape[0], 1, 1)])
        yield name


def _companion(tensors: Mapping[str, TensorInfo], mapped: NameMap, info: TensorInfo, role: Role) -> TensorInfo:
    name = mapped.companions.get(info.name, {}).get(role)
    if name is None:
        missing = companion(info.name, role, mapped.format)
        raise CheckpointError(
            f"tensor {info.name} is {info.dtype}, and its {role} {missing} is missing", field=missing
        )
    return tensors[name]


def _check(info: TensorInfo, dtypes: tuple[str, ...], shapes: list[tuple[int, ...]]) -> None:
    if info.shape not in shapes:
        raise _misfit(info, "shape", " or ".join(str(list(shape)) for shape in shapes), list(info.shape))
    if info.dtype not in dtypes:
        limit = dtypes[0] if len(dtypes) == 1 else f"one of {', '.join(dtypes)}"
        raise _misfit(info, "dtype", limit, info.dtype)


def _misfit(info: TensorInfo, what: str, limit: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"tensor {info.name}: {what} {value}, expected {limit}", field=info.name, limit=limit, value=value
    )


def _matrix(reader: CheckpointReader, mapped: NameMap, name: str) -> StoredMatrix:
    """The [n,k] of one tensor and its companions."""
    roles = mapped.companions.get(name, {})
    if name.endswith(PACKED) and mapped.format.scheme == "nvfp4":
        scales, divisor = reader.read(roles["scale"]), reader.read(roles["global scale"])
        return Nvfp4Matrix(name.removesuffix(PACKED), reader.read(name), scales, divisor)
    if reader.tensors[name].dtype != FP8:
        return ScaledMatrix(name, reader.read(name))
    matrix = ScaledMatrix(name, reader.read(name), reader.read(roles["scale"]), roles["scale"])
    activations = roles.get("activation scale")
    return matrix if activations is None else replace(matrix, activation_scale=reader.read(activations).flatten())


def _fused(reader: CheckpointReader, mapped: NameMap, name: str) -> tuple[tuple[StoredMatrix, ...], ...]:
    """Each expert of a quantised [E,n,k] with scales [E,1,1]: gate and up share theirs."""
    roles = mapped.companions[name]
    scale_name, activations = roles["scale"], roles.get("activation scale")
    codes, scales = reader.read(name), reader.read(scale_name).flatten()
    of_activations = None if activations is None else reader.read(activations).flatten()
    return tuple(
        (
            ScaledMatrix(
                f"{name}[{expert}]",
                codes[expert],
                scales[expert],
                f"{scale_name}[{expert}]",
                activation_scale=None if of_activations is None else of_activations[expert : expert + 1],
            ),
        )
        for expert in range(len(codes))
    )
