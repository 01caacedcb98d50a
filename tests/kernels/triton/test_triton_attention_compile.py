"""Attention, rotations and cache writes, compiled for sm_90 without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from compiled_ahead import DECODE, OTHERS, PREFILL

pytestmark = pytest.mark.timeout(900)  # half a minute of two cores, which others may want too
SHARED_BYTES = 227 << 10  # of a multiprocessor that one program may have


def count(report: dict[str, Any], *prefixes: str) -> int:
    return sum(number for name, number in report["instructions"].items() if name.startswith(prefixes))


def test_nothing_spills_and_shared_memory_suffices(compiled: dict[str, Any]) -> None:
    for name in DECODE + PREFILL + OTHERS:
        report = compiled[name]
        assert report["spill_bytes"] == 0, name
        assert report["shared_bytes"] <= SHARED_BYTES, name


@pytest.mark.parametrize("name", DECODE + PREFILL)
def test_products_run_on_a_warp_group_and_operands_come_16_bytes_at_a_time(
    compiled: dict[str, Any], name: str
) -> None:
    report = compiled[name]
    assert count(report, "HGMMA")
    assert not count(report, "HMMA")
    assert count(report, "LDGSTS.E.BYPASS.128")
    assert not count(report, "LDGSTS.E.64", "LDGSTS.E.BYPASS.64")


@pytest.mark.parametrize(
    "name",
    [
        "mla_attend: mla_decode, small4, one row, fp8",
        "gqa_attend: gqa_decode, small3, one row, bf16",
    ],
)
def test_two_programs_of_decoding_share_a_multiprocessor(compiled: dict[str, Any], name: str) -> None:
    """One's softmax then hides behind the other's products. With bf16 latents one has the memory for two tiles."""
    assert 2 * compiled[name]["shared_bytes"] <= SHARED_BYTES
    assert compiled[name]["registers"] <= 255


@pytest.mark.parametrize(("pages", "instructions"), [("bf16", 540), ("fp8", 875)])
def test_a_page_of_latents_takes_few_instructions(compiled: dict[str, Any], pages: str, instructions: int) -> None:
    """Instructions of a warp for 64 tokens, as the worse of Triton 3.6 and 3.9 reaches it; none of them converts
    an e4m3 value by itself."""
    report = compiled[f"mla_attend: mla_decode, small4, one row, {pages}"]
    assert not count(report, "F2F.")
    assert report["turn"]["issued"] <= instructions


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("gather: mla_prefill, small4, prefill, fp8", "LDG.E.128"),
        ("apply_rope: apply_rope, small4, one row, bf16", "LDG.E.128"),
        ("combine: mla_decode, small4, one row, bf16", "LDG.E.64"),
    ],
)
def test_what_only_moves_bytes_moves_many_at_a_time(compiled: dict[str, Any], name: str, load: str) -> None:
    """16 of a thread; of a partial result, whose 256 values 128 threads share, their two."""
    assert count(compiled[name], load)


def test_tables_do_without_the_hardwares_sine(compiled: dict[str, Any]) -> None:
    """Its error grows with the angle, and positions reach 262,144."""
    assert not count(compiled["rope_tables: rope_tables, small4, one row, bf16"], "MUFU.SIN", "MUFU.COS")
