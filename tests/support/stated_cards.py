"""Cards with shares that were stated, in place of predicted or measured ones: what steps_by_hand.py prices by."""

from __future__ import annotations

import msgspec
import steps_by_hand

from cierzo.engine.cost.cards import find_device
from cierzo.engine.cost.device import Device, Kind

STATED: dict[Kind, float] = {
    "memory": steps_by_hand.MEMORY,
    "experts": steps_by_hand.EXPERTS,
    "products": steps_by_hand.DENSE,
    "attention": steps_by_hand.ATTENTION,
}


def stated(name: str) -> Device:
    """A card of the data sheets, or several, that takes 1.0 ms a step beside its operations, or 1.8."""
    card = find_device(name)
    return msgspec.structs.replace(
        card,
        stated=STATED,
        measured={},
        predicted={},
        launch_s=0.0,
        step_overhead_s=1.0e-3 if card.cards == 1 else 1.8e-3,
    )
