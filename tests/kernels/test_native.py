"""The native library: its build, what it says of itself, threads, and what happens where it cannot run."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cierzo.kernels import registry
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import MAX_THREADS, abi, native
from cierzo.kernels.registry import KernelChoiceError, bind

ROOT = Path(__file__).resolve().parents[2]
needs_library = pytest.mark.skipif(native.library_path() is None, reason="installed with CIERZO_NATIVE=0")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    registry.has_native.cache_clear()
    bind(KernelsConfig(), "cpu")


# --- what crosses to C -------------------------------------------------------------------------------------


IN_C = {"input": "in"}  # a keyword of Python


def structures() -> list[type[ctypes.Structure]]:
    found = [each for each in vars(abi).values() if isinstance(each, type) and issubclass(each, ctypes.Structure)]
    return [each for each in found if each is not ctypes.Structure]


@needs_library
def test_structures_lie_in_memory_as_abi_h_says(tmp_path: Path) -> None:
    lines = []
    for each in structures():
        lines.append(f"sizeof({each.__name__})")
        lines += [f"offsetof({each.__name__}, {IN_C.get(name, name)})" for name, _ in each._fields_]
    source = '#include <cstddef>\n#include <cstdio>\n#include "abi.h"\nint main() {\n'
    source += "".join(f'  std::printf("%zu\\n", {line});\n' for line in lines) + "}\n"
    (tmp_path / "sizes.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-I", str(ROOT / "kernels/cpu"), str(tmp_path / "sizes.cpp"), "-o"]
    subprocess.run([*command, str(tmp_path / "sizes")], check=True, timeout=60)
    printed = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout
    ours = []
    for each in structures():
        ours.append(ctypes.sizeof(each))
        ours += [getattr(each, name).offset for name, _ in each._fields_]
    assert dict(zip(lines, map(int, printed.split()), strict=True)) == dict(zip(lines, ours, strict=True))


@needs_library
def test_nothing_is_shared_between_instruction_sets() -> None:
    """Of a weak symbol the linker keeps one copy: compiled for AVX-512, it would end every older CPU's process."""
    objects = sorted((ROOT / "build").glob("temp*/avx*.o"))
    if not objects:
        pytest.skip("the objects of the build are not here")
    listed = subprocess.run(["nm", *objects], check=True, capture_output=True, text=True).stdout
    symbols = re.findall(r"^[0-9a-f]{16} ([A-Zu]) (\w+)$", listed, re.MULTILINE)
    assert len(symbols) > 3
    shared = [name for kind, name in symbols if kind in "WVu" or not name.startswith("cierzo_")]
    assert not shared, shared


# --- choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction_set", native.available())
def test_the_table_names_the_instruction_set(instruction_set: str) -> None:
    table = bind(KernelsConfig(instruction_set=instruction_set), "cpu")
    assert f"  native {instruction_set}, exact\n    rms_norm, " in table.describe()
    assert native.instruction_set() == instruction_set


def test_the_reference_is_chosen_by_name() -> None:
    table = bind(KernelsConfig(instruction_set="reference"), "cpu")
    assert {choice.name for choice in table.chosen} == {"torch", "composed"}
    assert table.describe().startswith("kernels on cpu (no native ones: chosen)\n  torch, ")
    with pytest.raises(KernelChoiceError, match="no implementation 'native'"):
        bind(KernelsConfig(instruction_set="reference", implementations={"rms_norm": "native"}), "cpu")


def test_a_default_can_be_set_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "default_instruction_set", "reference")
    assert bind(KernelsConfig(), "cpu").instruction_set == "reference"
    assert [row.name for row in registry.implementations("rms_norm", "cpu")] == ["torch"]


def test_without_the_library_the_reference_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_path", lambda: None)
    monkeypatch.setattr(registry, "default_instruction_set", "auto")
    assert "(no native ones: installed with CIERZO_NATIVE=0)" in bind(KernelsConfig(), "cpu").describe()
    with pytest.raises(KernelChoiceError, match=r"'avx2' cannot run here: installed with CIERZO_NATIVE=0"):
        bind(KernelsConfig(instruction_set="avx2"), "cpu")


def test_on_another_machine_the_reference_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_path", lambda: None)
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(registry, "default_instruction_set", "auto")
    assert "(no native ones: there are none for aarch64)" in bind(KernelsConfig(), "cpu").describe()


@pytest.mark.parametrize(
    ("found", "reason"),
    [(0, "the CPU has no AVX2"), (8, "the CPU has none of the instruction sets that were built")],
)
def test_on_an_older_cpu_the_reference_runs_and_says_why(
    monkeypatch: pytest.MonkeyPatch, found: int, reason: str
) -> None:
    monkeypatch.setattr(native, "library_path", lambda: Path("_native.so"))
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(cierzo_instruction_sets=lambda: found))
    monkeypatch.setattr(registry, "default_instruction_set", "auto")
    table = bind(KernelsConfig(), "cpu")
    assert f"(no native ones: {reason})" in table.describe()
    assert {choice.name for choice in table.chosen} == {"torch", "composed"}


@needs_library
def test_a_library_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never the reference in its place: that would be a slow engine for no visible reason."""
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(native._state, "library", None)
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "broken.so")
    monkeypatch.setattr(registry, "default_instruction_set", "auto")
    with pytest.raises(KernelChoiceError, match=r"cannot be loaded: .*make venv"):
        bind(KernelsConfig(), "cpu")
    assert bind(KernelsConfig(instruction_set="reference"), "cpu").reason == "chosen"


@pytest.mark.parametrize("digest", [b"0" * 64, None])
def test_a_library_of_another_version_is_refused(digest: bytes | None) -> None:
    def answer() -> bytes | None:
        if digest is None:
            raise AttributeError("cierzo_abi")
        return digest

    library: ctypes.CDLL = SimpleNamespace(cierzo_abi=answer)  # type: ignore[assignment]
    with pytest.raises(native.NativeError, match="built for another version of cierzo"):
        native._check_abi(library)


@needs_library
def test_an_operation_that_the_library_lacks_is_named() -> None:
    if native.available():
        with pytest.raises(native.NativeError, match="have no sing"):
            native.call("sing", abi.NormArgs())


# --- threads -----------------------------------------------------------------------------------------------

ENGINE = """
import hashlib, os, sys
from cierzo.engine import LLM, SamplingParams
from cierzo.kernels.cpu import native

def affinities():
    return [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]

whole = os.sched_getaffinity(0)
pin = sys.argv[2] == "pin"
settings = dict(dtype="float32", threads=2, max_model_len=64, kv_cache_gib=0.01, block_tokens=8, pin_threads=pin)
with LLM(sys.argv[1], **settings) as llm:
    outputs = llm.generate([[1, 2, 3], [7] * 20], SamplingParams(max_tokens=4, temperature=0.0, logprobs=2))
    if pin:
        alone = [cpus for cpus in affinities() if len(cpus) == 1]
        assert len(os.sched_getaffinity(0)) == 1
        assert len(set.union(*alone)) == min(2, len(whole)), (alone, whole)
        native.set_threads(2)
        assert all(cpus == whole for cpus in affinities())
print(len(native.openmp_runtimes()), hashlib.sha256(repr([o.logprobs for o in outputs]).encode()).hexdigest())
"""

SETTINGS = {
    "as it is": {},
    "nonsense": {"OMP_NUM_THREADS": "0", "OMP_SCHEDULE": "?", "OMP_PROC_BIND": "perhaps"},
    "far too many": {"OMP_NUM_THREADS": "1000", "OMP_DYNAMIC": "true"},
    "one allowed": {"OMP_THREAD_LIMIT": "1"},
}


def test_openmp_settings_change_nothing_and_there_is_one_runtime(tmp_path: Path) -> None:
    """One process per setting, all at once; libgomp says what it thinks of nonsense on stderr."""
    from cierzo.engine.weights.make import make_checkpoint

    checkpoint = make_checkpoint(tmp_path / "tiny", like="small4", dtype="float32")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    started = {
        name: subprocess.Popen(
            [
                sys.executable,
                "-c",
                ENGINE,
                str(checkpoint),
                "pin" if name == "as it is" and native.available() else "free",
            ],
            env=plain | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, settings in SETTINGS.items()
    }
    printed = {}
    for name, process in started.items():
        output, errors = process.communicate(timeout=100)
        assert process.returncode == 0, f"{name}: {errors}"
        printed[name] = output.split()
    assert {runtimes for runtimes, _ in printed.values()} == {"1"}, printed
    assert len({digest for _, digest in printed.values()}) == 1, printed


def test_pinned_threads_fill_cores_before_siblings(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,4", "1,5", "2-3", "2-3", "0,4", "1,5"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert native.cores_first([0, 1, 2, 3, 4, 5], tmp_path) == [0, 1, 2, 3, 4, 5]
    assert native.cores_first([0, 2, 3, 4, 5], tmp_path) == [0, 2, 5, 3, 4]
    assert native.cores_first([9, 7], tmp_path) == [7, 9]


# --- the build ---------------------------------------------------------------------------------------------


def setup(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(
        command, cwd=root, env=os.environ | environment, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "there is no compiler 'no-such-compiler'.\nInstall g++"),
        ({"CXX": "false"}, "kernels do not compile"),
        ({"CIERZO_NATIVE": "avx3"}, "CIERZO_NATIVE is 0, 1, or of avx2,avx512,avx512_bf16, not 'avx3'"),
    ],
)
@needs_library
def test_a_failing_build_stops_the_installation(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    done = setup(ROOT, "build_ext", "--build-lib", str(tmp_path), **environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert "CIERZO_NATIVE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_library
def test_an_ordinary_build_puts_the_library_where_it_is_looked_for(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"  # a real one takes a minute: this one makes empty files
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    compiler.chmod(0o755)
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = setup(ROOT, "build", *folders, CXX=str(compiler), CIERZO_NATIVE="avx2,avx512")
    assert done.returncode == 0, done.stderr
    code = "from cierzo.kernels.cpu import native; print(native.library_path())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert Path(printed.stdout.strip()).is_relative_to(tmp_path / "lib")
    assert {path.name.partition("-")[0] for path in (tmp_path / "temp").iterdir()} == {"common", "avx2", "avx512"}


def test_without_native_kernels_an_earlier_library_goes(tmp_path: Path) -> None:
    """In a copy: an editable installation would find it, and use it. The source package still holds all sources."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    kernels = tmp_path / "src/cierzo/kernels/cpu"
    kernels.mkdir(parents=True)
    for name in ("abi.py", "abi.h", "common.cpp"):
        (kernels / name).write_bytes((ROOT / "kernels/cpu" / name).read_bytes())
    (kernels / "_native.cpython-311-x86_64-linux-gnu.so").touch()
    done = setup(tmp_path, "sdist", "--dist-dir", str(tmp_path / "dist"), CIERZO_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert not list(kernels.glob("*.so"))
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", archive], check=True, capture_output=True, text=True).stdout
    assert "/src/cierzo/kernels/cpu/abi.h\n" in listed
    assert "/src/cierzo/kernels/cpu/common.cpp\n" in listed


@pytest.mark.parametrize("threads", [-1, MAX_THREADS + 1, 100_000, 2**40])
@pytest.mark.parametrize("pinned", [False, True])
def test_threads_that_would_end_the_process_are_refused(threads: int, pinned: bool) -> None:
    """The OpenMP runtime starts them all at once, and crashes where the system refuses one."""
    before = native._state.threads
    with pytest.raises(native.NativeError, match=f"threads must be 0 to 1024, got {threads}"):
        native.set_threads(threads, pinned)
    assert native._state.threads == before
