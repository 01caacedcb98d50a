"""The check that all widths of a tile keep the bits (widths.py): which tiles it launches, and of which families."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from cierzo.engine.config import EngineConfig
from cierzo.engine.worker import warm
from cierzo.kernels.formats.number_formats import formats_on
from cierzo.kernels.triton import heuristics, linear, widths
from cierzo.kernels.triton.launch import Configuration, Launch, dry_run, launch
from cierzo.kernels.triton.product import Weights

META = torch.device("meta")
# What an engine may be told to compute with.
CONFIGS = [
    SimpleNamespace(weights=weights, activations=activations, head=head)
    for weights in formats_on("cuda")
    for activations in ("bf16", "fp8")
    for head in ("bf16", "fp8")
]
TILE = ("BLOCK_N", "BLOCK_T", "BLOCK_K")


def products(launches: list[Launch]) -> list[Configuration]:
    return [one.kernel for one in launches if one.kernel.name == "linear"]


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "fp8", "fp8 x fp8", "bf16"])
@pytest.mark.parametrize("shape", [(widths.ROWS, widths.COLUMNS), (4096, 4096)], ids=str)
def test_the_tiles_that_are_named_are_launched(format: str, shape: tuple[int, int]) -> None:
    """At the sizes of an engine's check and of Small 4, whose narrow products are cut along k when nothing is
    forced."""
    weights, activations, _ = (*format.split(" x "), "bf16", "")[:3]
    x = torch.empty(widths.TOKENS, shape[1], dtype=torch.bfloat16, device=META)
    for matrix in widths.matrices(torch.empty(shape, dtype=torch.bfloat16, device=META), weights, activations):
        assert products(dry_run(linear.lm_head, x, matrix))[0].constants["PARTS"] > 1
        for paired in (False, True):
            tiles = widths.tiles(x, matrix, paired)
            assert {one.block_t for one in tiles} >= {16, 32, 64 if format == "mxfp4" else 128}
            for chosen in tiles:
                (found,) = products(dry_run(widths.multiply, x, matrix, chosen, paired))
                assert tuple(found.constants[name] for name in TILE) == (
                    chosen.block_n,
                    chosen.block_t,
                    chosen.block_k,
                )
                assert (found.num_warps, found.num_stages) == (chosen.num_warps, chosen.num_stages)
                assert (found.constants["PARTS"], found.constants["PAIRED"]) == (1, paired)


def test_tiles_of_parts_of_k_are_among_them() -> None:
    """Sums of parts in one program have tiles of eight warps for 4 bits, which no other product has."""
    x, weights = (torch.empty(size, 1024, dtype=torch.bfloat16, device=META) for size in (200, 256))
    (matrix,) = widths.matrices(weights, "nvfp4", "bf16")
    found = products(dry_run(linear.lm_head, x, matrix))[0]
    size = (*(found.constants[name] for name in TILE), found.num_warps)
    assert size == (128, 64, 128, 8)
    assert size in [(one.block_n, one.block_t, one.block_k, one.num_warps) for one in widths.tiles(x, matrix)]


def test_every_family_that_an_engine_may_use_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = set[tuple[str, bool]]()

    def kinds(x: torch.Tensor, matrix: Any, paired: bool) -> dict[str, bool]:
        activations = "*fp8e4nv" if widths.takes_fp8(matrix) else "*bf16"
        compared.add((heuristics.family(Weights.of("test", matrix), activations), paired))
        return {}

    monkeypatch.setattr(widths, "compare", kinds)
    for config in CONFIGS:
        compared.clear()
        widths.settle(warm.formats(cast(EngineConfig, config)), torch.device("cpu"))
        assert compared >= {("bf16", False), ("bf16", True)}
        assert (("fp8 woven", False) in compared) == (
            config.head == "fp8" or (config.activations == "bf16" and config.weights != "bf16")
        )
        for family in (("fp8 woven", True), ("fp8 woven by blocks", False), ("fp8 woven by blocks", True)):
            assert (family in compared) == (("fp8 woven", False) in compared)
        for paired in (False, True):
            assert ((config.weights, paired) in compared) == (config.weights in ("bf16", "nvfp4"))
            by_fp8 = config.activations == "fp8" and config.weights != "bf16"
            assert (("fp8 x fp8", paired) in compared) == by_fp8


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_a_card_whose_widths_differ_has_one(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """A last bit of the tile of 128 tokens, of gate and up alone."""
    monkeypatch.setattr(heuristics, "WIDTH_KEEPS_BITS", True)
    monkeypatch.setattr(widths, "TOKENS", 17)
    monkeypatch.setattr(widths, "ROWS", 16)
    weights = Weights.stored("nvfp4", 4096, 4096)
    widths.settle([(format, "bf16")], torch.device("cpu"))
    assert heuristics.WIDTH_KEEPS_BITS

    def wrong(configuration: Configuration, grid: tuple[int, ...], **arguments: Any) -> None:
        launch(configuration, grid, **arguments)
        if configuration.constants["BLOCK_T"] == 128 and configuration.constants["PAIRED"]:
            arguments["out_ptr"].mul_(1 + 2**-23)

    monkeypatch.setattr(linear, "launch", wrong)
    widths.settle([(format, "bf16")], torch.device("cpu"))
    assert not heuristics.WIDTH_KEEPS_BITS
    chosen = {heuristics.tile(weights, "*bf16", True, tokens) for tokens in (1, 20, 100, 1000)}
    assert chosen == {heuristics.TILES["nvfp4", True]}
    assert heuristics.spread(*chosen, weights, 2048, 5, 132) in chosen
