"""Put known faults into a copy of the tree, one at a time: each must turn a test red.

    python tests/mutants/run.py [WORD...]       only faults whose file, why or list contains one of the words

A list is tests/mutants/<part>.json: objects with `file`, `find` (occurs exactly once in it), `replace`, `tests`
(arguments of pytest) and `why` (the fault in words). Exit status 1 if a fault survives. The unchanged copy must
pass every named test first, else a red test would prove nothing. For a fault in C++ the copy's native library is
built again, for the best instruction set of this CPU alone, and with little optimisation: it is quicker.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0
IGNORED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "build", "*.egg-info")
PYTEST_PASSED, PYTEST_FAILED = 0, 1
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


class Tree:
    """A copy of the repository whose own sources are the ones that its tests import."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(ROOT, root, symlinks=True, ignore=IGNORED)
        # The installed package is an editable one, of the original tree: PYTHONPATH stands before it.
        self.environment = os.environ | {
            "PYTHONPATH": str(root / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        self._check_imports()

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

    def test(self, tests: str) -> tuple[int, str]:
        """pytest's exit status and output; a run that hangs past the limit or dies of a signal counts as failed."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
        try:
            done = subprocess.run(
                command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return PYTEST_FAILED, f"still running after {TIMEOUT_S:.0f} s"
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
    faults = read_faults(words)
    if not faults:
        raise SystemExit("no fault matches")
    with tempfile.TemporaryDirectory(prefix="cierzo-mutants-") as folder:
        tree = Tree(Path(folder) / "tree")
        if any(fault.is_compiled for fault in faults):
            tree.build_unchanged()
        needed = sorted({test for fault in faults for test in fault.tests.split()})
        print(f"unchanged: {' '.join(needed)}", flush=True)
        status, output = tree.test(" ".join(needed))
        if status != PYTEST_PASSED:
            raise SystemExit(f"{output}\nthe tests fail without any fault")
        survivors = sum(_try(tree, fault, f"{i}/{len(faults)}") for i, fault in enumerate(faults, start=1))
    print(f"{len(faults) - survivors} killed, {survivors} survived")
    return 1 if survivors else 0


def _try(tree: Tree, fault: Fault, place: str) -> bool:
    start = time.monotonic()
    survived = tree.survives(fault)
    verdict = "SURVIVED" if survived else "killed"
    print(f"{place:>7}  {verdict:8} {time.monotonic() - start:6.1f} s  {fault.file}: {fault.why}", flush=True)
    return survived


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
