"""Checkpoint tensors -> the parameters a model asks for, with none missing, none left over and none misshapen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """What a model expects of one parameter, and how it is cut among ranks.

    shape: the whole, unsharded shape, as the checkpoint stores it ([out, in] for a linear layer).
    shard_axis: the axis cut into `world` equal slices; None: every rank holds the whole.
    sections: how many equal sections the shard axis consists of, each cut on its own (2 for a fused gate_up,
        so that a rank gets its slice of the gate and its slice of the up projection, in this order).
    """

    shape: tuple[int, ...]
    shard_axis: int | None = None
    sections: int = 1
