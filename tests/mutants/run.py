"""Put known faults into copies of the tree, one at a time in each: every one must turn a test red.

    python tests/mutants/run.py [--again] [WORD...]   only faults whose file, why or list contains one of the words

A run that was interrupted goes on where it stopped: faults that were killed are kept in build/mutants-killed.txt,
and not tried again until the fault, its file or its tests have changed, or with --again. Two are tried at a time.

A list is tests/mutants/<part>.json: objects with `file`, `find` (occurs exactly once in it), `replace`, `tests`
(arguments of pytest) and `why` (the fault in words). Exit status 1 if a fault survives. The unchanged copy must
pass every named test first, else a red test would prove nothing. For a fault in C++ the copy's native library is
built again, for the best instruction set of this CPU alone, and with little optimisation: it is quicker.
"""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]
KILLED = ROOT / "build/mutants-killed.txt"
TREES = 2  # copies in which faults are tried at the same time
TIMEOUT_S = 300.0
IGNORED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "build", "*.egg-info")
PYTEST_PASSED, PYTEST_FAILED = 0, 1
ENDED_FROM_OUTSIDE = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
COMPILED = (".cpp", ".h", "cpu/abi.py")  # the library tells which abi.py it was built beside


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of code, and how to make it wrong."""

    file: str
    find: str
    replace: str
    tests: str
    why: str

    @property
    def is_compiled(self) -> bool:
        """Whether the native library must be built again for it."""
        return self.file.endswith(COMPILED)

    @property
    def digest(self) -> str:
        """Digest of the fault, of its file and of its tests."""
        files = {self.file, *(test.partition("::")[0] for test in self.tests.split() if "/" in test)}
        parts = [msgspec.json.encode(self)]
        for name in sorted(files):
            path = ROOT / name
            parts += [found.read_bytes() for found in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()


class Tree:
    """A copy of the repository whose own sources are the ones that its tests import."""

    def __init__(self, root: Path, source: Path = ROOT) -> None:
        self.root = root
        self._unchanged = b""
        shutil.copytree(source, root, symlinks=True, ignore=IGNORED)
        # The installed package is an editable one, of the original tree: PYTHONPATH stands before it.
        self.environment = os.environ | {
            "PYTHONPATH": str(root / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        self._check_imports()

    def copy(self, root: Path) -> Tree:
        """A second copy, with the library that was built for this one."""
        other = Tree(root, self.root)
        if self._unchanged:
            other.keep_library()
        return other

    def build(self) -> None:
        """Compile what is in the tree now. A tree that does not compile proves nothing."""
        environment = self.environment | {"CIERZO_NATIVE": best_instruction_set(), "CXXFLAGS": "-O1"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}\nthe copy does not compile")

    def build_unchanged(self) -> None:
        """The library that all faults in Python are tried with."""
        self.build()
        self.keep_library()

    def keep_library(self) -> None:
        """Take the native library that is there for the one of sound sources."""
        (self._library,) = (self.root / "kernels/cpu").glob("_native*.so")
        self._unchanged = self._library.read_bytes()

    def _restore_library(self) -> None:
        self._library.unlink()  # not overwritten: a test that hangs may have it mapped
        self._library.write_bytes(self._unchanged)

    def _check_imports(self) -> None:
        code = "import cierzo.scheduler.params as m, os; print(os.path.realpath(m.__file__))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        if not Path(done.stdout.strip()).is_relative_to(self.root.resolve()):
            raise SystemExit(f"the tests would import {done.stdout.strip()}, not the copy in {self.root}")

    def test(self, tests: str, options: Sequence[str] = (), timeout_s: float | None = TIMEOUT_S) -> tuple[int, str]:
        """pytest's exit status and output; a run that hangs past the limit or crashes counts as failed. Raises
        KeyboardInterrupt where somebody else ended it, which says nothing of a fault."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests.split()]
        try:
            done = subprocess.run(
                command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            return PYTEST_FAILED, f"still running after {TIMEOUT_S:.0f} s"
        if -done.returncode in ENDED_FROM_OUTSIDE:
            raise KeyboardInterrupt
        status = PYTEST_FAILED if done.returncode < 0 else done.returncode
        return status, done.stdout + done.stderr

    def survives(self, fault: Fault) -> bool:
        """Whether the tests stay green with the fault in place. A tree that cannot be imported proves nothing."""
        path = self.root / fault.file
        sound = path.read_text(encoding="utf-8")
        if sound.count(fault.find) != 1:
            raise SystemExit(f"{fault.find!r} occurs {sound.count(fault.find)} times in {fault.file}, not once")
        path.write_text(sound.replace(fault.find, fault.replace), encoding="utf-8")
        try:
            if fault.is_compiled:
                self.build()
            status, output = self.test(fault.tests)
        finally:
            path.write_text(sound, encoding="utf-8")
            if fault.is_compiled:
                self._restore_library()
        if status not in (PYTEST_PASSED, PYTEST_FAILED):
            raise SystemExit(f"pytest ended with {status} for {fault}:\n{output}")
        return status == PYTEST_PASSED


def best_instruction_set() -> str:
    """Of this CPU and the installed library."""
    code = "from cierzo.kernels.cpu.native import available; print(*available()[:1])"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if not done.stdout.strip():
        raise SystemExit("faults in C++ need a CPU and an installation with native kernels")
    return done.stdout.strip()


def read_faults(words: list[str]) -> list[Fault]:
    """Every list's faults, in order; with words, those that one of them names."""
    decoder = msgspec.json.Decoder(list[Fault])
    found = []
    for path in sorted((ROOT / "tests/mutants").glob("*.json")):
        for fault in decoder.decode(path.read_bytes()):
            if not words or any(word in f"{path.stem} {fault.file} {fault.why}" for word in words):
                found.append(fault)
    return found


def main(words: list[str]) -> int:
    """Run, print the table, and say what survived."""
    again = "--again" in words
    faults = read_faults([word for word in words if word != "--again"])
    if not faults:
        raise SystemExit("no fault matches")
    before = set() if again or not KILLED.exists() else set(KILLED.read_bytes().decode(errors="replace").split())
    # of the tree as it is now, which the copies are made of
    left = {fault: digest for fault in faults if (digest := fault.digest) not in before}
    print(f"{len(faults)} faults, {len(faults) - len(left)} of them killed in earlier runs", flush=True)
    survivors = _try_all(left) if left else 0
    print(f"{len(faults) - survivors} killed, {survivors} survived")
    return 1 if survivors else 0


def _try_all(faults: dict[Fault, str]) -> int:
    """Try each fault, in whichever copy is free; how many survive. faults: with their digests."""
    with tempfile.TemporaryDirectory(prefix="cierzo-mutants-") as folder:
        first = Tree(Path(folder) / "tree")
        if any(fault.is_compiled for fault in faults):
            first.build_unchanged()
        needed = sorted({test for fault in faults for test in fault.tests.split()})
        print(f"unchanged: {' '.join(needed)}", flush=True)
        status, output = first.test(" ".join(needed), ["--numprocesses", str(TREES)], timeout_s=None)
        if status != PYTEST_PASSED:
            raise SystemExit(f"{output}\nthe tests fail without any fault")
        free: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        free.put(first)
        for number in range(1, TREES):
            free.put(first.copy(Path(folder) / f"tree{number}"))
        KILLED.parent.mkdir(exist_ok=True)
        pool = ThreadPoolExecutor(TREES)
        try:
            tried = [
                pool.submit(_try, free, fault, digest, f"{i}/{len(faults)}")
                for i, (fault, digest) in enumerate(faults.items(), start=1)
            ]
            return sum(one.result() for one in tried)
        finally:
            pool.shutdown(cancel_futures=True)


def _try(free: queue.SimpleQueue[Tree], fault: Fault, digest: str, place: str) -> bool:
    """Whether the fault survives, in a copy that is free."""
    tree, start = free.get(), time.monotonic()
    try:
        survived = tree.survives(fault)
    finally:
        free.put(tree)
    verdict = "SURVIVED" if survived else "killed"
    print(f"{place:>7}  {verdict:8} {time.monotonic() - start:6.1f} s  {fault.file}: {fault.why}", flush=True)
    if not survived:
        with KILLED.open("a", encoding="utf-8") as file:
            file.write(f"\n{digest}\n")  # behind a line that a killed run may have left unfinished
    return survived


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
