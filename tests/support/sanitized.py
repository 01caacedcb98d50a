"""Repeats every native call of the tests in a process whose native library is built under sanitizers.

`pytest --sanitized FOLDER` (make sanitize) registers a `Recorder`; the library lies somewhere below FOLDER. At each
call the recorder takes the struct of arguments and all memory that it points to, has the engine's own library
compute, and hands the copy to sanitized_worker.py: a process without torch, which lays every tensor into memory of
its own that ends where the tensor ends, calls the same operation, and returns what it wrote. That must be, bit for
bit, what the engine's library wrote; so the debug build is known to compute the same thing. The other instruction
sets of this CPU are run on it too, without a comparison.

Which memory a pointer belongs to is known because launchers take it from `Tensor.data_ptr` or `ctypes.addressof`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from cierzo.kernels.cpu import abi, native

HEADER = Path(native.__file__).with_name("abi.h")
WORKER = Path(__file__).with_name("sanitized_worker.py")
MOST_BYTES = 64 << 20  # of a call; larger ones are left out, and counted

Fixup = tuple[int, int, int, int]  # region and offset of a pointer, region and offset of what it points to


@dataclass(frozen=True)
class _Piece:
    """Memory from `begin` to `end`; `storage` tells whether it has been freed."""

    begin: int
    end: int
    storage: StorageWeakRef | None


def pointees() -> dict[str, dict[str, str]]:
    """Structure -> its pointers -> what they point to, as abi.h declares them."""
    text = re.sub(r"//.*", "", HEADER.read_text(encoding="utf-8"))
    found: dict[str, dict[str, str]] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        found[name] = {}
        for kind, names in re.findall(r"(\w+)\s*((?:\*\s*\w+\s*,?\s*)+);", body):
            found[name] |= dict.fromkeys(re.findall(r"\w+", names), kind)
    return found


POINTEES = pointees()


addressof = ctypes.addressof


class Call:
    """A copy of one call's arguments and memory; region 0 is the struct of arguments."""

    def __init__(self, args: ctypes.Structure, seen: dict[int, _Piece]) -> None:
        self._seen = seen
        self.structs: list[ctypes.Structure] = [args]
        self._pointers: list[tuple[int, int, int]] = []  # struct, offset, address that it holds
        self._places = {addressof(args): 0}
        self._buffers: list[tuple[int, int]] = []
        self._walk(args, 0, 0)
        self.spans = self._merged()
        self.before = self.memory()

    def _walk(self, struct: ctypes.Structure, number: int, base: int) -> None:
        """Collect the pointers of a struct that is region `number`, at `base` in it."""
        for name, kind in type(struct)._fields_:
            offset = base + getattr(type(struct), name).offset
            value = getattr(struct, name)
            if issubclass(kind, ctypes.Structure):
                self._walk(value, number, offset)
            elif kind is ctypes.c_void_p and value is not None:
                self._pointers.append((number, offset, value))
                pointee = POINTEES[type(struct).__name__][name]
                if hasattr(abi, pointee):
                    self._add_struct(getattr(abi, pointee).from_address(value))
                else:
                    self._buffers.append(self._span(struct, name, value))

    def _add_struct(self, struct: ctypes.Structure) -> None:
        address = addressof(struct)
        if address not in self._places:
            self._places[address] = len(self.structs)
            self.structs.append(struct)
            self._walk(struct, self._places[address], 0)

    def _span(self, struct: ctypes.Structure, name: str, address: int) -> tuple[int, int]:
        if isinstance(struct, abi.Matrix):
            return address, address + struct.experts * struct.expert_bytes
        piece = self._seen.get(address)
        if piece is None:
            raise AssertionError(f"{type(struct).__name__}.{name}: no tensor or object was asked for this address")
        if piece.storage is not None and piece.storage.expired():
            raise AssertionError(f"{type(struct).__name__}.{name}: its tensor has been freed")
        return piece.begin, piece.end

    def _merged(self) -> list[tuple[int, int]]:
        """Tensors that overlap (views of one, interleaved) share a region."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(set(self._buffers)):
            if merged and begin < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        return merged

    def memory(self) -> list[bytes]:
        """The regions as they are now."""
        structs = [bytes(struct) for struct in self.structs]
        return structs + [ctypes.string_at(begin, end - begin) for begin, end in self.spans]

    def fixups(self) -> list[Fixup]:
        """Where pointers lie, and where they point."""
        return [(number, offset, *self._target(address)) for number, offset, address in self._pointers]

    def _target(self, address: int) -> tuple[int, int]:
        if address in self._places:
            return self._places[address], 0
        for number, (begin, end) in enumerate(self.spans):
            if begin <= address < end or address == begin == end:
                return len(self.structs) + number, address - begin
        raise AssertionError(address)

    def regions(self) -> list[tuple[bytes, int]]:
        """(bytes, their address modulo 64) of each."""
        places = [0] * len(self.structs) + [begin % 64 for begin, _ in self.spans]
        return list(zip(self.before, places, strict=True))


class Worker:
    """The sanitized process."""

    def __init__(self, library: str) -> None:
        gcc = os.environ.get("CXX", "g++").split()[0]
        named = [gcc, "-print-file-name=libasan.so"]
        preload = subprocess.run(named, check=True, capture_output=True, text=True).stdout.strip()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER), library, native.load().cierzo_abi().decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ
            | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        )

    def run(self, symbol: str, threads: int, call: Call) -> list[bytes]:
        """The regions after the call. Raises AssertionError with the report if it did not survive it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((symbol, threads, call.regions(), call.fixups(), len(call.structs)), self._process.stdin)
            self._process.stdin.flush()
            after: list[bytes] = pickle.load(self._process.stdout)
            return after
        except (EOFError, BrokenPipeError):
            self._process.wait()
            self._errors.seek(0)
            report = self._errors.read().decode(errors="replace")
            raise AssertionError(f"{symbol} under sanitizers: {report}") from None

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


class Recorder:
    """The pytest plugin."""

    def __init__(self, folder: str) -> None:
        (self._library,) = map(str, Path(folder).resolve().rglob("_native*.so"))
        self._worker: Worker | None = None
        self._seen: dict[int, _Piece] = {}
        self._done: set[bytes] = set()
        self.calls: dict[str, int] = {}
        self.left_out = 0
        self._call, self._data_ptr = native.call, torch.Tensor.data_ptr

    def pytest_configure(self) -> None:
        """Stand between the launchers and the library."""
        recorder = self

        def data_ptr(tensor: torch.Tensor) -> int:
            address = recorder._data_ptr(tensor)
            span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            end = address + (span * tensor.element_size() if tensor.numel() else 0)
            recorder._seen[address] = _Piece(address, end, StorageWeakRef(tensor.untyped_storage()))
            return address

        def address_of(scalar: Any) -> int:
            address = addressof(scalar)
            recorder._seen[address] = _Piece(address, address + ctypes.sizeof(scalar), None)
            return address

        torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
        ctypes.addressof = address_of  # type: ignore[assignment]
        native.call = self.call  # type: ignore[assignment]

    def call(self, operation: str, args: ctypes.Structure) -> None:
        """In place of native.call."""
        copy = Call(args, self._seen)
        self._call(operation, args)
        if sum(map(len, copy.before)) > MOST_BYTES:
            self.left_out += 1
            return
        chosen, after = native.instruction_set(), copy.memory()[len(copy.structs) :]
        content = hashlib.sha256(repr(copy.fixups()).encode() + b"".join(copy.before[len(copy.structs) :]))
        content.update(b"".join(self._without_pointers(copy)))
        for instruction_set in dict.fromkeys((chosen, *native.available())):
            key = f"{instruction_set}_{operation}".encode() + content.digest()
            if key not in self._done:
                self._done.add(key)
                written = self._sanitized(f"cierzo_{instruction_set}_{operation}", copy)
                if instruction_set == chosen:
                    assert written == after, f"{operation}: the sanitized build of {chosen} writes other bits"

    @staticmethod
    def _without_pointers(call: Call) -> Iterator[bytes]:
        """The structs' numbers, to tell whether the same call was made already."""
        for number, struct in enumerate(call.structs):
            data = bytearray(bytes(struct))
            for region, offset, _, _ in call.fixups():
                if region == number:
                    data[offset : offset + 8] = bytes(8)
            yield bytes(data)

    def _sanitized(self, symbol: str, call: Call) -> list[bytes]:
        self.calls[symbol] = self.calls.get(symbol, 0) + 1
        if self._worker is None:
            self._worker = Worker(self._library)
        try:
            return self._worker.run(symbol, native._state.threads or torch.get_num_threads(), call)
        except AssertionError:
            self._worker.close()
            self._worker = None
            raise

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """What was run; a call that is too large is none."""
        line = f"sanitized: {sum(self.calls.values())} calls of {len(self.calls)} functions"
        terminalreporter.write_line(f"{line}, {self.left_out} too large")

    def pytest_unconfigure(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
