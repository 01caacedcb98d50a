"""Kernels have the same digest in every process, whatever it compiled before: Triton 3.6 does not see to that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton_interpreter

from cierzo.kernels.triton import launch, norm


class Probe:
    """Notes when its digest is taken."""

    def __init__(self, name: str, taken: list[str]) -> None:
        self._name, self._taken = name, taken

    @property
    def cache_key(self) -> str:
        """See JITFunction."""
        self._taken.append(self._name)
        return self._name


def test_digests_are_taken_in_the_order_of_definition_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_interpreter.repair()
    taken: list[str] = []
    monkeypatch.setattr(launch, "_unsettled", [Probe("helper", taken), object(), Probe("kernel", taken)])
    for _ in range(2):
        norm.rms_norm(torch.ones(1, 16).bfloat16(), torch.ones(16).bfloat16(), 1e-6)
    assert taken == ["helper", "kernel"]


def test_nothing_is_compiled_before_all_digests_are_taken() -> None:
    code = (
        "import torch\nfrom cierzo.kernels.triton import compile, launch, norm\n"
        "x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device='meta') for shape in ((1, 16), (16,)))\n"
        "(one,) = launch.dry_run(norm.rms_norm, x, weight, 1e-6)\n"
        "assert launch._unsettled\n"
        "one.kernel.kernel.warmup = lambda **_: print('unsettled:', len(launch._unsettled))\n"
        "compile.compile_ahead(one.kernel)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "unsettled: 0\n"
