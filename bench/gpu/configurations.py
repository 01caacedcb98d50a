"""Configurations of the GPU kernels that are compiled and reported without a GPU, in the report's order.

They are those that serve Small 4, Small 3 and the attention of gpt-oss, whole and in tensor-parallel shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from cierzo.kernels.triton import (
    activations,
    cache_write,
    expand,
    flash,
    gqa,
    linear,
    mla,
    moe,
    norm,
    prefix,
    rope,
    split,
)
from cierzo.kernels.triton.heuristics import APART_TOKENS, Parts, narrow, tile
from cierzo.kernels.triton.launch import Configuration
from cierzo.kernels.triton.product import Weights
from cierzo.kernels.triton.split import Shape

Listed = Iterator[tuple[str, Configuration]]  # (what for, Configuration)

BLOCK_TOKENS = 32  # the cache's default
PAGES = {"bf16": "*bf16", "fp8": "*fp8e4nv"}
SMALL4_HEADS = (32, 16, 8, 4)
RANK, ROPE, NOPE, VALUE = 256, 64, 64, 128
HIDDEN, INNER, EXPERTS, SLOTS = 4096, 2048, 128, 4
SMALL3_HEADS = ((32, 8), (16, 4), (8, 2), (4, 1))  # query heads, key-value heads
SMALL3_WIDTH = 128
# Heads, their width, window, sinks: of Small 3, and of gpt-oss, every other layer of which has a window.
GROUPED = (
    *((heads, SMALL3_WIDTH, 0, False) for heads in SMALL3_HEADS),
    *((heads, 64, window, True) for heads in ((64, 8), (32, 4), (16, 2), (8, 1)) for window in (0, 128)),
)
# Dense products of Small 4 and Small 3: (model, operation, outputs, k)
PRODUCTS = (
    ("small4", "q_kv_down", 1344, 4096),
    ("small4", "q_up", 4096, 1024),
    ("small4", "o_proj", 4096, 4096),
    ("small4", "shared_gate_up", 4096, 4096),
    ("small4", "lm_head", 131072, 4096),
    ("small3", "qkv", 6144, 5120),
    ("small3", "o_proj", 5120, 4096),
    ("small3", "gate_up", 65536, 5120),
    ("small3", "down", 5120, 32768),
    ("small3", "lm_head", 131072, 5120),
)


def configurations() -> Listed:
    """(what for, Configuration) of every kernel."""
    for of_file in (_activations, _cache_write, _gqa, _linear, _mla, _moe, _norm, _rope):
        yield from of_file()


def _activations() -> Listed:
    """Inputs of the output projections, and of Small 4's experts."""
    for static, kind in ((True, "static"), (False, "by row")):
        yield f"attention's output, {kind}", activations.rows_configuration("*bf16", 4096, 4096, static)
        pairs = activations.pairs_configuration("*bf16", HIDDEN, HIDDEN, EXPERTS, SLOTS, static, True)
        yield f"small4 experts, {kind}", pairs
    yield "small4 expert inner, by row", activations.rows_configuration("*bf16", INNER, INNER, False)
    yield "small3 down, by row", activations.rows_configuration("*bf16", 32768, 32768, False)


def _cache_write() -> Listed:
    """Small 4, whose latents every shard holds; Small 3 and its shards."""
    for kind, pages in PAGES.items():
        wide = 1024 + RANK + ROPE  # the rows of one product, the query's latent before
        write = cache_write.normed_configuration("*bf16", pages, RANK, ROPE // 2, wide, True)
        yield f"write_normed_latents, {kind} pages", write
        for heads in SMALL3_HEADS:
            wide = (heads[0] + 2 * heads[1]) * SMALL3_WIDTH
            write = cache_write.rotate_configuration("*bf16", pages, heads, SMALL3_WIDTH // 2, wide, False)
            yield f"rotate_and_write_keys_values {heads[0]}/{heads[1]} heads, {kind} pages", write


def _gqa() -> Listed:
    """Grouped queries, whole and in shards. Queries, keys and values lie side by side in rows of one product."""
    for heads, width, window, sinks in GROUPED:
        asking, shared = heads
        shape = Shape(shared, asking // shared, width, window=window)
        strides = ((asking + 2 * shared) * width, width)
        name = f"{asking}/{shared} heads" + (f", window {window}" if window else "") + (", sinks" if sinks else "")
        for kind, pages in PAGES.items():
            attend = gqa.decode_configuration("*bf16", pages, shape, BLOCK_TOKENS, strides)
            yield f"gqa_decode {name}, {kind} pages", attend
            if not window:
                gathered = flash.gather_configuration("*bf16", pages, shared, width, width, True, BLOCK_TOKENS)
                yield f"gqa_prefill {shared} heads of {width}, gather, {kind} pages", gathered
        yield f"gqa_decode {name}, plan", split.plan_configuration(shape)
        yield f"gqa_decode {name}, combine", split.combine_configuration("*bf16", shape, sinks)
        for carried, form in ((False, ""), (True, ", carried")):
            widths, keys = (width, 0, width), (shared * width, 0)
            attend = flash.flash_configuration("*bf16", heads, widths, strides, keys, carried, window, sinks)
            yield f"gqa_prefill {name}, flash{form}", attend


def _linear() -> Listed:
    """Dense products, and those of each head, by model, operation and format."""
    for format, in_fp8 in (("bf16", False), ("fp8", False), ("nvfp4", False), ("fp8", True)):
        for model, name, outputs, k in PRODUCTS:
            if name == "lm_head" and format != "bf16":
                continue  # no published checkpoint quantises it
            paired, weights = name.endswith("gate_up"), Weights.stored(format, outputs, k)
            types = "*fp8e4nv" if in_fp8 else "*bf16", "*fp32" if name == "lm_head" else "*bf16"
            label = format + (" x fp8" if in_fp8 else "")
            yield from _forms(f"{model} {name}", label, types, weights, paired)
            if in_fp8 and paired:
                yield from _forms(f"{model} {name}", f"{label}, static", (types[0], types[0]), weights, paired)
    absorb, unabsorb = Weights.stored("bf16", RANK, NOPE), Weights.stored("bf16", VALUE, RANK)
    for name, weights, width, copied in (("absorb", absorb, NOPE + ROPE, ROPE), ("unabsorb", unabsorb, RANK, 0)):
        out = weights.rows + copied
        by_heads = (32 * width, width), (32 * out, out)
        chosen = tile(weights, "*bf16", paired=False)
        product = linear.linear_configuration(("*bf16", "*bf16"), weights, chosen, *by_heads, copied=copied)
        yield f"small4 {name} bf16", product


def _forms(name: str, format: str, types: tuple[str, str], weights: Weights, paired: bool) -> Listed:
    """A product for few tokens, if its parts are apart; for many, read by pointers and through descriptors."""
    wide, outputs = tile(weights, types[0], paired), weights.rows // 2 if paired else weights.rows
    for tokens, described in ((1, False), (APART_TOKENS + 1, False), (APART_TOKENS + 1, True)):
        chosen, cut = (wide, Parts(1, weights.k)) if paired else narrow(weights, wide, tokens)
        if not cut.apart and tokens == 1:
            continue
        target, strides = (types[0], "*fp32" if cut.apart else types[1]), ((weights.k, 0), (outputs, 0))
        chosen = replace(chosen, described=described)
        product = linear.linear_configuration(target, weights, chosen, *strides, paired, 0, cut)
        yield f"{name} {format}{', apart' if cut.apart else ''}{', TMA' if described else ''}", product
        if cut.apart and format == "bf16":  # the same for all formats
            yield f"{name}, sum of parts", linear.sum_configuration(types[1], weights.rows, cut.count)


def _mla() -> Listed:
    """Small 4 and its shards."""
    for heads in SMALL4_HEADS:
        shape = Shape(kv_heads=1, group=heads, width=RANK)
        strides, together = (heads * (RANK + ROPE), RANK + ROPE), shape.rows // heads
        forms = (("", 1), (", prefixes", together))
        for kind, pages in PAGES.items():
            for form, sequences in forms:
                attend = mla.decode_configuration("*bf16", pages, shape, ROPE, BLOCK_TOKENS, strides, sequences)
                yield f"mla_decode {heads} heads, {kind} pages{form}", attend
        yield f"mla_decode {heads} heads, find prefixes", prefix.prefixes_configuration(BLOCK_TOKENS, together)
        yield f"mla_decode {heads} heads, plan", split.plan_configuration(shape)
        for form, sequences in forms:
            combine = split.combine_configuration("*bf16", shape, together=sequences)
            yield f"mla_decode {heads} heads, combine{form}", combine
        for name, width in (("keys", NOPE), ("values", VALUE)):
            expanded = expand.expand_configuration("*bf16", RANK, heads * width, RANK + ROPE)
            yield f"mla_prefill {heads} heads, expand {name}", expanded
        for carried, form in ((False, ""), (True, ", carried")):
            widths, strides = (NOPE, ROPE, VALUE), (heads * (NOPE + ROPE), NOPE + ROPE)
            latents = (RANK + ROPE, RANK)
            attend = flash.flash_configuration("*bf16", (heads, heads), widths, strides, latents, carried)
            yield f"mla_prefill {heads} heads, flash{form}", attend
    for kind, pages in PAGES.items():
        gathered = flash.gather_configuration("*bf16", pages, 1, RANK + ROPE, RANK, False, BLOCK_TOKENS)
        yield f"mla_prefill gather, {kind} pages", gathered


def _moe() -> Listed:
    """Small 4's experts, by format: of weights, and of the rows that go in and out of the first product. The second
    product is the same for static scales as for scales by row."""
    for format, kind, rows, inner in (
        ("bf16", "", "*bf16", "*bf16"),
        ("fp8", "", "*bf16", "*bf16"),
        ("fp8", " x fp8", "*fp8e4nv", "*bf16"),
        ("fp8", " x fp8, static", "*fp8e4nv", "*fp8e4nv"),
        ("nvfp4", "", "*bf16", "*bf16"),
    ):
        # fp8: each expert has a scale for gate and another for up
        up = Weights.stored(format, 2 * INNER, HIDDEN, (INNER, HIDDEN))
        down = Weights.stored(format, HIDDEN, INNER, (HIDDEN, INNER))
        for described, form in ((False, ""), (True, ", TMA")):
            chosen = replace(tile(up, rows, paired=True), described=described)
            product = moe.gate_up_configuration((rows, inner), up, chosen, EXPERTS, SLOTS, True, HIDDEN)
            yield f"small4 expert_gate_up {format}{kind}{form}", product
            if inner == "*bf16":
                chosen = replace(tile(down, rows, paired=False), described=described)
                product = moe.down_configuration((rows, "*bf16"), down, chosen, EXPERTS, SLOTS, True)
                yield f"small4 expert_down {format}{kind}{form}", product
    yield "small4 sum_slots bf16", moe.sum_configuration("*bf16", HIDDEN, SLOTS, True)


def _norm() -> Listed:
    """Hidden rows of Small 4 and Small 3, and Small 4's latent queries, which lie beside latent keys."""
    for codes in get_args(norm.Codes):
        suffix = f" fp8 {codes}" if codes else ""
        for model, hidden in (("small4", 4096), ("small3", 5120)):
            yield f"{model} hidden{suffix}", norm.norm_configuration("*bf16", hidden, hidden, codes)
            yield f"{model} hidden{suffix}", norm.norm_configuration("*bf16", hidden, hidden, codes, hidden)
        yield f"small4 query latent{suffix}", norm.norm_configuration("*bf16", 1024, 1024 + RANK + ROPE, codes)


def _rope() -> Listed:
    """Small 4 and its shards. Small 3 rotates where it writes its keys."""
    yield "rope_tables Small 4", rope.tables_configuration(ROPE // 2)
    yield "rope_tables Small 3", rope.tables_configuration(SMALL3_WIDTH // 2)
    for heads in SMALL4_HEADS:
        width = NOPE + ROPE
        turned = rope.rope_configuration("*bf16", heads, width, ROPE // 2, (heads * width, width), True, True)
        yield f"apply_rope {heads} heads", turned
