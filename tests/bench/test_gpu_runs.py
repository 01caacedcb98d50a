"""The two runs for a lent card: what they measure in which order, and what becomes of errors, hangs and time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rehearsal
import torch

from cierzo.bench.campaign.loop import DeviceLost, Run
from cierzo.bench.campaign.store import Sample, Store
from cierzo.bench.gpu import __main__ as command
from cierzo.bench.gpu import conformance, runs, timing
from cierzo.bench.gpu.runs import Group
from cierzo.kernels import registry
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cuda.launch import device

CPU = torch.device("cpu")
CEILINGS = {"copy_gb_per_s": 4000.0, "bf16_tflop_per_s": 800.0, "fp8_tflop_per_s": 1600.0}


def test_the_most_valuable_comes_first_and_nothing_is_missing() -> None:
    groups = runs.kernels(CPU)
    cells = [(group.subject, cell) for group in groups for cell in group.tasks]
    assert len(cells) == len(set(cells))
    for subject, every in (("conformance", conformance.checked()), ("kernels", timing.timed("kernels"))):
        assert {cell for one, cell in cells if one == subject} == {name for name, _ in every}
    assert [subject for subject, _ in cells[:3]] == ["machine", "ceilings", "widths"]
    timed = [(operation, cell) for operation, found in runs.FIRST_TIMINGS.items() for cell in found]
    assert len(timed) == 25
    first = cells[: max(cells.index(("kernels", f"{operation}, small4, {cell}")) for operation, cell in timed) + 1]
    assert sum(subject == "kernels" for subject, _ in first) == 25
    assert not [cell for _, cell in first if "small3" in cell or "gpt-oss" in cell]
    assert not [cell for subject, cell in first if "mxfp4" in cell or (" x " in cell and subject != "widths")]
    operations = list(dict.fromkeys(cell.split(",")[0] for subject, cell in first if subject == "conformance"))
    assert operations == [one for one in runs.ORDER if one in operations]
    assert operations[0] == "expert_terms"
    assert cells[-1][0] == "torch", "what is not ours comes last"
    assert not [cell for subject, cell in cells if subject == "torch" and "gpt-oss" in cell], "SDPA has no sinks"


def test_every_group_is_of_one_operation() -> None:
    """So that a process has no more than it to lose."""
    for group in runs.kernels(CPU):
        if group.subject not in ("machine", "ceilings", "widths"):
            assert len({cell.split(",")[0] for cell in group.tasks}) == 1


@pytest.fixture
def _any_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device, "require", lambda: None)
    yield
    registry.bind(KernelsConfig(), "cpu")


def measure(path: Path, deadline_s: float = 60.0, cell_s: float = 20.0, **tasks: Callable[[], Any]) -> Store:
    """A group of these tasks."""
    store, deadline = Store(path, {"commit": "abc", "device": "cpu"}), time.monotonic() + deadline_s
    campaign = command.Measurement([Group("part", tasks)], CPU, store, deadline, cell_s)
    try:
        Run(campaign, store, lambda _: None, deadline, announce=True, retry=False).measure(1)
    finally:
        campaign.close()
    return store


def raising(error: Exception) -> Callable[[], Any]:
    def task() -> None:
        raise error

    return task


@pytest.mark.usefixtures("_any_device")
def test_a_lost_device_is_known_by_each_library_s_words(tmp_path: Path) -> None:
    errors = dict(zip("abcde", rehearsal.CUDA_ERRORS, strict=True))
    lost = {name: raising(RuntimeError(text)) for name, text in errors.items()}
    others = {
        "full": raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        "wrong": raising(ValueError("no CUDA error, numbers are wrong")),
    }
    store = measure(tmp_path / "cells.jsonl", **lost, **others, fine=lambda: {"a": 1})
    for name, text in errors.items():
        assert store.error(name, "part") == f"DeviceLost: RuntimeError: {text}"
    assert store.error("full", "part").startswith("OutOfMemoryError: ")
    assert store.error("wrong", "part") == "ValueError: no CUDA error, numbers are wrong"
    assert store.measured("fine", "part") == {0: {"a": 1}}


@pytest.mark.usefixtures("_any_device")
def test_a_cell_that_time_cuts_off_is_as_if_untried_and_one_that_hangs_is_not(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"

    def slow() -> None:
        time.sleep(3600)

    began = time.monotonic()
    store = measure(path, deadline_s=3.0, quick=lambda: {"a": 1}, slow=slow, more=lambda: {"a": 2})
    assert time.monotonic() - began < 20
    assert store.measured("quick", "part") == {0: {"a": 1}}
    assert store.error("slow", "part") == "the run's time was over"
    assert not store.of("more", "part")
    store = measure(path, cell_s=1.0, quick=lambda: {"a": 3}, slow=slow, more=lambda: {"a": 2})
    assert store.error("slow", "part") == "hung: no answer within 1 s"
    assert store.measured("quick", "part") == {0: {"a": 1}}
    assert store.measured("more", "part") == {0: {"a": 2}}


@pytest.mark.usefixtures("_any_device")
def test_a_device_that_nobody_gets_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "touch", lambda _: raising(RuntimeError("CUDA error: no device"))())
    with pytest.raises(DeviceLost, match="no process gets the device: RuntimeError: CUDA error: no device"):
        measure(tmp_path / "cells.jsonl", a=lambda: {"a": 1})
    assert not list(Store(tmp_path / "cells.jsonl", {}))


def test_a_time_is_told_beside_the_limit_and_the_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cells.jsonl", {"commit": "abc", "device": "NVIDIA H200"})
    campaign = command.Measurement([], CPU, store, 0.0, 0.0)
    bf16, fp8 = ("linear, small4, decode 64, nvfp4", "linear, small4, decode 64, fp8 x fp8")
    found = {"us": 20.0, "bytes": 40e6, "flops": 8e9}
    assert campaign.told(bf16, found) == "20.0 us, 2000 GB/s, 400.0 TFLOP/s"
    store.add(Sample(cell="ceilings", subject="ceilings", round=0, started="", took_s=0.0, result=CEILINGS))
    assert campaign.told(bf16, found).endswith("TFLOP/s, 50% of the limit")
    found["flops"] = 12e9
    assert campaign.told(bf16, found).endswith("TFLOP/s, 75% of the limit")
    assert campaign.told(fp8, found).endswith("TFLOP/s, 50% of the limit")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    path = tmp_path / "engine" / "cost" / "predicted.json"
    path.parent.mkdir(parents=True)
    price = {"bytes": 40.1e6, "instructions": 4e6, "h100": [20.0, "memory"], "h200": [16.0, "issue"]}
    path.write_text(json.dumps({"cells": {bf16: price, fp8: price | {"bytes": 99e6}}}))
    assert campaign.told(bf16, found).endswith(
        "75% of the limit, 200 G instructions/s, 1.25 of the 16.0 us predicted (issue)"
    )
    assert campaign.told(fp8, found).endswith("50% of the limit")
    assert campaign.told("widths", {"all": True, "share": 0.12345}) == "all True, share 0.123"


def test_a_run_names_no_gpu_itself() -> None:
    """A driver does not survive a fork, so the process that starts the others must not touch it; and it must do
    without msgspec and whatever else a lent machine lacks."""
    code = (
        "import sys\nfor name in ('msgspec', 'uvloop', 'safetensors', 'tqdm'): sys.modules[name] = None\n"
        "import torch\ndef refuse(*_, **__): raise SystemExit('touches the GPU')\n"
        "for name in ('init', '_lazy_init', 'is_available', 'device_count', 'current_device', 'mem_get_info',\n"
        "             'get_device_properties', 'get_device_capability'): setattr(torch.cuda, name, refuse)\n"
        "import cierzo.bench.gpu.__main__ as command, cierzo.bench.gpu.compiled\n"
        "import cierzo.engine.cost.data_sheets, cierzo.engine.cost.operations, cierzo.engine.cost.sizes\n"
        "groups = command.runs.kernels(torch.device('cuda'))\n"
        "assert groups[1].bare and groups[1].subject == 'compile' and len(groups) > 50\n"
        "assert not [name for name in sys.modules if name.startswith('cupy')]"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models_need_no_more_than_what_is_bundled() -> None:
    """A bare machine lacks packages; those that the Makefile fetches for it suffice."""
    makefile = (command.ROOT / "Makefile").read_text(encoding="utf-8")
    bundled = set(re.findall(r"'([a-z0-9]+)>=", makefile[makefile.index("gpu-bundle:") :]))
    there = {"torch", "triton", "numpy", "cupy"} | bundled
    code = (
        "import sys\n"
        "from importlib.metadata import packages_distributions\n"
        "import torch, triton\n"
        f"lacking = set(packages_distributions()) - {there!r} - set(sys.modules) - {{'cierzo'}}\n"
        "for name in lacking: sys.modules[name] = None\n"
        "import cierzo.bench.gpu.__main__ as command\n"
        "assert command.runs.models(torch.device('cuda'))\n"
        "from cierzo.bench.gpu import served\n"
        "served.serving(*served.MODELS[0])"
    )
    assert {"msgspec", "safetensors", "tqdm"} <= bundled
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_results_of_another_commit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"gpu-cpu-{command.current_commit()}.jsonl"
    Store(path, {"commit": "another", "device": "cpu"}).add(
        Sample(cell="machine", subject="machine", round=0, started="", took_s=0.0)
    )
    assert command.main(["kernels", "--output", str(tmp_path)], "cpu") == 2
    assert "holds samples of commit 'another'" in capsys.readouterr().err


def test_without_a_gpu_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "output", lambda *_: "")
    assert command.main(["models"]) == 2
    assert "nvidia-smi finds no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget-s", "0"], "must be seconds above 0, got '0'"),
        (["--budget-s", "-5"], "must be seconds above 0, got '-5'"),
        (["--cell-s", "nan"], "must be seconds above 0, got 'nan'"),
        (["--cells", "nonesuch"], "--cells must be in a cell's name, got ['nonesuch']"),
        (["--output", "/dev/null/below"], "Not a directory: '/dev/null/below'"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = command.main(["kernels", "--output", str(tmp_path), *options], "cpu")
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_both_runs_keep_what_they_had(tmp_path: Path) -> None:
    """The rehearsal, of few operations: errors, crashes, a hang, a kill of the run."""
    said: list[str] = []
    parts = (rehearsal.killed, rehearsal.rest, rehearsal.retried)
    rehearsal.rehearse(rehearsal.Rehearsal(tmp_path, rehearsal.FEW), parts, said.append)
    assert all("as it should be" in line for line in said), "\n".join(said)


def test_a_rehearsal_that_deviates_says_so(tmp_path: Path) -> None:
    def wrong(on: rehearsal.Rehearsal) -> None:
        on.expect(False, "this")
        raise OSError("that")

    said: list[str] = []
    assert rehearsal.rehearse(rehearsal.Rehearsal(tmp_path), [wrong], said.append) == 2
    assert "DEVIATES" in said[0]
    assert said[1:] == ["    this", "    wrong: OSError: that"]
