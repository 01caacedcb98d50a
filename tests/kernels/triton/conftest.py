"""Triton's kernels in the interpreter."""

from __future__ import annotations

import triton_interpreter

triton_interpreter.repair()
