"""Which implementation of each operation to use."""

from __future__ import annotations

import msgspec


class KernelsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`implementations` maps an operation to the implementation wanted (`{"mla_decode": "torch"}`).

    An operation that is not named gets the first registered implementation for the device (registry.py).
    """

    implementations: dict[str, str] = {}
