"""The command for a machine with a GPU, at toy sizes on the stand-in; for rehearsal.py.

REHEARSAL in the environment is as rehearsed.py says, but for a fault: the number of a launch of its cell, which the
card fails as one that reaches for memory that is not there. nvidia-smi and libcuda.so.1 must be found by name.

    python -m standin lent carried          `python -m cierzo.bench.gpu.carried`, without whole models
    python -m standin lent kernels ...      `python -m cierzo.bench.gpu kernels ...`, with what was carried
    python -m standin lent models ...       `python -m cierzo.bench.gpu models ...`, of slices
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import rehearsed
import torch

from cierzo.bench.gpu import __main__ as command
from cierzo.bench.gpu import carried, served, timing
from cierzo.bench.gpu.runs import Group
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.cuda.launch.launcher import running_on
from standin.driver import Machine, on_card
from standin.library import ILLEGAL_ADDRESS
from standin.machine import Backend, torch_cuda

_machines: list[Machine] = []  # of this process: one, where it has the device
_held = ExitStack()


def prepared(
    groups: Sequence[Group],
    device: torch.device | None,
    *,
    right: Callable[..., Callable[..., Any]] = command.prepared,
) -> Callable[..., Any]:
    """See the command's: its new process has the stand-in from then on, unless it is to have no device."""
    if device is not None:
        machine = _held.enter_context(on_card())
        _machines.append(machine)
        for one in (torch_cuda(machine.card), running_on(Backend(machine.card.stream)), machine.card.loading()):
            _held.enter_context(one)
    return right(groups, device)


def faulty(groups: Callable[[torch.device], list[Group]], device: torch.device) -> list[Group]:
    """The groups that need none of torch's own kernels, with the faults that are asked for."""
    faults: dict[str, int] = rehearsed.ASKED.get("faults", {})

    def of(group: Group) -> Group:
        told = {cell: faults.get(f"{group.subject}: {cell}") for cell in group.tasks}
        return replace(group, tasks={cell: partial(run, task, told[cell]) for cell, task in group.tasks.items()})

    return [of(group) for group in groups(device) if group.subject != "torch"]


def run(task: Callable[[], Any], fails: int | None) -> Any:
    """A task; where it says so, its launch of this number fails."""
    if fails is not None:
        _machines[0].library.inject("kernel", fails, ILLEGAL_ADDRESS)
    return task()


def main(*words: str) -> int:
    """Run it."""
    rehearsed.FORMATS = ("nvfp4", "bf16")  # each is compiled
    rehearsed.make_toys()
    timing.SAMPLE_MS = 1
    command.CARRIED, command.prepared = Path(rehearsed.ASKED["results"], "kernels"), prepared
    device.require = lambda: None  # CUDA C++ runs on fibers, without CuPy
    if words[0] == "carried":
        carried.of_models = list
        return carried.main(command.CARRIED)
    rehearsed.put_in_place()
    served.check_slice = partial(served.check_slice, scale="tiny")
    command.RUNS = {name: (partial(faulty, groups), seconds) for name, (groups, seconds) in command.RUNS.items()}
    return command.main(words)
