"""The two runs' cells, in their order: the most valuable first, since a card is lent for minutes.

Each group is measured by a process of its own (bench/campaign/isolation.py), with the same tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cierzo.bench.gpu import carried, conformance, timing, widths
from cierzo.bench.gpu.cases import CASES, SMALL4
from cierzo.bench.revision import installed_versions, output
from cierzo.kernels.triton.compile import compile_launcher

Tasks = Mapping[str, Callable[[], Any]]  # by cell
SEEDS = 1 << 31
COMPILE_S = 90.0  # for all kernels: what was not carried takes some seconds each, on all cores
MODEL_S = 75.0  # of a cell of a whole model: the first one of a process makes it

# Operations of Small 4 in the order of what they decide; those that are not named come last.
ORDER = (
    *("expert_terms", "mla_values", "mla_prefill", "rotate_and_absorb", "linear", "lm_head"),
    *("route_groups", "draw", "peaks", "top_tokens", "log_probabilities", "norm_latents", "add_rms_norm"),
    *(
        "expert_mlp",
        "mla_decode",
        "mla_absorb",
        "mla_unabsorb",
        "route",
        "group_by_expert",
        "write_normed_latents",
        "write_latents",
        "rms_norm",
    ),
    *("latents_of", "absorbed_queries", "rope_tables", "apply_rope"),
)
FIRST_FORMATS = ("nvfp4", "fp8", "bf16")
DECODES = ("decode 1", "decode 8", "decode 64", "decode 256")
# The first timings of Small 4, 25 together: operation -> sizes and formats.
FIRST_TIMINGS = {
    "expert_terms": (*(f"{size}, nvfp4" for size in (*DECODES, "prefill 8192")), "decode 64, fp8"),
    "mla_values": (
        *(f"{size}, fp8" for size in (*DECODES[:1], *DECODES[2:], "decode 64, one prefix", "decode 1 of 256k")),
        "decode 64, bf16",
    ),
    "mla_prefill": ("prefill 8192, fp8",),
    "rotate_and_absorb": ("decode 64, bf16",),
    "linear": ("decode 1, nvfp4", "decode 64, nvfp4", "prefill 8192, nvfp4", "decode 64, bf16"),
    "lm_head": ("decode 1, nvfp4", "decode 64, nvfp4"),
    "route_groups": ("decode 64, bf16", "prefill 8192, bf16"),
    "draw": ("decode 64, bf16",),
    "norm_latents": ("decode 64, fp8",),
    "add_rms_norm": ("decode 64, bf16",),
}


@dataclass(frozen=True, slots=True)
class Group:
    """Cells that one process measures. limit_s: of a cell, where that is not the run's. bare: it needs no device,
    and does not touch it."""

    subject: str
    tasks: Tasks
    limit_s: float = 0.0
    bare: bool = False


def kernels(device: torch.device) -> list[Group]:
    """The card and what it can do at most; then each operation: against the reference, in company, timed."""
    seed = time.time_ns() % SEEDS
    checks: dict[str, Callable[[], Any]]
    checks = {name: partial(conformance.check, *cell, device, seed) for name, cell in conformance.checked()}
    timings: dict[str, dict[str, Callable[[], Any]]] = {
        subject: {
            name: partial(timing.measure, *cell, device, subject=subject) for name, cell in timing.timed(subject)
        }
        for subject in ("kernels", "described", "torch")
    }
    groups = [
        Group("machine", {"machine": partial(describe, device)}),
        Group("ceilings", {"ceilings": partial(timing.ceilings, device)}),
        Group("widths", {format: partial(widths.compare, format, SMALL4, device) for format in widths.FORMATS}),
    ]
    if device.type == "cuda":
        groups.insert(1, Group("compile", {"all": partial(compile_all, device)}, COMPILE_S, bare=True))
    for operation in ORDER:
        start = f"{operation}, {SMALL4.name}"
        chosen = {
            one for one in checks if one.startswith(start) and one.endswith(FIRST_FORMATS) and " x " not in one
        }
        wanted = {f"{start}, {one}" for one in FIRST_TIMINGS.get(operation, ())}
        groups += [
            Group("conformance", _taken(checks, chosen)),
            Group("kernels", _taken(timings["kernels"], wanted)),
        ]
    for subject, tasks in {"conformance": checks, **timings}.items():
        for operation in (*ORDER, *(name for name in CASES if name not in ORDER)):
            rest = {name for name in tasks if name.startswith(f"{operation}, ")}
            groups.append(Group(subject, _taken(tasks, rest)))
    return [group for group in groups if group.tasks]


def _taken(tasks: dict[str, Callable[[], Any]], names: set[str]) -> Tasks:
    """These tasks, in their order, which are taken away."""
    return {name: tasks.pop(name) for name in list(tasks) if name in names}


def compile_all(device: torch.device) -> dict[str, Any]:
    """Compile, or find, what the run launches. Without touching the card, whose driver does not survive a fork."""
    capability = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").partition("\n")[0]
    wanted = carried.launched(carried.every_cell())
    return carried.compile_all(wanted, int(capability.replace(".", "")), compile_launcher)[0]


def models(device: torch.device) -> list[Group]:
    """Whole models with random weights: logits of a slice, then loads, on one engine."""
    from cierzo.bench.gpu import served  # takes msgspec

    return [Group(name, tasks, MODEL_S) for name, tasks in served.subjects(device).items()]


def describe(device: torch.device) -> dict[str, Any]:
    """The card that figures belong to, its driver and the versions of packages, as JSON."""
    found: dict[str, Any] = {"device": str(device), "versions": installed_versions()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": driver.partition("\n")[0],
        }
    return found
