"""The two commands for a lent card, rehearsed without one: `make gpu-rehearsal`; `make test` has a part of it.

Both run at toy sizes on interpreted kernels (rehearsed.py), in a folder of their own. Cells raise the CUDA errors
of torch, Triton and CuPy, after which their process has lost its device; they crash and hang; the whole run is
killed in the middle; the device is gone. A partial run must keep what it had, and the next one go on behind it.
A few cells run as they would on a card, on Triton's compiler, launcher and a stand-in of libcuda (standin/lent.py).

    python tests/support/rehearsal.py [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from standin.library import build

from cierzo.bench.campaign.store import STARTED, TIME_OVER

ROOT = Path(__file__).resolve().parents[2]
CUDA_ERRORS = (
    "CUDA error: an illegal memory access was encountered",
    "CUDA driver error: unspecified launch failure",
    "Triton Error [CUDA]: misaligned address",
    "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
    "cudaErrorLaunchFailure: unspecified launch failure",
)
TROUBLE = {"hang": "hung: no answer within", "kill": "its process died", "segfault": "its process died"}
STUCK = "conformance: rms_norm, small4, prefill, bf16"  # the cell in which the run is killed
FEW = ("linear", "rms_norm")  # of the part in `make test`
ON_CARD = ("rms_norm", "write_normed_latents", "expert_mlp", "linear")  # the last for what is compiled for widths
CARD_CELLS = (
    *("machine", "compile", "rms_norm, small4", "write_normed_latents, small4, decode, bf16"),
    *("conformance: expert_mlp, small4, decode, nvfp4", "kernels: expert_mlp, small4, decode 1, nvfp4"),
    "described: expert_mlp, small4, prefill 8192, nvfp4",
)
LOST = "conformance: rms_norm, small4, decode, bf16"  # the cell whose launch the card fails
SLICE = "small4 nvfp4: slice"
NVIDIA_SMI = """#!/bin/sh
case "$1" in *=name) echo stand-in ;; *=compute_cap) echo 9.0 ;; *) echo none ;; esac
"""
CELL_S, FEW_CELL_S, WAIT_S = 10.0, 6.0, 300.0
Row = dict[str, Any]


def faults(models: bool) -> dict[str, str]:
    """A fault of each kind by "subject: cell", in cells of `linear` or of whole models."""
    if models:
        places = [
            "small4 nvfp4: slice",
            "small4 nvfp4: 1 concurrent",
            "small4 nvfp4: step of 2",
            "small3 fp8: slice",
        ]
        return dict(zip(places, ("kill", CUDA_ERRORS[2], CUDA_ERRORS[0], "segfault"), strict=True))
    checks = [
        f"conformance: linear, small4, {size}, {f}" for size in ("decode", "prefill") for f in ("fp8", "nvfp4")
    ]
    times = [f"kernels: linear, small4, {size}, nvfp4" for size in ("decode 1", "decode 64", "prefill 8192")]
    kinds = (*CUDA_ERRORS[:4], *TROUBLE, CUDA_ERRORS[4])
    return dict(zip([*checks, *times, "widths: nvfp4"], kinds, strict=True))


@dataclass
class Rehearsal:
    """Runs of the command in a folder, and what deviates from what they should do."""

    folder: Path
    operations: Sequence[str] = ()
    on_card: bool = False  # on the stand-in's card
    deviations: list[str] = field(default_factory=list)
    said: str = ""  # by the last run

    def start(self, run: str, *words: str, faults: dict[str, Any] | None = None, output: str = "out") -> Any:
        """Begin a run; its process."""
        asked: dict[str, Any] = {"results": str(self.folder / "results"), "faults": faults or {}}
        if self.operations:
            asked["operations"] = self.operations
        places = os.pathsep.join(
            [str(ROOT / "src"), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
        )
        environment = {**os.environ, "REHEARSAL": json.dumps(asked), "PYTHONPATH": places}
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", "import rehearsed; raise SystemExit(rehearsed.main())", run]
        if self.on_card:
            del environment["TRITON_INTERPRET"]
            environment |= self._driver()
            command = [sys.executable, "-m", "standin", "lent", run]
        command += ["--output", str(self.folder / output), *words]
        log = (self.folder / "log.txt").open("w")
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def _driver(self) -> dict[str, str]:
        """Stand-ins for what a machine with a card has: libcuda and nvidia-smi, found by their names."""
        library = build(Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "include").parent
        program = self.folder / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(NVIDIA_SMI)
        program.chmod(0o755)
        found = {"LD_LIBRARY_PATH": str(library), "TRITON_LIBCUDA_PATH": str(library)}
        return found | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(self, run: str, *words: str, limit_s: float = WAIT_S, **more: Any) -> int:
        """A whole run, within its time; its exit status."""
        process, began = self.start(run, *words, **more), time.monotonic()
        try:
            status = int(process.wait(WAIT_S))
        finally:
            process.kill()
        took_s = time.monotonic() - began
        self.said = (self.folder / "log.txt").read_text()
        self.expect(took_s <= limit_s, f"it takes {took_s:.0f} s, more than {limit_s:.0f}")
        self.expect(not self.alive(), f"processes outlive the run: {self.alive()}")
        return status

    def expect(self, right: bool, otherwise: str) -> None:
        """Note a deviation."""
        if not right:
            self.deviations.append(otherwise)

    def rows(self, output: str = "out") -> list[Row]:
        """Samples of the file in a folder."""
        whole = self.bytes(output)
        return [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()[1:]]

    def bytes(self, output: str = "out") -> bytes:
        """The file in a folder."""
        return b"".join(path.read_bytes() for path in (self.folder / output).glob("gpu-*.jsonl"))

    def last(self, output: str = "out") -> dict[str, Row]:
        """The last sample by "subject: cell"."""
        return {named(row): row for row in self.rows(output)}

    def alive(self) -> list[str]:
        """Command lines of processes of this rehearsal."""
        mine, found = str(self.folder / "results").encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment, state = (path / "environ").read_bytes(), (path / "stat").read_text().rpartition(")")[2]
                if mine in environment and int(path.name) != os.getpid() and state.split()[0] != "Z":
                    found.append((path / "cmdline").read_text().replace("\0", " ")[-200:])
            except OSError:
                continue  # it has ended
        return found

    def failed(self, told: dict[str, str], output: str = "out") -> None:
        """Cells failed as told, and all others are measured."""
        last = self.last(output)
        for name, fault in told.items():
            error = last.get(name, {"error": "no row"})["error"]
            self.expect(TROUBLE.get(fault, fault) in error, f"{name}: {error!r}, should be {fault!r}")
            if fault in CUDA_ERRORS:
                self.expect(error.startswith("DeviceLost: "), f"{name}: {error!r} is not known as a lost device")
        wrong = {name: row["error"] for name, row in last.items() if row["error"] and name not in told}
        self.expect(not wrong, f"failed without a fault: {wrong}")


def named(row: Row) -> str:
    """ "subject: cell" of a sample."""
    return f"{row['subject']}: {row['cell']}"


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true."""
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def killed(on: Rehearsal) -> None:
    """The run is killed in the middle of a cell, which its last sample tells; none of its processes lives on."""
    process = on.start("kernels", "--cell-s", "600", "--cells", "rms_norm, small4", faults={STUCK: "stuck"})
    wait_for(lambda: STUCK in on.last() or process.poll() is not None)
    on.expect(STUCK in on.last(), f"{STUCK} never began: {(on.folder / 'log.txt').read_text()[-600:]}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    on.expect(wait_for(lambda: not on.alive()), f"processes outlive a killed run: {on.alive()}")
    rows = on.rows()
    measured = [row for row in rows if not row["error"]]
    on.expect(len(measured) > 0, "nothing was measured before the kill")
    on.expect(rows[-1]["error"] == STARTED, f"the last sample is {rows[-1]}")
    with next((on.folder / "out").glob("*.jsonl")).open("ab") as file:
        file.write(b'{"cell": "half a li')


def short(on: Rehearsal) -> None:
    """A run without enough time ends in it; it keeps what was there, and leaves out what the run before died of."""
    before = on.bytes().rpartition(b"\n")[0]
    on.run("kernels", "--budget-s", "24", faults=faults(models=False), limit_s=24.0)
    on.expect(on.bytes().startswith(before), "samples of the killed run are gone")
    on.expect(len(on.rows()) > before.count(b"\n"), "nothing was measured in the time that there was")
    on.expect(on.last()[STUCK]["error"] == STARTED, f"{STUCK} was tried again")


def rest(on: Rehearsal) -> None:
    """The next runs do what is left: every fault is told, and touches no other cell; then nothing is left."""
    told = {**faults(models=False), STUCK: STARTED}
    words = ("kernels", "--budget-s", "280", "--cell-s", str(FEW_CELL_S if on.operations else CELL_S))
    status = on.run(*words, faults=faults(models=False))
    on.failed(told)
    on.expect(status == 1, f"exit status {status} of a run with failures")
    on.expect(" left" not in on.said, f"cells are left: {on.said[-600:]}")
    states = [(named(row), row["error"]) for row in on.rows() if row["error"] in (STARTED, TIME_OVER)]
    again = Counter(name for name, state in states if state == STARTED) - Counter(dict(states).keys())
    cut_off = {name for name, state in states if state == TIME_OVER}
    on.expect(again.keys() <= cut_off, f"begun again: {sorted(again)}, cut off: {sorted(cut_off)}")
    before = on.bytes()
    status = on.run(*words)
    on.expect((status, on.bytes()) == (0, before), f"a further run measures something, or ends with {status}")


def retried(on: Rehearsal) -> None:
    """With --retry what failed is tried again, and nothing else; in another folder it starts from what is there."""
    (on.folder / "results").mkdir(exist_ok=True)
    for path in (on.folder / "out").glob("*.jsonl"):
        (on.folder / "results" / path.name).write_bytes(path.read_bytes())
    failed = {name for name, row in on.last().items() if row["error"]}
    status = on.run("kernels", "--retry", "--budget-s", "280", output="other")
    again = {named(row) for row in on.rows("other")[len(on.rows()) :]}
    on.expect(status == 0, f"exit status {status}: {on.said[-600:]}")
    on.expect(again == failed, f"tried again: {sorted(again ^ failed)} should not, or should too")
    on.expect(on.bytes("other").startswith(on.bytes()), "the file that was brought along is not gone on with")


def gone(on: Rehearsal) -> None:
    """Where no process gets the device any more, the run ends, and blames no further cell."""
    fault = {"conformance: rms_norm, small4, decode, bf16": "gone"}
    status = on.run("kernels", "--cells", "conformance: rms_norm", faults=fault, output="gone")
    last = on.last("gone")
    on.expect(set(last) == set(fault), f"a run without a device has samples of {sorted(last)}")
    on.expect(status == 1, f"exit status {status} without a device")
    (on.folder / "results" / "gone").unlink()
    on.run("kernels", "--cells", "conformance: rms_norm", output="gone")
    left = {name for name, row in on.last("gone").items() if row["error"]}
    on.expect(
        left == set(fault) and len(on.last("gone")) > 1, f"behind a lost device: {sorted(left)} have no result"
    )


def models(on: Rehearsal) -> None:
    """Whole models: each fault costs its cell; the others are measured; then what failed is, too."""
    for path in (on.folder / "results").glob("*.jsonl"):
        path.unlink()
    told = faults(models=True)
    status = on.run("models", "--budget-s", "280", faults=told, output="models")
    on.failed(told, "models")
    on.expect(status == 1, f"exit status {status} of a run with failures")
    status = on.run("models", "--retry", "--budget-s", "280", output="models")
    wrong = {name for name, row in on.last("models").items() if row["error"]}
    on.expect((status, wrong) == (0, set()), f"exit status {status}, without a result: {sorted(wrong)}")


def on_card(on: Rehearsal) -> None:
    """As on a card: carried kernels are found, and one that is not there is compiled; launched by Triton they give
    the right values, alone, in company and through descriptors; a launch that the card fails costs its cell."""
    card = Rehearsal(on.folder / "card", ON_CARD, on_card=True, deviations=on.deviations)
    (card.folder / "results").mkdir(parents=True)
    status = card.run("carried")
    card.expect(status == 0, f"exit status {status}, nothing is carried: {card.said[-600:]}")
    names = list(json.loads((card.folder / "results" / "kernels" / "compiler.json").read_text())["keys"])
    shutil.rmtree(card.folder / "results" / "kernels" / names[0])
    words = ("kernels", "--budget-s", "120", "--cells", *CARD_CELLS)
    status = card.run(*words, faults={LOST: 3})
    last = card.last()
    card.expect(status == 1, f"exit status {status} of a run with a failure: {card.said[-600:]}")
    card.failed({LOST: "DeviceLost: AcceleratorError: CUDA error: an illegal memory access was encountered"})
    compiled = last["compile: all"]["result"]
    counts = {name: compiled.get(name) for name in ("from cache", "compiled", "failed")}
    card.expect(counts == {"from cache": len(names) - 1, "compiled": 1, "failed": 0}, f"kernels: {counts}")
    before = len(card.rows())
    status = card.run(*words, "--retry")
    again = {named(row) for row in card.rows()[before:]}
    card.expect((status, again) == (0, {LOST}), f"exit status {status} without the fault, measured: {again}")
    for name, row in card.last().items():
        if row["subject"] in ("conformance", "kernels", "described"):
            found = row["result"] or {}
            # What an earlier cell of the process has loaded is not looked for again.
            loaded = row["subject"] != "conformance" or found.get("from cache", 0) > 0
            card.expect(loaded and "compiled" not in found, f"{name}: not by carried kernels: {found}")
            card.expect(found.get("implementation") == "triton", f"{name}: not by Triton: {found}")
            card.expect(found.get("replayed", True), f"{name}: not by a recording")


def model_on_card(on: Rehearsal) -> None:
    """As on a card: two layers of Small 4 in NVFP4, compiled as they are launched, give the reference's logits."""
    card = Rehearsal(on.folder / "card", on_card=True, deviations=on.deviations)
    (card.folder / "results").mkdir(parents=True, exist_ok=True)
    status = card.run("models", "--budget-s", "120", "--cells", SLICE, output="models")
    result = card.last("models")[SLICE]["result"] or {}
    card.expect(status == 0, f"exit status {status}: {card.said[-600:]}")
    card.expect(result.get("compiled", 0) > 0, f"{SLICE}: nothing was compiled: {result}")


FIRST: tuple[Callable[[Rehearsal], None], ...] = (killed, short, rest, gone, retried)


def rehearse(on: Rehearsal, parts: Sequence[Callable[[Rehearsal], None]], say: Callable[[str], None]) -> int:
    """Play the parts, in order, and tell the verdicts; the number of deviations."""
    on.folder.mkdir(parents=True, exist_ok=True)
    (on.folder / "results").mkdir(exist_ok=True)
    for part in parts:
        began, before = time.monotonic(), len(on.deviations)
        try:
            part(on)
        except Exception as error:  # whatever it is, it is a deviation
            on.deviations.append(f"{part.__name__}: {type(error).__name__}: {error}")
        verdict = "DEVIATES" if len(on.deviations) > before else "as it should be"
        say(f"{part.__name__:14}{time.monotonic() - began:6.0f} s  {verdict}: {(part.__doc__ or '').strip()}")
        for deviation in on.deviations[before:]:
            say(f"    {deviation}")
    return len(on.deviations)


def main() -> int:
    """All parts; exit status 1 with any deviation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, metavar="DIR", help="default: a new one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="gpu-rehearsal-"))
    print(f"in {folder}", flush=True)
    on = Rehearsal(folder)
    deviations = rehearse(on, (*FIRST, models, on_card, model_on_card), lambda line: print(line, flush=True))
    print(f"{deviations or 'no'} deviations; what the runs left is in {folder}")
    return 1 if deviations else 0


if __name__ == "__main__":
    raise SystemExit(main())
