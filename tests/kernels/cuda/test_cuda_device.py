"""The GPU's backend against a stand-in for CuPy: what is compiled, what is handed over, how errors come back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cierzo.kernels.cuda.launch import device
from cierzo.kernels.cuda.launch.device import CupyBackend
from cierzo.kernels.cuda.launch.kernel import SOURCES, Kernel, LaunchError, options
from cierzo.kernels.fault import DeviceFault

COPY = Kernel("copy.cu", "copy_blocks_16", {"count": "i32"})
REVERSE = Kernel("copy.cu", "copy_blocks_8", {"count": "i32"})


class DriverError(RuntimeError):
    """CuPy's, of a launch."""


class CompileError(RuntimeError):
    """CuPy's, of NVRTC."""


class Within:
    """A device or a stream of CuPy's, which can be entered again and again."""

    def __init__(self, entered: list[Any], what: Any) -> None:
        self._entered, self._what = entered, what

    def __enter__(self) -> None:
        self._entered.append(self._what)

    def __exit__(self, *_: object) -> None:
        pass


class Cupy:
    """Records what it is asked for; its NVRTC too."""

    NVRTCError = CompileError

    def __init__(self) -> None:
        self.modules: list[tuple[str, str, tuple[str, ...]]] = []
        self.programs: list[tuple[str, str]] = []
        self.loaded: list[bytes] = []
        self.calls: list[tuple[Any, ...]] = []
        self.entered: list[Any] = []
        self.error: Exception | None = None
        self.version = (13, 0)
        self.cuda = SimpleNamespace(
            Device=lambda index: Within(self.entered, ("device", index)),
            ExternalStream=lambda address, index: Within(self.entered, ("stream", address, index)),
            driver=SimpleNamespace(CUDADriverError=DriverError),
            runtime=SimpleNamespace(CUDARuntimeError=DriverError),
            function=SimpleNamespace(Module=self._module),
        )

    def createProgram(self, code: str, name: str, headers: tuple[()], names: tuple[()]) -> int:
        """Open a program of NVRTC."""
        self.programs.append((code, name))
        return len(self.programs) - 1

    def compileProgram(self, number: int, options: tuple[str, ...]) -> None:
        """One compilation."""
        if isinstance(self.error, CompileError):
            raise self.error
        self.modules.append((*self.programs[number], options))

    def getVersion(self) -> tuple[int, int]:
        """NVRTC's."""
        return self.version

    def getCUBIN(self, number: int) -> bytes:
        """The machine code."""
        return self.programs[number][1].encode()

    def getProgramLog(self, number: int) -> str:
        """The compiler's words."""
        return f"log of {number}"

    def destroyProgram(self, number: int) -> None:
        """Close a program."""
        self.programs[number] = ("", "closed")

    def _module(self) -> Any:
        return SimpleNamespace(load=self.loaded.append, get_function=lambda name: self._launch)

    def _launch(self, grid: Any, block: Any, values: Any, *, shared_mem: int) -> None:
        if self.error:
            raise self.error
        self.calls.append((grid, block, values, shared_mem))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Cupy:
    found = Cupy()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index - 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=0xABC))
    monkeypatch.setattr(device.importlib, "import_module", lambda name: found)
    return found


def test_a_kernel_is_compiled_once_and_launched_on_torchs_stream(cupy: Cupy) -> None:
    backend, values = CupyBackend(), [np.int32(5)]
    for _ in range(2):
        backend.run(COPY, torch.device("cuda"), (2, 3, 1), 64, 16, values)
    backend.run(REVERSE, torch.device("cuda"), (2, 3, 1), 64, 16, values)  # of the same source
    ((code, name, told),) = cupy.modules
    assert code.startswith((SOURCES / "copy.cu").read_text(encoding="utf-8"))
    assert (name, told, cupy.loaded) == ("copy.cu", options("sm_90"), [b"copy.cu"])
    assert cupy.programs == [("", "closed")]
    assert cupy.calls == [((2, 3, 1), (64, 1, 1), (5,), 16)] * 3
    assert cupy.entered == [("device", 1), ("stream", 0xABC, 1)] * 3
    backend.run(COPY, torch.device("cuda", 0), (1, 1, 1), 32, 0, values)
    assert len(cupy.modules) == 2  # another device, another module


def test_what_is_prepared_is_not_compiled_again_here_nor_in_the_next_process(
    cupy: Cupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = Kernel("route.cu", "route_choose", {})
    kernels, device = (COPY, REVERSE, choose), torch.device("cuda")
    backend = CupyBackend()
    backend.prepare(kernels, device, tmp_path / "new")
    assert sorted(name for _, name, _ in cupy.modules) == ["copy.cu", "route.cu"]
    cupy.error = CompileError("nothing is compiled from here on")
    backend.prepare(kernels, device, tmp_path / "new")
    assert cupy.loaded == [b"copy.cu", b"route.cu"]
    again = CupyBackend()
    again.prepare(kernels, device, tmp_path / "new")
    cupy.error = None
    for other in (backend, again):
        other.run(REVERSE, device, (1, 1, 1), 32, 0, [np.int32(5)])
    assert (len(cupy.modules), cupy.loaded) == (2, 2 * [b"copy.cu", b"route.cu"])
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == 2 * [".cubin"]


def test_machine_code_of_another_compiler_card_or_source_is_not_taken(
    cupy: Cupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled() -> int:
        CupyBackend().prepare((COPY,), torch.device("cuda"), tmp_path)
        return len(cupy.modules)

    assert [compiled(), compiled()] == [1, 1]
    cupy.version = (13, 1)
    assert [compiled(), compiled()] == [2, 2]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert [compiled(), compiled()] == [3, 3]
    monkeypatch.setattr(device, "program", lambda source: "another")
    assert [compiled(), compiled()] == [4, 4]


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (DriverError("CUDA_ERROR_LAUNCH_FAILED: refused"), DeviceFault),
        (DriverError("CUDA_ERROR_OUT_OF_MEMORY: out of memory, refused"), DriverError),  # the device lives on
        (CompileError("refused"), LaunchError),
    ],
)
def test_errors_come_back_as_ours(cupy: Cupy, error: Exception, ours: type[Exception]) -> None:
    cupy.error = error
    with pytest.raises(ours, match="refused"):
        CupyBackend().run(COPY, torch.device("cuda"), (1, 1, 1), 32, 0, [np.int32(5)])
