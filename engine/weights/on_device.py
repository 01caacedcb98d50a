"""Parameters in the memory of a GPU: a checkpoint's own codes and scales, where they are of the format."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import Parameter, as_tensor
from cierzo.engine.weights.quantised import Nvfp4Matrix, ScaledMatrix, StoredMatrix, StoredParameter
from cierzo.kernels.formats import device as formats
from cierzo.kernels.formats.device import DeviceFormatError, DeviceMatrix
from cierzo.kernels.formats.packed import Matrix


def on_device(
    parameter: Parameter, format: str, plain: str, device: torch.device, *, fp8_activations: bool = False
) -> Matrix:
    """The matrix in `format` on the device; `plain` is that of the activations, which tensors have.

    Codes of another format, or plain weights, are quantised there, an expert at a time. fp8_activations: fp8
    matrices are multiplied with activations in fp8, by the checkpoint's scales if it has them. Raises
    CheckpointError for a bad scale, and for weights that the format cannot hold.
    """
    if format == plain:
        return as_tensor(parameter).to(device, copy=True)
    try:
        kept = _kept(parameter, format)
        matrix = kept.to(device) if kept is not None else _quantised(parameter, format, device)
        if fp8_activations and format == "fp8":
            scales = _activation_scales(parameter)
            return formats.in_fp8(matrix, None if scales is None else scales.to(device))
        return matrix
    except DeviceFormatError as error:
        raise CheckpointError(f"{_name(parameter)}: {error}", field=_name(parameter)) from error


def _kept(parameter: Parameter, format: str) -> DeviceMatrix | None:
    """The stored codes, if all of them are of the format."""
    if not isinstance(parameter, StoredParameter):
        return None
    parts = [part for expert in parameter.experts for part in expert]
    if format == "nvfp4" and all(isinstance(part, Nvfp4Matrix) for part in parts):
        return _kept_nvfp4(parameter)
    if format == "fp8" and all(_is_fp8(part) for part in parts):
        return _kept_fp8(parameter)
    return None


def _is_fp8(part: StoredMatrix) -> bool:
    return isinstance(part, ScaledMatrix) and part.codes.dtype == torch.float8_e4m3fn and part.scale is not None


def _kept_fp8(parameter: StoredParameter) -> DeviceMatrix:
    """One scale a row: the matrices that lie above one another have scales of their own."""
    codes, scales = [], []
    for expert in parameter.experts:
        parts = [part for part in expert if isinstance(part, ScaledMatrix)]
        codes.append(torch.cat([part.kept_codes().view(torch.uint8) for part in parts]))
        scales.append(torch.cat([torch.full((part.shape[0],), part.checked_scale()) for part in parts]))
    stacked, rows = torch.stack(codes).view(torch.float8_e4m3fn), torch.stack(scales)
    if not parameter.fused:
        stacked, rows = stacked[0], rows[0]
    return formats.fp8(stacked, rows, parameter.dtype)


def _activation_scales(parameter: Parameter) -> Tensor | None:
    """fp32 [E], or [1] of [n,k]; None where the checkpoint has none. Matrices that lie above one another meet the
    same activations: where their scales differ, the largest holds them all. Raises CheckpointError where one has
    none and another has."""
    if not isinstance(parameter, StoredParameter):
        return None
    largest = []
    for expert in parameter.experts:
        scales = [part.activation_scale for part in expert if isinstance(part, ScaledMatrix)]
        present = [scale.float().reshape(1) for scale in scales if scale is not None]
        if present and len(present) < len(expert):
            raise _partly(parameter)
        largest += [torch.cat(present).amax(0, keepdim=True)] if present else []
    if largest and len(largest) < len(parameter.experts):
        raise _partly(parameter)
    return torch.cat(largest) if largest else None


def _partly(parameter: StoredParameter) -> CheckpointError:
    name = next(
        part.name
        for expert in parameter.experts
        for part in expert
        if not isinstance(part, ScaledMatrix) or part.activation_scale is None
    )
    return CheckpointError(f"{name} has no scale of its activations, and what lies beside it has", field=name)


def _kept_nvfp4(parameter: StoredParameter) -> DeviceMatrix:
    codes, scales, rows = [], [], []
    for expert in parameter.experts:
        stored = [part.stored() for part in expert if isinstance(part, Nvfp4Matrix)]
        codes.append(torch.cat([one.codes for one in stored]))
        scales.append(torch.cat([one.scales.view(torch.uint8) for one in stored]))
        rows.append(torch.cat([torch.full((len(one.codes),), 1 / one.divisor) for one in stored]))
    stacked, groups, whole = torch.stack(codes), torch.stack(scales).view(torch.float8_e4m3fn), torch.stack(rows)
    if not parameter.fused:
        stacked, groups, whole = stacked[0], groups[0], whole[0]
    return formats.nvfp4(stacked, groups, whole, parameter.dtype)


def _quantised(parameter: Parameter, format: str, device: torch.device) -> DeviceMatrix:
    """An expert at a time: in 16 bits and in fp32, all of them together take several times what they will."""
    if len(parameter.shape) == 2:
        return formats.quantise(as_tensor(parameter).to(device), format)
    experts = [
        formats.quantise(as_tensor(parameter[number : number + 1])[0].to(device), format)
        for number in range(parameter.shape[0])
    ]
    return formats.stack(experts)


def _name(parameter: Parameter) -> str:
    return parameter.experts[0][0].name if isinstance(parameter, StoredParameter) else "a plain tensor"
