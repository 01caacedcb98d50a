"""Table of the number formats of weights: what each is, where it computes, and which matrices of a model get it.

The arithmetic of a format is in the module of its name beside this one (nvfp4.py), which is imported when it is
needed. No torch here. A model's matrices are told apart by role:

    linear     products around attention and in a dense MLP      latent     MLA's expansions W_UK and W_UV
    experts    the MLPs of a mixture of experts                  router     chooses experts
    head       the output head, lm_head              vision     the tower that images pass through

The router, MLA's expansions and the tower stay plain: they are a hundredth of the weights, the first decides which
experts run, the second multiply every cached token, and no checkpoint quantises the third. lm_head has 8 bits at
least: in 4, it alone raises the demo model's perplexity by 6 %. On a GPU the checkpoints' own formats run, in which
the head is plain; in FP8 on demand.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

MatrixRole = Literal["linear", "experts", "latent", "router", "head", "vision"]
FormatName = Literal["bf16", "fp8", "int8", "int4", "nvfp4"]  # what a user may choose
HEAD_ON_CPU = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panels:
    """Bytes of a format in a panel of 32 outputs, as the CPU kernels read it (packed.py).

    group_k: columns of a group. group_bytes: bytes of a group; header_bytes: bytes before the first group.
    repeats_last: the last group is filled with its last column, and not with zeros. row_error: a bound on the root
    mean square of the rounding errors of activations, relative to the activations: the kernels round them to bf16,
    or to 8 bits in groups of k (cpu/quant.h). A product has this error and that of the weights, added as
    independent errors are.
    """

    group_k: int
    group_bytes: int
    header_bytes: int = 0
    repeats_last: bool = False
    row_error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """A number format of weights.

    name: as users write it; title: as sentences name it. value_bytes: bytes of a weight, with its share of the
    scale of a group; row_bytes: bytes of the scale of a row. group: columns that share a scale; 0: there are no
    groups. dtype: the dtype of torch whose values the format keeps; "": it has codes and scales. devices: where a
    user may choose the format; codes_on: where kernels read its codes. panels: its layout for the CPU kernels.
    weight_error: a bound on the root mean square of the rounding errors of normally distributed float32 weights,
    relative to the weights. linear: by device, the format of "linear" matrices where it is another one.
    activations: the formats of activations that kernels multiply with its codes as they are.
    """

    name: str
    title: str
    value_bytes: float
    row_bytes: int = 0
    group: int = 0
    dtype: str = ""
    devices: tuple[str, ...] = ()
    codes_on: tuple[str, ...] = ()
    panels: Panels | None = None
    weight_error: float = 0.0
    linear: Mapping[str, str] = field(default_factory=dict)
    activations: tuple[str, ...] = ()

    def of(self, role: MatrixRole, device: str, plain: str) -> str:
        """The format that a matrix has where this format is chosen for the weights.

        device: "cpu" or "cuda". plain: the format of the activations' dtype.
        """
        if role in ("latent", "router", "vision") or self.name == plain:
            return plain
        if role == "head":
            return HEAD_ON_CPU if device == "cpu" else plain
        return self.linear.get(device, self.name) if role == "linear" else self.name

    def codec(self) -> ModuleType:
        """The module that defines the format.

        It has `encode`, `decode` and `LARGEST`, the greatest |weight| (infinite where NaN is held too), if there
        are panels for a CPU, and `quantise`, `dequantise` and `from_codes` if there are matrices for a GPU.
        """
        return importlib.import_module(f"cierzo.kernels.formats.{self.name}")


NUMBER_FORMATS: Mapping[str, NumberFormat] = {
    one.name: one
    for one in (
        NumberFormat(
            name="float32",
            title="float32",
            value_bytes=4,
            dtype="float32",
            panels=Panels(group_k=1, group_bytes=128),
        ),
        NumberFormat(
            name="bf16",
            title="BF16",
            value_bytes=2,
            dtype="bfloat16",
            devices=("cpu", "cuda"),
            panels=Panels(group_k=2, group_bytes=128, row_error=0.002),
            weight_error=0.002,
        ),
        NumberFormat(
            name="fp8",
            title="FP8",
            value_bytes=1,
            row_bytes=4,
            devices=("cuda",),
            codes_on=("cuda",),
            weight_error=0.028,  # e4m3 keeps four significant bits
            activations=("fp8",),
        ),
        NumberFormat(
            name="int8",
            title="INT8",
            value_bytes=1 + 2 / 64,
            group=64,
            devices=("cpu",),
            codes_on=("cpu",),
            panels=Panels(group_k=64, group_bytes=2112, row_error=0.006),
            weight_error=0.006,
        ),
        NumberFormat(
            name="int4",
            title="INT4",
            value_bytes=0.5 + 4 / 32,
            group=32,
            devices=("cpu",),
            codes_on=("cpu",),
            panels=Panels(group_k=32, group_bytes=640, repeats_last=True, row_error=0.0055),
            weight_error=0.071,
        ),
        NumberFormat(
            name="nvfp4",
            title="NVFP4",
            value_bytes=0.5 + 1 / 16,
            row_bytes=4,
            group=16,
            devices=("cpu", "cuda"),
            codes_on=("cpu", "cuda"),
            panels=Panels(group_k=32, group_bytes=576, header_bytes=128, row_error=0.0055),
            weight_error=0.098,  # e2m1 has the steps 0.5, 1 and 2 below 6, and its group's peak becomes 6
            linear={"cuda": "fp8"},
        ),
        NumberFormat(
            name="mxfp4",
            title="MXFP4",
            value_bytes=0.5 + 1 / 32,
            row_bytes=4,
            group=32,
            codes_on=("cuda",),
            weight_error=0.13,  # a scale that is a power of two wastes up to half of e2m1's range
        ),
    )
}


PACKED_FORMATS: Mapping[str, Panels] = {name: one.panels for name, one in NUMBER_FORMATS.items() if one.panels}
DEVICE_FORMATS = tuple(name for name, one in NUMBER_FORMATS.items() if "cuda" in one.codes_on)
# Formats of activations that are not a dtype's.
ACTIVATION_FORMATS = tuple(dict.fromkeys(name for one in NUMBER_FORMATS.values() for name in one.activations))


def formats_on(device: str) -> tuple[str, ...]:
    """The formats that a user may choose on a "cpu" or "cuda" device."""
    return tuple(name for name, one in NUMBER_FORMATS.items() if device in one.devices)


def plain_format(dtype: str) -> str:
    """The format that keeps the values of "bfloat16" or "float32" as they are."""
    return next(name for name, one in NUMBER_FORMATS.items() if one.dtype == dtype)
