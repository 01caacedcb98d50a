"""The native kernels, once per instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cierzo.kernels import registry
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native


@pytest.fixture(params=native.available())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Native calls use this set, whatever the suite is forced to; afterwards the best one, and torch's threads."""
    monkeypatch.setattr(registry, "default_instruction_set", request.param)
    registry.bind(KernelsConfig(), "cpu")
    yield native.select(request.param)
    native.select()
    native.set_threads(0)
