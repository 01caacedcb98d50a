"""Kernels compiled here for a card that is lent for minutes: `python -m cierzo.bench.gpu.carried FOLDER`.

FOLDER is a cache of Triton's, of machine code alone. Triton finds a kernel there under a digest of its own build
and of what it compiled, and its files by where they were. Another build of the same version, and another place, are
another digest and other paths: `use` gives all of them the names that they must have now.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import compiler
from triton.runtime import cache

from cierzo.bench.campaign.isolation import die_with
from cierzo.bench.gpu import conformance, timing, widths
from cierzo.bench.gpu.calls import Cell, cells
from cierzo.bench.gpu.cases import SMALL4
from cierzo.bench.gpu.configurations import MORE, forms
from cierzo.kernels import registry
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.triton.compile import compile_ahead
from cierzo.kernels.triton.launch import Configuration

COMPILER = "compiler.json"
MODELS = 2  # of those that are served, whose kernels are carried
ERRORS, ERROR_LETTERS = 5, 300  # of errors that are told
counted: Counter[str] = Counter()  # "from cache" and "compiled", in this process


def count() -> None:
    """Count in `counted` what Triton compiles from now on, and what it finds."""
    knobs.compilation.listener = lambda *, cache_hit, **_: counted.update(
        ["from cache" if cache_hit else "compiled"]
    )


def use(folder: Path) -> str:
    """Have this process, and all that it starts, take kernels from a folder; what is to be said of it."""
    build = cache.triton_key()  # read from all of Triton, once for all that are forked
    path = folder / COMPILER
    if not path.exists():
        return f"no kernels were compiled ahead: {folder} has none"
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        if made["triton"] != triton.__version__:
            kernels = f"kernels compiled ahead are Triton {made['triton']}'s, this is {triton.__version__}"
            return f"{kernels}: all are compiled here (make gpu-bundle GPU_TRITON=... compiles others)"
        renamed = dict(_renamed(folder, build, made["keys"]))
        text = json.dumps(made | {"keys": renamed})
        path.with_suffix(".new").write_text(text, encoding="utf-8")
        path.with_suffix(".new").replace(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        return f"kernels compiled ahead are damaged, and all are compiled here: {folder}: {told}"
    knobs.cache.dir = str(folder)  # of processes that are started too: it sets TRITON_CACHE_DIR
    return f"kernels compiled ahead: {sum((folder / name).exists() for name in renamed)}"


def _renamed(folder: Path, build: str, keys: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Give kernels the names that this build and place want: (name, key) of each."""
    for name, key in keys.items():
        place = folder / _named(build + key)
        if (folder / name).exists():
            (folder / name).rename(place)
        for group in place.glob("__grp__*.json"):
            files = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
            group.write_text(json.dumps({"child_paths": {file: str(place / file) for file in files}}))
        yield place.name, key


def _named(key: str) -> str:
    """The folder of a key in Triton's cache."""
    return base64.b32encode(hashlib.sha256(key.encode()).digest()).decode().rstrip("=")


def every_cell() -> Iterator[Cell]:
    """Cells whose kernels the runs launch, some twice; of models, their products before attention too."""
    products = cells(conformance.SIZES, {"linear": MORE["linear"]})
    for _, cell in (*conformance.checked(), *timing.timed("kernels"), *products):
        yield cell


def launched(wanted: Iterable[Cell]) -> list[Configuration]:
    """Configurations of the experiment with widths, and of cells, each once, in this order."""
    found: list[Configuration] = []
    for format in widths.FORMATS:
        found += widths.configurations(format, SMALL4)
    found += (one for cell in wanted for _, one in forms(cell))
    return list({one.key: one for one in found}.values())


def of_models() -> list[Configuration]:
    """Configurations that the first models launch when they are served."""
    from cierzo.bench.gpu import served  # takes msgspec
    from cierzo.engine.worker.launches import launches
    from cierzo.kernels.config import KernelsConfig

    found: list[Configuration] = []
    device.require = lambda: None  # nothing runs here
    registry.bind(KernelsConfig(), "cuda")
    for name, weights, activations in served.MODELS[:MODELS]:
        config = served.serving(name, weights, activations)
        found += launches(config, served.make_model(config, torch.device("meta")).weights).configurations
    return found


def compile_all(
    configurations: Iterable[Configuration], capability: int, make: Callable[[Configuration, int], object]
) -> tuple[dict[str, Any], list[str]]:
    """Compile on all cores: numbers, and the first errors; and the keys of Triton's cache, without its build. make:
    compile_ahead or compile_launcher. Must not have touched a GPU."""
    start = partial(die_with, os.getpid())
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork"), initializer=start) as pool:
        done = list(pool.map(partial(_compile, make, capability), configurations))
    numbers: Counter[str] = sum((one for one, *_ in done), Counter())
    errors = [error for _, error, _ in done if error]
    found = {"configurations": len(done), **numbers, "failed": len(errors), "errors": errors[:ERRORS]}
    return found, [key for *_, keys in done for key in keys]


def _compile(
    make: Callable[[Configuration, int], object], capability: int, one: Configuration
) -> tuple[Counter[str], str, list[str]]:
    right, keys, error = compiler.get_cache_key, list[str](), ""

    def noting(*arguments: Any, **named: Any) -> str:
        key: str = right(*arguments, **named)
        keys.append(key.removeprefix(cache.triton_key()))
        return key

    counted.clear()
    count()
    compiler.get_cache_key = noting
    try:
        make(one, capability)
    except Exception as raised:  # whatever a compiler says is part of the result
        error = f"{one.name}: {type(raised).__name__}: {raised.__cause__ or raised}"[:ERROR_LETTERS]
    finally:
        compiler.get_cache_key = right
    return Counter(counted), error, keys


def main(folder: Path) -> int:
    """Fill a folder for compute capability 9.0 with what the two runs launch."""
    knobs.compilation.store_binary_only, knobs.cache.dir = True, str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {one.key: one for one in (*launched(every_cell()), *of_models())}
    found, keys = compile_all(wanted.values(), 90, compile_ahead)
    named = {_named(cache.triton_key() + key): key for key in keys}
    text = json.dumps({"triton": triton.__version__, "keys": named})
    (folder / COMPILER).write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Triton {triton.__version__}, {size / 2**20:.1f} MiB: {found}")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
