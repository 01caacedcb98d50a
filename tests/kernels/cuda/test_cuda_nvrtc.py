"""Every CUDA source compiles for the GPUs it is meant for, and its kernels are those that the launchers name."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import cuda_on_cpu
import pytest

from cierzo.bench.gpu import loops, nvrtc
from cierzo.kernels.cuda.launch import moe
from cierzo.kernels.cuda.launch.kernel import SOURCES, Kernel, options, program

FILES = sorted(SOURCES.glob("*.cu"))
LAUNCHERS = sorted(path.stem for path in (SOURCES / "launch").glob("*.py") if path.stem not in ("__init__",))
MOST_REGISTERS = 128  # then a multiprocessor holds 16 warps at least
STACK_BYTES: dict[str, int] = {}  # of the kernels that keep an array which they index

pytestmark = pytest.mark.skipif(nvrtc.library() is None, reason="nvidia-cuda-nvrtc is not installed")


def kernels() -> list[Kernel]:
    modules = [importlib.import_module(f"cierzo.kernels.cuda.launch.{name}") for name in LAUNCHERS]
    return [kernel for module in modules for kernel in getattr(module, "KERNELS", ())]


@cache
def cubin(name: str, architecture: str = "sm_90") -> bytes:
    """A source compiled: route.cu takes seconds."""
    return nvrtc.compile_cubin(program(name), options(architecture))


@cache
def listing(name: str) -> str:
    """A source's machine code for sm_90."""
    return nvrtc.disassembled(cubin(name))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_source_compiles_without_spills(path: Path, architecture: str) -> None:
    found = nvrtc.usage(cubin(path.name, architecture))
    assert set(found) == set(cuda_on_cpu.kernel_names(program(path.name)))
    for name, used in found.items():
        print(f"{name} {architecture}: {used}")
        assert used.stack_bytes <= STACK_BYTES.get(name, 0), (name, used)
        assert used.registers <= MOST_REGISTERS, (name, used)


# Products that flush subnormal numbers would take small logits, and weights of experts, for zero. (Sums and
# comparisons that flush occur in the compiler's own division and square root, behind a test for what is no number.)
FLUSHING = re.compile(r"\b(?:FFMA|FMUL|FMNMX)\S*\.FTZ")


@pytest.mark.parametrize("name", ["route.cu", "sampling.cu", "draw.cu"])
def test_subnormal_numbers_are_kept(name: str) -> None:
    assert not FLUSHING.findall(listing(name))


def test_subnormal_numbers_that_are_flushed_would_be_found() -> None:
    flushed = nvrtc.compile_cubin(program("draw.cu"), (*options("sm_90"), "--ftz=true"))
    assert FLUSHING.findall(nvrtc.disassembled(flushed))


def test_launchers_name_kernels_that_exist() -> None:
    named = {(kernel.source, kernel.name) for kernel in kernels()}
    defined = {
        (path.name, name) for path in FILES for name in cuda_on_cpu.kernel_names(path.read_text(encoding="utf-8"))
    }
    assert named == defined


def test_a_source_that_does_not_compile_is_told() -> None:
    with pytest.raises(AssertionError, match="error: identifier"):
        nvrtc.compile_cubin('extern "C" __global__ void f() { nothing(); }', options("sm_90"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loops_of_every_kernel_can_be_followed(path: Path) -> None:
    """Two of a draw divide within their loops, by a routine, and route_groups in the choice that follows: they have
    no main one; predicted.py needs none."""
    refused = []
    for name, code in loops.functions(listing(path.name)).items():
        loops.loops(code)
        try:
            loops.main_loop(code)
        except ValueError as error:
            refused.append((name, "whose routine nobody counts" in str(error)))
    dividing = {
        "draw": {"sample_draw_cut", "sample_draw_pieces"},
        "route": {one.name for one in moe.KERNELS if "groups" in one.name},
    }
    assert dict(refused) == dict.fromkeys(dividing.get(path.stem, ()), True)
