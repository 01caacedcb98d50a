"""What tests need that are about the C++ kernels alone."""

from __future__ import annotations

import pytest

from cierzo.kernels import registry

needs_native = pytest.mark.skipif(
    registry.default_instruction_set == "reference" or not registry.has_native(),
    reason="the native kernels are not there, or the suite is forced to the reference, which keeps plain weights",
)
