"""CIERZO_INSTRUCTION_SET forces the whole suite to one instruction set, or to the reference."""

from __future__ import annotations

from cierzo.engine.config import default_instruction_set
from cierzo.kernels import registry

# Engines read the variable by themselves; this is for tests that bind without one, and for the lists of
# implementations that tests are made from, hence before any of them is imported.
registry.default_instruction_set = default_instruction_set()
