"""Devices by name, and from files.

Named ones are data sheets: `h100`, `h200`, and several of one kind, as in `4xh100`. What their kernels reach
is predicted from machine code and launches (predicted.json, which `make gpu-report` writes by roofs.py). What
`make gpu` has measured takes the predictions' place, and corrects those of other sizes: the newest of a card's
files of samples (bench/campaign/store.py) in bench/results counts, `gpu-<card>-<commit>.jsonl`. A file (JSON of a
`Device`) describes any other device.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.device import LEAST_SHARE, MOST_SHARE, Curve, Device
from cierzo.engine.cost.roofs import HOST_LAUNCH_S
from cierzo.engine.errors import ConfigError, refusal

# What a step takes on the host while no kernel runs: README's step loop without a model, 64 running, at its median.
# On several cards, besides, two exchanges a layer: 11 us before the first byte moves, 36 layers. Stated.
HOST_STEP_S, EXCHANGES_S = 0.25e-3, 0.8e-3
NVLINK_BYTES_PER_S = 450e9  # 900 GB/s both ways
PREDICTED = Path(__file__).with_name("predicted.json")
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
# What the GPU bench has measured -> the operation of a step that it corrects, where that has another name: of the
# products around attention it times the one behind.
STEP_NAMES = {"linear": "linear_in"}
WIDTHS = {"small4": 4096, "small3": 5120}  # of the models of the table
_NAMED = re.compile(rf"(?:([1-9]\d*)x)?({'|'.join(DATA_SHEETS)})")


def named(name: str) -> Device | None:
    """Device by name: a card of the data sheets, or several, as `4xh100`; None for another name."""
    match = _NAMED.fullmatch(name)
    if match is None:
        return None
    cards, card = int(match[1] or 1), match[2]
    sheet, (triton, curves) = DATA_SHEETS[card], predicted(card)
    device = Device(
        name=name,
        source=f"data sheet of the {card.upper()} SXM; kernels as in engine/cost/predicted.json",
        bytes_per_s=sheet.bytes_per_s,
        operations_per_s={"bf16": sheet.bf16, "fp8": sheet.fp8},
        memory_bytes=sheet.memory_bytes,
        cards=cards,
        link_bytes_per_s=NVLINK_BYTES_PER_S if cards > 1 else 0.0,
        predicted=curves,
        predicted_from=f"the machine code of Triton {triton}",
        launch_s=HOST_LAUNCH_S,
        step_overhead_s=HOST_STEP_S + (EXCHANGES_S if cards > 1 else 0.0),
    )
    return with_measured(device, card)


@cache
def predicted(card: str) -> tuple[str, dict[str, Curve]]:
    """The Triton that compiled, and each operation's curve by the names of `Device.predicted`."""
    made = json.loads(PREDICTED.read_bytes())
    found: dict[str, dict[float, tuple[float, str, int]]] = defaultdict(dict)
    for name, cell in made["cells"].items():
        operation, model, _, format = name.split(", ")
        calls, (us, roof) = cell["calls"], cell[card]
        point = us / 1e6 / calls, roof, round(cell["launches"] / calls)
        limit_s = _limit_s(DATA_SHEETS[card], cell, format) / calls
        key = f"{operation} {format}"
        found[key][limit_s] = found[f"{key}, {WIDTHS[model]} wide"][limit_s] = point
    curves = {}
    for name, points in found.items():
        limits_s = sorted(points)
        seconds, roofs, launches = zip(*(points[limit_s] for limit_s in limits_s), strict=True)
        curves[name] = Curve(limits_s, list(seconds), list(roofs), list(launches))
    return made["triton"], curves


def _limit_s(sheet: Any, found: Mapping[str, Any], format: str) -> float:
    """Seconds for bytes or operations. Products are computed in bf16, but for those that the bench says to have FP8
    activations. sheet: rates in `bytes_per_s`, `bf16`, `fp8`."""
    rate = sheet.fp8 if format.endswith("x fp8") else sheet.bf16
    return float(max(found["bytes"] / sheet.bytes_per_s, found["flops"] / rate))


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
    """Give `device` the shares found on a card of this name ("h200"), if there are any, and correct its predictions
    by them. Raises ConfigError for a file that is not what the GPU bench writes."""
    files = [path for path in folder.glob("gpu-*.jsonl") if card in path.stem.split("-")]
    if not files:
        return device
    newest = max(files, key=lambda path: path.stat().st_mtime)
    measured: dict[str, dict[float, float]] = defaultdict(dict)  # seconds by size, of which the last sample counts
    whole = newest.read_bytes().rpartition(b"\n")[0]  # a run that was killed leaves half a line
    for number, line in enumerate(whole.splitlines()[1:], 2):
        try:
            sample = json.loads(line)
            ours = sample["subject"] == "kernels" and ", small" in sample["cell"]  # not gpt-oss's layers
            if ours and (found := sample["result"]):
                operation, model, *_, format = str(sample["cell"]).split(", ")
                limit_s, took_s = _limit_s(DATA_SHEETS[card], found, format), found["us"] / 1e6
                if not (took_s > 0 and LEAST_SHARE <= limit_s / took_s <= MOST_SHARE):
                    raise ValueError(f"us {found['us']}: {limit_s * 1e6:.4g} are the least that this card takes")
                name = f"{STEP_NAMES.get(operation, operation)} {format}"
                measured[name][limit_s] = measured[f"{name}, {WIDTHS.get(model)} wide"][limit_s] = took_s
        except (ValueError, KeyError, TypeError) as error:
            where = f"{newest.name}, line {number}"
            raise ConfigError(f"{where}: {error}", field="device", value=where) from error
    return msgspec.structs.replace(
        device,
        measured={
            name: {size: size / took_s for size, took_s in found.items()}
            for name, found in measured.items()
            if not name.endswith(" wide")
        },
        predicted={
            name: curve.measured(measured[name]) if name in measured else curve
            for name, curve in device.predicted.items()
        },
        source=f"{device.source}; kernels as in bench/results/{newest.name}" if measured else device.source,
    )
