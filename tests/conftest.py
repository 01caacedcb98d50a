"""CIERZO_INSTRUCTION_SET forces the whole suite to one instruction set, or to the reference; --sanitized."""

from __future__ import annotations

import os

# OpenMP reads it when torch is imported. The suite's processes share the cores: threads that wait for each other
# busily would take them from the threads that they wait for, which doubled the time of tests that use two.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest

from cierzo.engine.config import default_instruction_set
from cierzo.kernels import registry

# What an example takes is a matter of the machine and of what else runs on it.
hypothesis.settings.register_profile("cierzo", deadline=None)
hypothesis.settings.load_profile("cierzo")

# Triton reads it when a kernel is defined: in this process they run in its interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

# Engines read the variable by themselves; this is for tests that bind without one, and for the lists of
# implementations that tests are made from, hence before any of them is imported.
registry.default_instruction_set = default_instruction_set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", metavar="FOLDER", help="repeat native calls under sanitizers (make sanitize)")
    help_loads = "random loads of engines on the stand-in for a card (make standin)"
    parser.addoption("--standin-loads", metavar="N", type=int, default=0, help=help_loads)


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--sanitized")
    if folder:
        from sanitized import Recorder

        config.pluginmanager.register(Recorder(folder))
