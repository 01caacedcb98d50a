"""Attention, rotations and cache writes, compiled for sm_90 without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from compiled_ahead import ask

SHARED_BYTES = 227 << 10  # of a multiprocessor that one program may have
DECODE = [
    "mla_decode 32 heads, bf16 pages",
    "mla_decode 32 heads, fp8 pages",
    "mla_decode 4 heads, fp8 pages",
    "mla_decode 32 heads, bf16 pages, prefixes",
    "mla_decode 32 heads, fp8 pages, prefixes",
    "gqa_decode 32/8 heads, bf16 pages",
    "gqa_decode 32/8 heads, fp8 pages",
    "gqa_decode 64/8 heads, window 128, sinks, bf16 pages",
    "gqa_decode 64/8 heads, window 128, sinks, fp8 pages",
]
PREFILL = [
    "mla_prefill 32 heads, flash",
    "mla_prefill 32 heads, flash, carried",
    "mla_prefill 32 heads, expand keys",
    "gqa_prefill 32/8 heads, flash, carried",
    "gqa_prefill 64/8 heads, sinks, flash, carried",
    "gqa_prefill 64/8 heads, window 128, sinks, flash, carried",
]
OTHERS = [
    "mla_decode 32 heads, plan",
    "mla_decode 32 heads, combine",
    "mla_decode 32 heads, combine, prefixes",
    "mla_decode 32 heads, find prefixes",
    "gqa_decode 64/8 heads, window 128, sinks, plan",
    "gqa_decode 64/8 heads, window 128, sinks, combine",
    "mla_prefill gather, bf16 pages",
    "mla_prefill gather, fp8 pages",
    "gqa_prefill 8 heads of 128, gather, bf16 pages",
    "gqa_prefill 8 heads of 64, gather, fp8 pages",
    "rope_tables Small 4",
    "apply_rope 32 heads",
    "write_normed_latents, fp8 pages",
    "rotate_and_write_keys_values 32/8 heads, fp8 pages",
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return ask("compile", *DECODE, *PREFILL, *OTHERS)


def count(report: dict[str, Any], *prefixes: str) -> int:
    return sum(number for name, number in report["instructions"].items() if name.startswith(prefixes))


def test_nothing_spills_and_shared_memory_suffices(compiled: dict[str, Any]) -> None:
    assert set(compiled) == {*DECODE, *PREFILL, *OTHERS}
    for name, report in compiled.items():
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
        "mla_decode 32 heads, bf16 pages",
        "mla_decode 32 heads, bf16 pages, prefixes",
        "gqa_decode 32/8 heads, bf16 pages",
    ],
)
def test_two_programs_of_decoding_share_a_multiprocessor(compiled: dict[str, Any], name: str) -> None:
    """One's softmax then hides behind the other's products."""
    assert 2 * compiled[name]["shared_bytes"] <= SHARED_BYTES
    assert compiled[name]["registers"] <= 255


@pytest.mark.parametrize(
    "name", ["mla_prefill gather, fp8 pages", "apply_rope 32 heads", "mla_decode 32 heads, combine"]
)
def test_what_only_moves_bytes_moves_16_at_a_time(compiled: dict[str, Any], name: str) -> None:
    assert count(compiled[name], "LDG.E.128")


def test_tables_do_without_the_hardwares_sine(compiled: dict[str, Any]) -> None:
    """Its error grows with the angle, and positions reach 262,144."""
    assert not count(compiled["rope_tables Small 4"], "MUFU.SIN", "MUFU.COS")
