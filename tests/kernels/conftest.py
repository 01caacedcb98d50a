"""The native kernels, once per instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cierzo.kernels.cpu import native


@pytest.fixture(params=native.available())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Native calls use this set; afterwards the best one again, and torch's number of threads."""
    yield native.select(request.param)
    native.select()
    native.set_threads(0)
