"""Devices by name, and from files.

Named ones are data sheets with stated shares: `h100`, `h200`, and several of one kind, as in `4xh100`. The shares
that `make gpu` has measured take their place: the newest of a card's files of samples (bench/campaign/store.py) in
bench/results counts, `gpu-<card>-<commit>.jsonl`. A file (JSON of a `Device`) describes any other device.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import msgspec

from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.device import Device, Kind
from cierzo.engine.errors import ConfigError, refusal

# What to plan with: four fifths of the memory's rate (the best published decode kernels reach 85 to 89 % on these
# cards); of the arithmetic 40 % in grouped products, 60 % in dense ones and attention (their best published rows:
# 60 to 78 %); launches and host 1.0 ms a step, 1.8 with exchanges between cards.
STATED: dict[Kind, float] = {"memory": 0.8, "experts": 0.4, "products": 0.6, "attention": 0.6}
ONE_CARD_OVERHEAD_S, CARDS_OVERHEAD_S = 1.0e-3, 1.8e-3
NVLINK_BYTES_PER_S = 450e9  # 900 GB/s both ways
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
# Kernels that a step counts under another name (work.py): its norms, alone or after a sum.
STEP_NAMES = {"rms_norm": "norm", "add_rms_norm": "norm"}
_NAMED = re.compile(rf"(?:([1-9]\d*)x)?({'|'.join(DATA_SHEETS)})")


def named(name: str) -> Device | None:
    """Device by name: a card of the data sheets, or several, as `4xh100`; None for another name."""
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
    if (found := named(name)) is not None:
        return found
    path = Path(name)
    if not path.is_file():
        limit = f"{', '.join(DATA_SHEETS)}, several as in 4xh100, or a JSON file"
        raise refusal("device", limit, name)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Device)
    except (OSError, msgspec.MsgspecError) as error:
        raise refusal("device", "a JSON file that describes a device", name, str(error)) from error
    if found.calibration:
        raise refusal("device", "no calibration", name, "it is for --device cpu --calibration FILE")
    return found


def with_measured(device: Device, card: str, folder: Path = RESULTS) -> Device:
    """Give `device` the shares found on a card of this name ("h200"), if there are any. Raises ConfigError for a
    file that is not what the GPU bench writes."""
    files = [path for path in folder.glob("gpu-*.jsonl") if card in path.stem.split("-")]
    if not files:
        return device
    newest = max(files, key=lambda path: path.stat().st_mtime)
    measured: dict[str, dict[float, float]] = defaultdict(dict)  # of a size the last sample counts
    whole = newest.read_bytes().rpartition(b"\n")[0]  # a run that was killed leaves half a line
    for number, line in enumerate(whole.splitlines()[1:], 2):
        try:
            sample = json.loads(line)
            ours = sample["subject"] == "kernels" and ", small" in sample["cell"]  # not gpt-oss's layers
            if ours and (found := sample["result"]):
                operation, *_, format = str(sample["cell"]).split(", ")
                # products are computed in bf16, but for those that the bench says to have FP8 activations
                rate = device.operations_per_s["fp8" if format.endswith("x fp8") else "bf16"]
                limit_s = max(found["bytes"] / device.bytes_per_s, found["flops"] / rate)
                if not (limit_s > 0 and found["us"] > 0):
                    raise ValueError(f"us {found['us']} and bytes or flops must be above 0")
                name = f"{STEP_NAMES.get(operation, operation)} {format}"
                measured[name][limit_s] = limit_s / found["us"] * 1e6
        except (ValueError, KeyError, TypeError) as error:
            where = f"{newest.name}, line {number}"
            raise ConfigError(f"{where}: {error}", field="device", value=where) from error
    source = f"{device.source}; kernels as in bench/results/{newest.name}" if measured else device.source
    return msgspec.structs.replace(device, measured=dict(measured), source=source)
