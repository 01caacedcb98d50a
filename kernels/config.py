"""Which implementation of each operation to use."""

from __future__ import annotations

from typing import Literal

import msgspec

InstructionSet = Literal["auto", "avx512_bf16", "avx512", "avx2", "reference"]


class KernelsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`implementations` maps an operation to the implementation wanted (`{"mla_decode": "torch"}`).

    An operation that is not named gets the first registered implementation for the device (registry.py).
    `instruction_set` is that of the C++ kernels; "auto": the best that CPU and library have; "reference": none, all
    operations in plain torch.
    """

    implementations: dict[str, str] = {}
    instruction_set: InstructionSet = "auto"
