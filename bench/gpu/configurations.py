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
from itertools import product
from typing import Any

import torch
from torch import Tensor
from triton.language import constexpr

from cierzo.bench.gpu.calls import Cell, cells, expert_outputs, make_call
from cierzo.bench.gpu.cases import CASES, KV, MODELS, Maker, Size
from cierzo.bench.gpu.timing import read_through_descriptors
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels import registry
from cierzo.kernels.cuda.launch.kernel import SOURCES, program
from cierzo.kernels.formats.number_formats import DEVICE_FORMATS
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.triton.flash import WORKSPACE_TOKENS
from cierzo.kernels.triton.heuristics import APART_TOKENS
from cierzo.kernels.triton.launch import Configuration, dry_run

META = torch.device("meta")
# A sequence alone, and more than one, which may share a prefix; as many as fill each width of a dense product's
# tile, and of the experts'; more tokens than have parts of k apart; a prompt in one round, and one that takes
# several.
SIZES = (
    Size(name="one row", sequences=1, rows_each=1, context=64),
    Size(name="decode", sequences=2, rows_each=1, context=64),
    *(Size(name=f"{count} rows", sequences=count, rows_each=1, context=64) for count in (24, 64, 128, 500, 1000)),
    Size(name="64 rows of 4k", sequences=64, rows_each=1, context=4096),
    Size(name="many rows", sequences=160, rows_each=1, context=64),
    Size(name="prefill", sequences=1, rows_each=64, context=64),
    Size(name="long prefill", sequences=1, rows_each=2 * WORKSPACE_TOKENS, context=2 * WORKSPACE_TOKENS),
)
# Models beside those of the cases: shards, for what they change but dense products; and for `linear`, which has the
# product behind attention, models for those before it.
SHARDED = (
    "apply_rope",
    "rotate_and_write_keys_values",
    "mla_decode",
    "mla_values",
    "mla_prefill",
    "gqa_decode",
    "gqa_prefill",
)
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

    def keep(configuration: Configuration, cell: str) -> None:
        if (same := digest(configuration)) not in known:
            known.add(same)
            name = f"{configuration.name}: {cell}"
            while name in found:
                name += ", another"
            found[name] = configuration

    for cell, parts in cells(SIZES, MORE):
        for told, configuration in forms(parts):
            if not told or parts[2].rows > APART_TOKENS:  # parts of k apart have no descriptors
                keep(configuration, f"{cell}{told}")
    for cell, configuration in (*of_terms(), *of_stages(), *of_checkpoints()):
        keep(configuration, cell)
    return found


def of_terms() -> Iterator[tuple[str, Configuration]]:
    """Launches that add up terms as they read them: norms of experts' terms; norms, latents and absorbed queries of
    the parts of the products before them."""
    for model, size in product(MODELS, SIZES[:3]):
        cell = f"{model.name}, {size.name}"
        if model.experts:
            for one in _norms(model, size, expert_outputs(model, size, Maker(device="meta"))):
                yield f"{cell}, of experts", one
        for format in CASES["linear_terms"].formats:
            for one in _of_parts(model, size, format):
                yield f"{cell}, of parts, {format}", one


def _of_parts(model: ModelSizes, size: Size, format: str) -> Iterator[Configuration]:
    found: list[Summands] = []
    for k, n in model.projections:
        one = ModelSizes(name="", hidden=n, heads=1, head_dim=k)
        (arguments, *_), _ = make_call("linear_terms", one, size, format, META, cold_bytes=0)
        dry_run(lambda *given: found.append(_load("linear_terms")(*given)), *arguments)
    yield from _norms(model, size, found[-1])
    if model.query_rank:
        (arguments, *_), _ = make_call("rotate_and_absorb", model, size, "bf16", META, cold_bytes=0)
        yield from _launched("rotate_and_absorb", found[1], *arguments[1:])
        quantised = ((False, None), (True, None), (True, torch.empty(1, device=META)))
        for pages, codes in product(("bf16", "fp8"), quantised):
            (arguments, *_), _ = make_call("norm_latents", model, size, pages, META, cold_bytes=0)
            yield from _launched("norm_latents", found[0], *arguments[1:-2], *codes)


def of_stages() -> Iterator[tuple[str, Configuration]]:
    """Launches of MLA's first product with what is around it, as steps have them: at a first layer and after
    experts, with pages of each kind."""
    known = CASES["latents_of"]
    models = [model for model in known.models if model.query_rank]
    for model, size, format, pages in product(models, SIZES[:4], known.formats, KV):
        ((_, *arguments), *_), _ = known.make(model, size, Maker(format, "meta", 0, KV[pages], 0))
        given = [one.to(META) if isinstance(one, Tensor) else one for one in arguments]
        experts = expert_outputs(model, size, Maker(device="meta"))
        for told, before in (("first", None), ("of experts", experts)):
            for one in _launched("latents_of", before, *given):
                yield f"{model.name}, {size.name}, {told}, {format}, {pages} pages", one


def of_checkpoints() -> Iterator[tuple[str, Configuration]]:
    """Launches of experts in formats that a checkpoint may bring and a user cannot choose, so that no case has
    them."""
    known = CASES["expert_mlp"]
    brought = [format for format in DEVICE_FORMATS if format not in known.formats]
    models = [model for model in known.models if model.experts]
    for model, size, format in product(models, SIZES, brought):
        for told, one in forms(("expert_mlp", model, size, format)):
            yield f"expert_mlp, {model.name}, {size.name}, {format}{told}", one


def _norms(model: ModelSizes, size: Size, terms: Summands) -> Iterator[Configuration]:
    residual = torch.empty(size.rows, model.hidden, dtype=torch.bfloat16, device=META)
    for scale in ((), (None,), (torch.empty(1, device=META),)):
        operation = "add_rms_norm_fp8" if scale else "add_rms_norm"
        yield from _launched(operation, terms, residual, residual[0], 1e-6, *scale)


def _launched(operation: str, *arguments: Any) -> list[Configuration]:
    return [one.kernel for one in dry_run(_load(operation), *arguments)]


def _load(operation: str) -> Any:
    return registry.implementations(operation, "cuda")[0].load()


def forms(cell: Cell) -> Iterator[tuple[str, Configuration]]:
    """(", TMA" or "", Configuration) of every launch of a cell in Triton; where it has weights also as read through
    descriptors (TMA)."""
    choice = registry.implementations(cell[0], "cuda")[0]
    if choice.name == "triton":
        (arguments, *_), _ = make_call(*cell, META, cold_bytes=0)
        for told in ("", ", TMA") if CASES[cell[0]].weighted else ("",):
            with read_through_descriptors() if told else nullcontext():
                found = dry_run(choice.load(), *arguments)
            yield from ((told, one.kernel) for one in found)
