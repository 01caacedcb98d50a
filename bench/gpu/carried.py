"""Kernels compiled here for a card that is lent for minutes: `python -m cierzo.bench.gpu.carried FOLDER`.

FOLDER is a cache of Triton's, of machine code alone, and says which Triton compiled it. Another build of the same
version has another key to its cache, and a folder that was moved other paths: `use` mends both.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import cache

from cierzo.bench.campaign.isolation import die_with
from cierzo.bench.gpu import conformance, timing, widths
from cierzo.bench.gpu.calls import Cell, cells, make_call
from cierzo.bench.gpu.cases import CASES, SMALL4
from cierzo.bench.gpu.configurations import MORE
from cierzo.bench.gpu.timing import read_through_descriptors
from cierzo.kernels import registry
from cierzo.kernels.triton.compile import compile_ahead
from cierzo.kernels.triton.launch import Configuration, dry_run

COMPILER = "compiler.json"
ERRORS, ERROR_LETTERS = 5, 300  # of errors that are told
counted: Counter[str] = Counter()  # "from cache" and "compiled", in this process


def count() -> None:
    """Count in `counted` what Triton compiles from now on, and what it finds."""
    knobs.compilation.listener = lambda *, cache_hit, **_: counted.update(
        ["from cache" if cache_hit else "compiled"]
    )


def use(folder: Path) -> str:
    """Have this process, and those that it forks, take kernels from a folder; what is to be said of it."""
    path = folder / COMPILER
    if not path.exists():
        cache.triton_key()  # it reads all of Triton, once for all that are forked
        return f"no kernels were compiled ahead: {folder} has none"
    compiler = json.loads(path.read_text(encoding="utf-8"))
    if compiler["triton"] != triton.__version__:
        cache.triton_key()
        return f"kernels compiled ahead are Triton {compiler['triton']}'s, this is {triton.__version__}"
    for group in folder.glob("*/__grp__*.json"):
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
    knobs.cache.dir = str(folder)
    cache.triton_key = lambda: compiler["key"]
    return f"kernels compiled ahead: {sum(1 for _ in folder.glob('*/*.cubin'))}"


def every_cell() -> Iterator[Cell]:
    """Cells whose kernels the runs launch, some twice; of models, their products before attention too."""
    products = cells(conformance.SIZES, {"linear": MORE["linear"]})
    for _, cell in (*conformance.checked(), *timing.timed("kernels"), *products):
        yield cell


def launched(wanted: Iterable[Cell]) -> list[Configuration]:
    """Configurations of the experiment with widths, and of cells, each once, in this order."""
    found: dict[str, Configuration] = {}
    for one in _launched(wanted):
        constants = sorted(one.constants.items())
        found.setdefault(repr((one.name, one.signature, constants, one.options)), one)
    return list(found.values())


def _launched(wanted: Iterable[Cell]) -> Iterator[Configuration]:
    meta = torch.device("meta")
    for format, way in product(widths.FORMATS, product((False, True), widths.WIDTHS)):
        with widths.tiles(*way):
            yield from (one.configuration for one in dry_run(*_flat(widths.prepare(format, SMALL4, meta))))
    for operation, model, size, format in wanted:
        choice = registry.implementations(operation, "cuda")[0]
        call = make_call(operation, model, size, format, meta, cold_bytes=0) if choice.name == "triton" else None
        for reading in (nullcontext, read_through_descriptors) if CASES[operation].weighted else (nullcontext,):
            if call is not None:
                with reading():
                    yield from (one.configuration for one in dry_run(choice.load(), *call[0][0]))


def _flat(prepared: tuple[Any, tuple[Any, ...]]) -> tuple[Any, ...]:
    function, arguments = prepared
    return function, *arguments


def compile_all(wanted: Iterable[Cell], capability: int) -> dict[str, Any]:
    """Compile what cells launch, on all cores; numbers, and the first errors. Must not have touched a GPU."""
    global _configurations
    _configurations = launched(wanted)
    start = partial(die_with, os.getpid())
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork"), initializer=start) as pool:
        done = list(pool.map(partial(_compile, capability), range(len(_configurations))))
    numbers: Counter[str] = sum((one for one, _ in done), Counter())
    errors = [error for _, error in done if error]
    return {"configurations": len(done), **numbers, "failed": len(errors), "errors": errors[:ERRORS]}


_configurations: list[Configuration] = []  # for forked processes: a kernel cannot be pickled


def _compile(capability: int, number: int) -> tuple[Counter[str], str]:
    one, error = _configurations[number], ""
    counted.clear()
    count()
    try:
        compile_ahead(one, capability)
    except Exception as raised:  # whatever a compiler says is part of the result
        error = f"{one.name}: {type(raised).__name__}: {raised.__cause__ or raised}"[:ERROR_LETTERS]
    return Counter(counted), error


def main(folder: Path) -> int:
    """Fill a folder for compute capability 9.0 with what the two runs launch."""
    knobs.cache.dir, knobs.compilation.store_binary_only = str(folder), True
    folder.mkdir(parents=True, exist_ok=True)
    found = compile_all(every_cell(), 90)
    compiler = {"triton": triton.__version__, "key": cache.triton_key()}
    (folder / COMPILER).write_text(json.dumps(compiler), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Triton {triton.__version__}, {size / 2**20:.1f} MiB: {found}")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
