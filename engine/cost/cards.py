"""Devices by name, and from files.

Named ones are data sheets with stated shares: `h100`, `h200`, and several of one kind, as in `4xh100`; where the
GPU bench has left results of a card, these take the place of the stated ones (measured.py). A file (JSON of a
`Device`) describes any other, the CPU of this machine too (`python -m cierzo.bench.plan.calibrate`).
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.device import Device, Kind
from cierzo.engine.cost.measured import with_measured
from cierzo.engine.errors import refusal

# What to plan with: four fifths of the memory's rate (the best published decode kernels reach 85 to 89 % on these
# cards); of the arithmetic 40 % in grouped products, 60 % in dense ones and attention (their best published rows:
# 60 to 78 %); launches and host 1.0 ms a step, 1.8 with exchanges between cards.
STATED: dict[Kind, float] = {"memory": 0.8, "experts": 0.4, "products": 0.6, "attention": 0.6}
ONE_CARD_OVERHEAD_S, CARDS_OVERHEAD_S = 1.0e-3, 1.8e-3
NVLINK_BYTES_PER_S = 450e9  # 900 GB/s both ways
_NAMED = re.compile(rf"(?:([1-9]\d*)x)?({'|'.join(DATA_SHEETS)})")


def named(name: str) -> Device | None:
    """One card of the data sheets, or several, as `4xh100`; None for another name."""
    match = _NAMED.fullmatch(name)
    if match is None:
        return None
    cards, card = int(match[1] or 1), match[2]
    sheet = DATA_SHEETS[card]
    device = Device(
        name=name,
        source=f"data sheet of the {card.upper()} SXM; shares stated in engine/cost/cards.py",
        bytes_per_s=sheet.bytes_per_s,
        operations_per_s={"bf16": sheet.bf16, "fp8": sheet.fp8},
        memory_bytes=sheet.memory_bytes,
        cards=cards,
        link_bytes_per_s=NVLINK_BYTES_PER_S if cards > 1 else 0.0,
        stated=STATED,
        step_overhead_s=ONE_CARD_OVERHEAD_S if cards == 1 else CARDS_OVERHEAD_S,
    )
    return with_measured(device, card)


def find_device(name: str) -> Device:
    """Look up a named device, or read the one in a file. Raises ConfigError for an unknown name and a malformed
    file."""
    found = named(name)
    if found is not None:
        return found
    path = Path(name)
    if not path.is_file():
        limit = f"{', '.join(DATA_SHEETS)}, several as in 4xh100, or a JSON file"
        raise refusal("device", limit, name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Device)
    except msgspec.MsgspecError as error:
        raise refusal("device", "a JSON file that describes a device", name, str(error)) from error
