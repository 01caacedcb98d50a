"""Parameters in the memory of a GPU: a checkpoint's own codes and scales, where they are of the format."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import Parameter, as_tensor
from cierzo.engine.weights.quantised import ScaledMatrix, StoredParameter, kept_codes
from cierzo.kernels.formats.device import DeviceFormatError, DeviceMatrix, in_fp8, joined, quantise, stack
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS
from cierzo.kernels.formats.packed import Matrix


def on_device(
    parameter: Parameter, format: str, plain: str, device: torch.device, activations: str = "bf16"
) -> Matrix:
    """The matrix in `format` on the device; `plain` is the format that the dtype of the parameter keeps.

    Codes of another format, or plain weights, are quantised there, an expert at a time. activations: the format of
    those that the matrix is multiplied with, if its own takes them: by the checkpoint's scales if it has them.
    Raises CheckpointError for a bad scale, and for weights that the format cannot hold.
    """
    if format == plain:
        return as_tensor(parameter).to(device, copy=True)
    try:
        kept = _kept(parameter, format)
        matrix = kept.to(device) if kept is not None else _quantised(parameter, format, device)
        if activations in NUMBER_FORMATS[format].activations:
            scales = _activation_scales(parameter)
            return in_fp8(matrix, None if scales is None else scales.to(device))
        return matrix
    except DeviceFormatError as error:
        raise CheckpointError(f"{_name(parameter)}: {error}", field=_name(parameter)) from error


def _kept(parameter: Parameter, format: str) -> DeviceMatrix | None:
    """The stored codes, if all of them are of the format; scales of matrices above one another stay their own."""
    if not isinstance(parameter, StoredParameter):
        return None
    experts = [kept_codes(parts, format) for parts in parameter.experts]
    tensors = [[tensor[None] for tensor in kept] for kept in experts if kept is not None]
    if len(tensors) < len(experts):
        return None
    stacked = [joined(of_experts) for of_experts in zip(*tensors, strict=True)]
    if not parameter.fused:
        stacked = [tensor[0] for tensor in stacked]
    return NUMBER_FORMATS[format].codec().from_codes(*stacked, parameter.dtype)


def _activation_scales(parameter: Parameter) -> Tensor | None:
    """Static scales of activations, fp32 [E], or [1] of [n,k]; None where the checkpoint has none.

    Matrices that lie above one another meet the same activations: where their scales differ, the largest holds them
    all. Raises CheckpointError where one has none and another has.
    """
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


def _quantised(parameter: Parameter, format: str, device: torch.device) -> DeviceMatrix:
    """An expert at a time: in 16 bits and in fp32, all of them together take several times what they will."""
    if len(parameter.shape) == 2:
        return quantise(as_tensor(parameter).to(device), format)
    experts = [
        quantise(as_tensor(parameter[number : number + 1])[0].to(device), format)
        for number in range(parameter.shape[0])
    ]
    return stack(experts)


def _name(parameter: Parameter) -> str:
    return parameter.experts[0][0].name if isinstance(parameter, StoredParameter) else "a plain tensor"
