"""Kernels compiled in processes of their own are what a launch in another one finds, launchers in C included."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_ahead import ask

from cierzo.bench.gpu.configurations import configurations
from cierzo.kernels.triton import compile as compiling
from cierzo.kernels.triton.launch import Configuration

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
# Of every kind of argument: constants that are texts, numbers, absent pointers, tensor descriptors.
NAMES = (
    "linear: linear, small4 latents, one row, bf16",
    "linear: linear, small4 latents, 500 rows, bf16, TMA",
    "sum_parts: linear, small4 latents, one row, bf16",
    "rope_tables: rope_tables, small4, one row, bf16",
)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a libcuda whose functions do nothing, to which Triton links its C code."""
    nvidia = importlib.util.find_spec("triton.backends.nvidia")
    assert nvidia is not None
    assert nvidia.origin is not None
    sources = "".join(Path(nvidia.origin).with_name(name).read_text() for name in ("driver.c", "driver.py"))
    wanted = sorted(set(re.findall(r"\bcu[A-Z]\w+", sources)))
    (tmp_path / "cuda.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in wanted))
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "cuda.c", "-o", library], check=True)
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_a_launch_finds_what_other_processes_compiled_and_calls_no_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that was not compiled is launched too, lest hits be counted where there are none."""
    *warmed, cold = NAMES
    assert ask("missing", *NAMES) == {"missing": [*NAMES]}
    assert not list((fresh / "cache").rglob("*.*"))
    assert ask("warm", *warmed) == {"done": len(warmed)}
    monkeypatch.setenv("CC", "/bin/false")
    assert ask("missing", *NAMES) == {"missing": [cold]}
    found = ask("launch", *NAMES)
    assert {name: found[name] for name in warmed} == {name: {"hits": [True], "launcher": True} for name in warmed}
    assert found[cold]["hits"] == [False]


def test_a_kernel_that_does_not_compile_is_named_with_the_compilers_words(fresh: Path) -> None:
    good = configurations()[NAMES[2]]
    bad = Configuration(good.kernel, good.types, {**good.constants, "BLOCK": 3})
    with pytest.raises(compiling.CompileError, match=r"sum_parts .*'BLOCK': 3.*power of 2"):
        compiling.compile_all([bad], 90)


def test_a_compiler_that_dies_is_told_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.sys, "executable", "/bin/false")
    with pytest.raises(compiling.CompileError, match="sum_parts: its compiler ended with status 1"):
        compiling.compile_all([configurations()[NAMES[2]]], 90)


def test_what_a_killed_compiler_had_is_compiled_by_one_more_alone(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process is killed, as by a system that is short of memory, once it has been asked."""
    spy, log = fresh / "python", fresh / "log"
    killed = f"if mkdir {fresh}/killed 2>/dev/null; then head -c 1 >/dev/null; kill -9 $$; fi"
    lines = ("#!/bin/sh", f"echo start >>{log}", killed, f'{sys.executable} "$@"', f"echo end >>{log}")
    spy.write_text("\n".join(lines))
    spy.chmod(0o755)
    monkeypatch.setattr(compiling.sys, "executable", str(spy))
    done: list[None] = []
    compiling.compile_all([configurations()[name] for name in NAMES[2:]], 90, lambda: done.append(None))
    assert len(done) == 2
    started = log.read_text().split()
    assert started.count("start") == started.count("end") + 1 == min(2, len(os.sched_getaffinity(0))) + 1
    assert started[-2:] == ["start", "end"]


def test_a_compiler_that_is_killed_twice_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy, log = tmp_path / "python", tmp_path / "log"
    spy.write_text(f"#!/bin/sh\necho start >>{log}\nkill -9 $$\n")
    spy.chmod(0o755)
    monkeypatch.setattr(compiling.sys, "executable", str(spy))
    with pytest.raises(compiling.CompileError, match="sum_parts: its compiler ended with status -9"):
        compiling.compile_all([configurations()[NAMES[2]]], 90)
    assert log.read_text().split() == ["start", "start"]


def test_processes_that_compile_see_no_gpu_and_no_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = tmp_path / "python"
    spy.write_text(f"#!/bin/sh\nenv > {tmp_path}/env\n")
    spy.chmod(0o755)
    monkeypatch.setattr(compiling.sys, "executable", str(spy))
    with pytest.raises(compiling.CompileError):
        compiling.compile_all([configurations()[NAMES[2]]], 90)
    told = (tmp_path / "env").read_text().splitlines()
    assert "CUDA_VISIBLE_DEVICES=" in told
    assert "TRITON_INTERPRET" in os.environ
    assert not any(line.startswith("TRITON_INTERPRET") for line in told)


def test_a_configuration_comes_out_of_a_pickle_as_it_went_in() -> None:
    for configuration in configurations().values():
        again = pickle.loads(pickle.dumps(configuration))
        assert again.kernel is configuration.kernel
        assert (again.key, again.blocks) == (configuration.key, configuration.blocks)
    assert torch.float8_e4m3fn in compiling.DTYPES.values()
