"""Results of a run on a card, one line of JSON a cell: what is there is not measured again."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "numpy", "msgspec")

Cell = dict[str, Any]  # JSON: the one place where a result is no struct, for msgspec may be missing here


class Cells:
    """A file of cells. Each has a part, a name within it, and either results or an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[Cell] = []
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, torn = text.rpartition("\n")  # a run may have been stopped within a line
        if torn:
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        self.all += [json.loads(line) for line in whole.splitlines()]

    def has(self, part: str, name: str) -> bool:
        """Whether the cell was measured; one that failed is tried again."""
        return any(cell["part"] == part and cell["name"] == name and not cell["error"] for cell in self.all)

    def add(self, part: str, name: str, results: Any, error: str = "") -> Cell:
        """Keep a cell, on disk before this returns."""
        cell = {"part": part, "name": name, "error": error, "results": results}
        self.all.append(cell)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        return cell

    def of(self, part: str) -> list[Cell]:
        """The last cell of every name in a part."""
        return list({cell["name"]: cell for cell in self.all if cell["part"] == part}.values())


def describe(device: torch.device) -> Cell:
    """The card, its driver, the versions and the commit that figures belong to."""
    found: Cell = {"device": str(device), "commit": commit(), "versions": _versions()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def commit() -> str:
    """HEAD of this repository, with "-dirty" where files differ from it."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD") or "unknown"
    return head + ("-dirty" if _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
