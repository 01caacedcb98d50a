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
SMALL3_HEADS = ((32, 8), (16, 4), (8, 2), (4, 1))  # query heads, key-value heads
SMALL3_WIDTH = 128
GPT_OSS_HEADS = ((64, 8), (32, 4), (16, 2), (8, 1))
GPT_OSS_WIDTH, GPT_OSS_WINDOW = 64, 128


def configurations() -> Listed:
    """(what for, Configuration) of every kernel."""
    for of_file in (_activations, _cache_write, _gqa, _linear, _mla, _moe, _norm, _rope):
        yield from of_file()


def _activations() -> Listed:
    """Inputs of the output projections, and of Small 4's experts."""
    for static in (True, False):
        kind = "static" if static else "by row"
        yield f"attention's output, {kind}", activations.rows_configuration("*bf16", 4096, 4096, static)
        yield f"small4 experts, {kind}", activations.pairs_configuration("*bf16", 4096, 4096, 128, 4, static, True)
    yield "small4 expert inner, by row", activations.rows_configuration("*bf16", 2048, 2048, False)
    yield "small3 down, by row", activations.rows_configuration("*bf16", 32768, 32768, False)


def _cache_write() -> Listed:
    """Small 4, whose latents every shard holds; Small 3 and its shards."""
    for kind, pages in PAGES.items():
        wide = 1024 + RANK + ROPE  # the rows of one product, the query's latent before
        yield (
            f"write_normed_latents, {kind} pages",
            cache_write.normed_configuration("*bf16", pages, RANK, ROPE // 2, wide, True),
        )
        for heads, shared in SMALL3_HEADS:
            wide = (heads + 2 * shared) * SMALL3_WIDTH
            yield (
                f"rotate_and_write_keys_values {heads}/{shared} heads, {kind} pages",
                cache_write.rotate_configuration("*bf16", pages, (heads, shared), SMALL3_WIDTH // 2, wide, False),
            )


def _gqa() -> Listed:
    """Small 3, and gpt-oss, every other layer of which has a window; whole and in shards."""
    for heads in SMALL3_HEADS:
        yield from _grouped(heads, SMALL3_WIDTH, 0, False)
    for heads in GPT_OSS_HEADS:
        for window in (0, GPT_OSS_WINDOW):
            yield from _grouped(heads, GPT_OSS_WIDTH, window, True)


def _grouped(heads: tuple[int, int], width: int, window: int, sinks: bool) -> Listed:
    """heads: of queries, and of keys. Queries, keys and values lie side by side in the rows of one product."""
    shared = heads[1]
    shape = Shape(shared, heads[0] // shared, width, window=window)
    strides = ((heads[0] + 2 * shared) * width, width)
    name = f"{heads[0]}/{shared} heads" + (f", window {window}" if window else "") + (", sinks" if sinks else "")
    for kind, pages in PAGES.items():
        attend = gqa.decode_configuration("*bf16", pages, shape, BLOCK_TOKENS, strides)
        yield f"gqa_decode {name}, {kind} pages", attend
        if not window:
            gathered = flash.gather_configuration("*bf16", pages, shared, width, width, True, BLOCK_TOKENS)
            yield f"gqa_prefill {shared} heads of {width}, gather, {kind} pages", gathered
    yield f"gqa_decode {name}, plan", split.plan_configuration(shape)
    yield f"gqa_decode {name}, combine", split.combine_configuration("*bf16", shape, sinks)
    for carried in (False, True):
        widths, stride = (width, 0, width), shared * width
        yield (
            f"gqa_prefill {name}, flash" + (", carried" if carried else ""),
            flash.flash_configuration("*bf16", heads, widths, strides, (stride, 0), carried, window, sinks),
        )


# Dense products of Small 4 and Small 3: (model, operation, outputs, k)
SIZES = (
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


def _linear() -> Listed:
    """Dense products, and those of each head, by model, operation and format."""
    for format, of_x in (("bf16", "bf16"), ("fp8", "bf16"), ("nvfp4", "bf16"), ("fp8", "fp8")):
        for model, name, outputs, k in SIZES:
            if name == "lm_head" and format != "bf16":
                continue  # no published checkpoint quantises it
            paired = name.endswith("gate_up")
            weights = Weights.stored(format, outputs, k)
            in_fp8 = of_x == "fp8"
            types = "*fp8e4nv" if in_fp8 else "*bf16", "*fp32" if name == "lm_head" else "*bf16"
            strides = [(k, 0), (outputs // 2 if paired else outputs, 0)]
            label = format + (" x fp8" if in_fp8 else "")
            yield from _forms(f"{model} {name}", label, types, weights, strides, paired)
            if in_fp8 and paired:
                types = types[0], "*fp8e4nv"
                yield from _forms(f"{model} {name}", f"{label}, static", types, weights, strides, paired)
    absorb, unabsorb = Weights.stored("bf16", 256, 64), Weights.stored("bf16", 128, 256)
    for name, weights, width, copied in (("absorb", absorb, 128, 64), ("unabsorb", unabsorb, 256, 0)):
        out = weights.rows + copied
        by_heads = (32 * width, width), (32 * out, out)
        chosen = tile(weights, "*bf16", paired=False)
        types = "*bf16", "*bf16"
        yield f"small4 {name} bf16", linear.linear_configuration(types, weights, chosen, *by_heads, copied=copied)


def _forms(
    name: str, format: str, types: tuple[str, str], weights: Weights, strides: list[tuple[int, int]], paired: bool
) -> Listed:
    """A product for few tokens, if its parts are apart; for many, read by pointers and through descriptors."""
    wide = tile(weights, types[0], paired)
    for tokens, described in ((1, False), (APART_TOKENS + 1, False), (APART_TOKENS + 1, True)):
        chosen, cut = (wide, Parts(1, weights.k)) if paired else narrow(weights, wide, tokens)
        if not cut.apart and tokens == 1:
            continue
        chosen = replace(chosen, described=described)
        target = types[0], "*fp32" if cut.apart else types[1]
        configuration = linear.linear_configuration(target, weights, chosen, strides[0], strides[1], paired, 0, cut)
        yield f"{name} {format}{', apart' if cut.apart else ''}{', TMA' if described else ''}", configuration
        if cut.apart and format == "bf16":  # the same for all formats
            yield f"{name}, sum of parts", linear.sum_configuration(types[1], weights.rows, cut.count)


def _mla() -> Listed:
    """Small 4 and its shards."""
    for heads in SMALL4_HEADS:
        shape = Shape(kv_heads=1, group=heads, width=RANK)
        strides, together = (heads * (RANK + ROPE), RANK + ROPE), shape.rows // heads
        for kind, pages in PAGES.items():
            for name, sequences in (("", 1), (", prefixes", together)):
                attend = mla.decode_configuration("*bf16", pages, shape, ROPE, BLOCK_TOKENS, strides, sequences)
                yield f"mla_decode {heads} heads, {kind} pages{name}", attend
        yield f"mla_decode {heads} heads, find prefixes", prefix.prefixes_configuration(BLOCK_TOKENS, together)
        yield f"mla_decode {heads} heads, plan", split.plan_configuration(shape)
        for name, sequences in (("", 1), (", prefixes", together)):
            combine = split.combine_configuration("*bf16", shape, together=sequences)
            yield f"mla_decode {heads} heads, combine{name}", combine
        for name, width in (("keys", NOPE), ("values", VALUE)):
            yield (
                f"mla_prefill {heads} heads, expand {name}",
                expand.expand_configuration("*bf16", RANK, heads * width, RANK + ROPE),
            )
        for carried in (False, True):
            widths, strides = (NOPE, ROPE, VALUE), (heads * (NOPE + ROPE), NOPE + ROPE)
            yield (
                f"mla_prefill {heads} heads, flash" + (", carried" if carried else ""),
                flash.flash_configuration("*bf16", (heads, heads), widths, strides, (RANK + ROPE, RANK), carried),
            )
    for kind, pages in PAGES.items():
        gathered = flash.gather_configuration("*bf16", pages, 1, RANK + ROPE, RANK, False, BLOCK_TOKENS)
        yield f"mla_prefill gather, {kind} pages", gathered


def _moe() -> Listed:
    """Small 4's experts, by format."""
    width, inner_width, experts, slots = 4096, 2048, 128, 4
    for format in ("bf16", "fp8", "nvfp4"):
        # fp8: each expert has a scale for gate and another for up
        up = Weights.stored(format, 2 * inner_width, width, (inner_width, width))
        down = Weights.stored(format, width, inner_width, (width, inner_width))
        for of_rows, kind in (("*bf16", ""), ("*fp8e4nv", " x fp8"), ("*fp8e4nv", " x fp8, static")):
            if kind and format != "fp8":
                continue
            for form in ("", ", TMA"):
                chosen = replace(tile(up, of_rows, paired=True), described=bool(form))
                types = of_rows, "*fp8e4nv" if kind.endswith("static") else "*bf16"
                configuration = moe.gate_up_configuration(types, up, chosen, experts, slots, True, width)
                yield f"small4 expert_gate_up {format}{kind}{form}", configuration
                if kind.endswith("static"):
                    continue  # the second product is that of " x fp8"
                chosen = replace(tile(down, of_rows, paired=False), described=bool(form))
                configuration = moe.down_configuration((of_rows, "*bf16"), down, chosen, experts, slots, True)
                yield f"small4 expert_down {format}{kind}{form}", configuration
    yield "small4 sum_slots bf16", moe.sum_configuration("*bf16", width, slots, True)


def _norm() -> Listed:
    """Hidden rows of Small 4 and Small 3, and Small 4's latent queries, which lie beside latent keys."""
    for codes in get_args(norm.Codes):
        suffix = f" fp8 {codes}" if codes else ""
        for model, hidden in (("small4", 4096), ("small3", 5120)):
            yield f"{model} hidden{suffix}", norm.norm_configuration("*bf16", hidden, hidden, codes)
            yield f"{model} hidden{suffix}", norm.norm_configuration("*bf16", hidden, hidden, codes, hidden)
        yield f"small4 query latent{suffix}", norm.norm_configuration("*bf16", 1024, 1024 + 320, codes)


def _rope() -> Listed:
    """Small 4 and its shards. Small 3 rotates where it writes its keys."""
    yield "rope_tables Small 4", rope.tables_configuration(ROPE // 2)
    yield "rope_tables Small 3", rope.tables_configuration(SMALL3_WIDTH // 2)
    for heads in SMALL4_HEADS:
        width = NOPE + ROPE
        yield (
            f"apply_rope {heads} heads",
            rope.rope_configuration("*bf16", heads, width, ROPE // 2, (heads * width, width), True, True),
        )
