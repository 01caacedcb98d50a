"""Configurations of the GPU kernels that are compiled and reported without a GPU: those that a dry run launches.

On meta tensors, which hold nothing, every case of an operation chooses its kernels as it would on a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from hashlib import sha256
from inspect import getsource

import torch
from triton.language import constexpr

from cierzo.bench.gpu.calls import Cell, cells, make_call
from cierzo.bench.gpu.cases import CASES, MODELS, Size
from cierzo.bench.gpu.timing import read_through_descriptors
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels import registry
from cierzo.kernels.cuda.launch.kernel import SOURCES, program
from cierzo.kernels.triton.flash import WORKSPACE_TOKENS
from cierzo.kernels.triton.heuristics import APART_TOKENS
from cierzo.kernels.triton.launch import Configuration, dry_run

# A sequence alone, and more than one, which may share a prefix; more tokens than have parts of k apart; a prompt in
# one round, and one that takes several.
SIZES = (
    Size(name="one row", sequences=1, rows_each=1, context=64),
    Size(name="decode", sequences=2, rows_each=1, context=64),
    Size(name="many rows", sequences=160, rows_each=1, context=64),
    Size(name="prefill", sequences=1, rows_each=64, context=64),
    Size(name="long prefill", sequences=1, rows_each=2 * WORKSPACE_TOKENS, context=2 * WORKSPACE_TOKENS),
)
# Models beside those of the cases: shards, for what they change but dense products; and for `linear`, which has the
# product behind attention, models for those before it.
SHARDED = ("apply_rope", "rotate_and_write_keys_values", "mla_decode", "mla_prefill", "gqa_decode", "gqa_prefill")
MORE = {
    "linear": [
        ModelSizes(name=f"{model.name} {k} to {n}", hidden=n, heads=1, head_dim=k)
        for model in MODELS
        for k, n in model.projections[:-1]
    ],
    **{
        operation: [
            replace(one, name=f"{one.name} / {count}", heads=one.heads // count, kv_heads=one.kv_heads // count)
            for one in CASES[operation].models
            for count in (2, 4, 8)
        ]
        for operation in SHARDED
    },
}


def digest(configuration: Configuration) -> str:
    """16 hexadecimal digits that tell a configuration from others: the kernel's name, types, constants, options."""
    return sha256(configuration.key.encode()).hexdigest()[:16]


def fingerprint() -> str:
    """64 hexadecimal digits of all that shapes machine code, but for compilers: the configurations, the source of
    their kernels with the functions that those call and the constants that they read; and the CUDA C++ sources."""
    sources = {path.name: program(path.name) for path in SOURCES.glob("*.cu")}
    ahead = [configuration.kernel.fn for configuration in configurations().values()]
    while ahead:
        function = ahead.pop()
        name = f"{function.__module__}.{function.__name__}"
        if name not in sources:
            sources[name] = getsource(function)
            used = {one: function.__globals__.get(one) for one in function.__code__.co_names}
            sources |= {
                f"{name} {one}": repr(value.value) for one, value in used.items() if type(value) is constexpr
            }
            ahead += [value.fn for value in used.values() if hasattr(value, "fn")]
    names = {name: digest(configuration) for name, configuration in configurations().items()}
    return sha256(repr((sorted(sources.items()), sorted(names.items()))).encode()).hexdigest()


@cache
def configurations() -> dict[str, Configuration]:
    """Each configuration once, by its kernel and the first cell that launches it."""
    found: dict[str, Configuration] = {}
    known = set()
    for cell, parts in cells(SIZES, MORE):
        for told, configuration in forms(parts):
            if told and parts[2].rows <= APART_TOKENS:  # parts of k apart have no descriptors
                continue
            if (same := digest(configuration)) not in known:
                known.add(same)
                name = f"{configuration.name}: {cell}{told}"
                while name in found:
                    name += ", another"
                found[name] = configuration
    return found


def forms(cell: Cell) -> Iterator[tuple[str, Configuration]]:
    """(", TMA" or "", Configuration) of every launch of a cell in Triton; where it has weights also as read through
    descriptors (TMA)."""
    choice = registry.implementations(cell[0], "cuda")[0]
    if choice.name == "triton":
        (arguments, *_), _ = make_call(*cell, torch.device("meta"), cold_bytes=0)
        for told in ("", ", TMA") if CASES[cell[0]].weighted else ("",):
            with read_through_descriptors() if told else nullcontext():
                found = dry_run(choice.load(), *arguments)
            yield from ((told, one.kernel) for one in found)
