"""Predicted times of whole steps of Small 4 on an H200: `python -m cierzo.bench.gpu.steps [--against REVISION]`.

NVFP4 weights, an FP8 cache; decoding of 1, 64 and 256 sequences with contexts of 4,096 tokens, and a prompt of
8,192. Milliseconds by operation, from the table of predicted operations (engine/cost/predicted.json, written by
`make gpu-report TRITON=3.6`) at the constants that engine/cost/roofs.py has frozen. --against: beside those of a
revision of this repository, priced by its own table and list of operations; git hands them over.

One of the frozen constants no longer describes the code: HOST_LAUNCH_S, 67 us for a launch that is not replayed,
was that of a Configuration made anew and of Triton's own way to its launcher. `python -m standin host_time`, of
tests/support, counts the host's time today. The constant counts here for the prompt alone, and only where the
device would wait for the host.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.cost.step_model import StepModel
from cierzo.engine.cost.work import StepShape

ROOT = Path(__file__).resolve().parents[2]
MODEL, DEVICE = "small4", "simulated:h200"
CONTEXT, PROMPT, BATCHES = 4096, 8192, (1, 64, 256)
REST = "host and launches that it delays"
Steps = dict[str, dict[str, float]]  # step -> operation -> milliseconds


def steps() -> Steps:
    """Milliseconds of each step by operation, largest first; those of the whole are their sum."""
    config = resolve(EngineOptions(model=MODEL, device=DEVICE, weights="nvfp4", kv_dtype="fp8"))
    assert config.card is not None
    model = StepModel(config, config.card)
    shapes = {
        f"decode {count} of {CONTEXT:,}": (StepShape.of([(CONTEXT - 1, 1)] * count, generated=True), count)
        for count in BATCHES
    }
    shapes[f"prefill {PROMPT:,}"] = (StepShape.of([(0, PROMPT)], generated=False), 1)
    found: Steps = {}
    for name, (shape, rows) in shapes.items():
        totals, by_operation = model.time(shape, float(rows)), defaultdict[str, float](float)
        for roof, seconds in totals.roofs_s.items():
            by_operation[roof.partition(" of ")[2]] += float(seconds) * 1e3
        by_operation[REST] = float(totals.total_s) * 1e3 - sum(by_operation.values())
        found[name] = dict(sorted(by_operation.items(), key=lambda item: -item[1]))
    return found


def steps_of(revision: str) -> Steps:
    """`steps` of a revision's tree, by this file. Raises CalledProcessError if git or that tree fails."""
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(["git", "-C", ROOT, "archive", revision], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=packed, check=True)
        shutil.copy(__file__, Path(folder, "bench", "gpu", "steps.py"))
        command = [sys.executable, "-m", "cierzo.bench.gpu.steps", "--json"]
        command = ["env", f"PYTHONPATH={Path(folder, 'src')}", *command]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    found: Steps = json.loads(done.stdout)
    return found


def told(found: Steps, before: Steps | None, revision: str) -> list[str]:
    """Lines of the table. before: of another revision, with operations of its own."""
    lines = []
    for name, parts in found.items():
        old = None if before is None else before[name]
        head = "" if old is None else f"{revision:>12}{'times':>8}"
        lines += [
            f"{name:44}{'ms':>10}{head}",
            _line("the whole step", sum(parts.values()), None if old is None else sum(old.values())),
        ]
        every = {**parts, **dict.fromkeys((old or {}).keys() - parts.keys(), 0.0)}
        lines += [
            _line(f"  {part}", ms, None if old is None else old.get(part, 0.0))
            for part, ms in every.items()
            if max(ms, (old or {}).get(part, 0.0)) >= 0.0005
        ]
        lines.append("")
    return lines


def _line(name: str, ms: float, before: float | None) -> str:
    beside = "" if before is None else f"{before:12.3f}{before / ms if ms else 0:8.2f}"
    return f"{name:44}{ms:10.3f}{beside}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or with --json the numbers."""
    parser = argparse.ArgumentParser(prog="cierzo.bench.gpu.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="", metavar="REVISION", help="print another revision's beside them")
    parser.add_argument("--json", action="store_true", help="print one object, without a table")
    options = parser.parse_args(argv)
    found = steps()
    if options.json:
        print(json.dumps(found))
        return 0
    before = steps_of(options.against) if options.against else None
    print("\n".join(told(found, before, options.against[:12])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
