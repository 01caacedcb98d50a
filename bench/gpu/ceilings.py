"""Costs of a kernel's machine code for each weight or token, and the ceilings that they may not pass.

The committed reports, bench/results/gpu-report-sm90-triton-*.json, are the ceilings: `make gpu-report` writes one
anew only where nothing rose. So counts fall for good, and rise only by REPORT=--accept, in a commit that says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cierzo.bench.gpu.configurations import digest, fingerprint
from cierzo.bench.gpu.loops import Loop, classes
from cierzo.kernels.triton.launch import Configuration

Lines = Mapping[str, Mapping[str, Any]]  # of a report, by configuration's name
RESULTS = Path(__file__).parents[1] / "results"
REGISTERS_STEP = 8  # CUDA programming guide, compute capability 9.0: a warp's in steps of 256


# Kernel of attention -> constants that are widths of its products with each token.
WIDTHS = {
    "mla_attend": ("BLOCK_R", "BLOCK_P", "BLOCK_R"),
    "gqa_attend": ("BLOCK_D", "BLOCK_D"),
    "flash": ("BLOCK_A", "BLOCK_B", "BLOCK_V"),
}


def unit(configuration: Configuration) -> tuple[str, int, int] | None:
    """Name of what a kernel of products is counted in, the number of it in one tile of the source, and that tile's
    multiplications; None of other kernels. Weights: those of both matrices of a pair. Tokens: of context, for the
    rows that a program has. A kernel of products is known by its constants, whatever its name."""
    has, get = configuration.constants, configuration.constants.get
    if {"BLOCK_N", "BLOCK_T", "BLOCK_K"} <= has.keys():
        paired = configuration.name == "expert_gate_up" or get("PAIRED")
        weights = has["BLOCK_N"] * has["BLOCK_K"] * (2 if paired else 1)
        return "weights", weights, weights * has["BLOCK_T"]
    if {"COLUMNS", "DEPTH", "ROWS"} <= has.keys():
        weights = has["COLUMNS"] * has["DEPTH"]
        return "weights", weights, weights * has["ROWS"]
    widths = WIDTHS.get(configuration.name, ())
    if not widths or not {"TOKENS", "ROWS", *widths} <= {*has, "BLOCK_B"}:
        return None
    across = sum(get(name, 0) for name in widths if name != "BLOCK_B" or get("B"))
    return "tokens", has["TOKENS"], has["TOKENS"] * has["ROWS"] * across


def tile_of(configuration: Configuration) -> int:
    """Multiplications of one warp in a tile of the source; 1 where nobody knows, of which any number is a multiple.

    Where warps do not share a tile evenly it is 1, too."""
    found = unit(configuration)
    each, rest = divmod(found[2], configuration.num_warps) if found else (1, 0)
    return 1 if rest else each


def units(configuration: Configuration, turn: Loop) -> tuple[str, int]:
    """The unit, and how many of it one turn of the loop of a program does, by its matrix instructions: a turn may
    hold several tiles of the source, or an n-th of one. A kernel without any has one tile in a turn. ("turns", 1)
    for a kernel without products.

    Raises ValueError if the turn has none of the kernel's matrix instructions, or those of no such part.
    """
    found = unit(configuration)
    if found is None:
        return "turns", 1
    name, number, multiplications = found
    done = turn.products * configuration.num_warps
    if not done and "MMA" not in classes(turn.everything):
        return name, number
    if done == 0 or (done % multiplications and multiplications % done):
        raise ValueError(
            f"{configuration.name}: {done} products in a turn of loop {turn.place[0]} of {turn.place[1]}, "
            f"no multiple of {multiplications}, nor a part"
        )
    return name, number * done // multiplications


def entry(configuration: Configuration, compiled: Any) -> dict[str, Any]:
    """The line of a Compiled in the report; `units` is how many `unit` one turn of the loop of a program does, and
    "turn", "outside" and "around" (which loops around the main one run again) are of one warp."""
    turn = compiled.turn
    name, number = units(configuration, turn)
    return {
        "configuration": digest(configuration),
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "shared_bytes": compiled.shared_bytes,
        "warps": configuration.num_warps,
        "stages": configuration.num_stages,
        "flushes": compiled.flushes,
        "unit": name,
        "units": number,
        "loops": compiled.loops,
        "loop": list(turn.place),
        "turn": {
            "issued": turn.issued,
            "skipped": turn.skipped,
            "drains": turn.drains,
            "classes": turn.classes(),
            "mma": turn.mma,
            "loads": turn.widths(),
        },
        "outside": classes(turn.outside),
        "around": classes(turn.around),
    }


def measures(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a line of the report that may only fall: instructions of all warps per unit, those outside the
    loop per program, what decides how many programs an SM holds at once, and faults. A thread's registers are given
    out in steps."""
    turn, share = line["turn"], line["warps"] / line["units"]
    counted = {"instructions": turn["issued"], "drains": turn["drains"], **turn["mma"], **turn["loads"]}
    counted |= {name: turn["classes"].get(name, 0) for name in ("F2F", "WAIT", "BARRIER", "LOCAL", "LDS", "STS")}
    found = {f"{name} a {line['unit'][:-1]}": number * share for name, number in counted.items()}
    found["instructions outside the loop"] = sum(line["outside"].values()) * line["warps"]
    found["registers"] = -(-line["registers"] // REGISTERS_STEP) * REGISTERS_STEP
    found["shared bytes"] = line["shared_bytes"]
    return found | line["flushes"] | {"spilled bytes": line["spill_bytes"]}


def rises(ceiling: Mapping[str, Any], line: Mapping[str, Any]) -> list[str]:
    """Texts of what is above its ceiling, and of stages below theirs: fewer hide less time."""
    old, stages, least = measures(ceiling), line["stages"], ceiling["stages"]
    found = [
        f"{name}: {number:.6g} above {old.get(name, 0):.6g}"
        for name, number in measures(line).items()
        if number > old.get(name, 0) * (1 + 1e-9)
    ]
    return [f"stages: {stages} below {least}", *found] if stages < least else found


def risen(old: Lines, new: Lines) -> dict[str, list[str]]:
    """Texts of what is wrong with a report by its lines' names. A line has the ceilings of the old one of its name,
    and of that of its configuration, which may have had another name. An old one that passes on neither is told."""
    of = {line["configuration"]: line for line in old.values()}
    found = {
        name: [
            *dict.fromkeys(
                text
                for ceiling in (old.get(name), of.get(line["configuration"]))
                if ceiling is not None
                for text in rises(ceiling, line)
            )
        ]
        for name, line in new.items()
    }
    kept = {line["configuration"] for line in new.values()}
    found |= {
        name: ["a ceiling that no kernel has any more"]
        for name, line in old.items()
        if name not in new and line["configuration"] not in kept
    }
    return {name: texts for name, texts in found.items() if texts}


def path(triton: str) -> Path:
    """The committed report of a version of Triton, "3.6.0" or "3.6"."""
    return RESULTS / f"gpu-report-sm90-triton-{'.'.join(triton.split('.')[:2])}.json"


def read(triton: str) -> dict[str, Any]:
    """The committed report: {} of a version that has none."""
    place = path(triton)
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}


def write(triton: str, lines: Lines) -> None:
    """Put a report in the place of the committed one: a line for each configuration."""
    head = {"triton": triton, "sources": fingerprint()}
    dense = json.JSONEncoder(separators=(",", ":")).encode
    body = ",\n".join(f"{dense(name)}: {dense(line)}" for name, line in lines.items())
    path(triton).write_text(f'{json.dumps(head)[:-1]}, "kernels": {{\n{body}\n}}}}\n', encoding="utf-8")
