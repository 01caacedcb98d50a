"""Triton's kernels in the interpreter; some also compiled, in another process, once for all that run tests."""

from __future__ import annotations

import os
from typing import Any

import pytest
import triton_interpreter
from compiled_ahead import compiled_once

triton_interpreter.repair()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """compiled_ahead.NAMES by name: fields of Compiled, and the line of the report."""
    folder = tmp_path_factory.getbasetemp()
    return compiled_once(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)
