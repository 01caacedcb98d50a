"""Roofs of a launch: seconds that are worked out by hand, each roof the worst one once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from cierzo.engine.cost import roofs
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.roofs import Code, Counts, Launch

H200 = DATA_SHEETS["h200"]
SMS, CLOCK = 132, 989.5e12 / (2 * 2048 * 132)
# Four warps, two programs in a multiprocessor: each has 100 KB.
PLAIN = Code(warps=4, registers=64, shared_bytes=100 << 10, stages=4)


def launch(turn: Counts, programs: int = SMS, turns: float = 100.0, num_bytes: float = 0.0) -> Launch:
    return Launch(code=replace(PLAIN, turn=turn), programs=programs, turns=turns, num_bytes=num_bytes)


def limited_s(one: Launch) -> tuple[str, float]:
    """The roof beside the launch itself, and its seconds."""
    found = roofs.seconds(H200, one)
    assert found.pop(roofs.LAUNCHES) == pytest.approx(roofs.NODE_S + roofs.START_S)
    ((name, seconds),) = found.items()
    return name, seconds


@pytest.mark.parametrize(
    ("turn", "roof", "clocks"),
    [
        # of one warp and turn -> of a multiprocessor: four warps, 100 turns
        (Counts(issued=1000), roofs.ISSUE, 4 * 100 * 1000 / 4 / 0.8),
        (Counts(issued=600, integers=600), roofs.INTEGERS, 4 * 100 * 600 / 2),
        (Counts(issued=64, conversions=64), roofs.CONVERSIONS, 4 * 100 * 64 * 2),
        (Counts(issued=0, mma_clocks=128), roofs.TENSOR, 4 * 100 * 128 / 0.9),
    ],
)
def test_a_roof_of_computing_is_the_worst(turn: Counts, roof: str, clocks: float) -> None:
    assert limited_s(launch(turn)) == (roof, pytest.approx(clocks / CLOCK))


def test_what_does_not_hide_behind_the_worst_roof_is_added() -> None:
    """One program in a multiprocessor, a warp for each scheduler: pipes and tensor cores take turns."""
    pipes_s, tensor_s = 4 * 100 * 1000 / 4 / 0.8 / CLOCK, 4 * 100 * 128 / 0.9 / CLOCK
    both = Counts(issued=1000, mma_clocks=128)
    assert limited_s(launch(both)) == (roofs.ISSUE, pytest.approx(pipes_s + tensor_s))
    # two programs: twice the work, and half of the tensor cores' is hidden
    assert limited_s(launch(both, 2 * SMS))[1] == pytest.approx(2 * pipes_s + 2 * tensor_s / 2)
    num_bytes = 1e8
    memory_s = num_bytes / (num_bytes * 2.5 / 100 / 1.05e-6)  # two and a half of a hundred turns are under way
    loading = launch(both, 2 * SMS, num_bytes=num_bytes)
    assert limited_s(loading)[1] == pytest.approx(2 * pipes_s + tensor_s + memory_s * 0.5 / 2)


def test_the_memory_s_rate_and_the_bytes_under_way() -> None:
    """264 programs, of which two and a half stages are under way each."""
    full = launch(Counts(issued=10), 2 * SMS, turns=10.0, num_bytes=264 * 10 * 32_768.0)
    name, seconds = limited_s(full)
    assert name == roofs.MEMORY
    issue_s = 2 * 4 * 10 * 10 / 4 / 0.8 / CLOCK
    assert seconds == pytest.approx(264 * 10 * 32_768 / (4.8e12 * 0.9) + issue_s * 0.5 / 2)
    few = launch(Counts(issued=10), 32, turns=10.0, num_bytes=32 * 10 * 8192.0)
    name, seconds = limited_s(few)
    assert name == roofs.IN_FLIGHT
    rate = 32 * 2.5 * 8192 / 1.05e-6
    assert rate < 4.8e12 * 0.9
    assert seconds == pytest.approx(32 * 10 * 8192 / rate + issue_s / 2 * 0.5)
    more_stages = replace(few, code=replace(few.code, stages=8))
    assert limited_s(more_stages)[1] < seconds


def test_a_launch_of_next_to_nothing_takes_its_launch() -> None:
    found = roofs.seconds(H200, launch(Counts(issued=1), turns=1.0))
    assert max(found, key=found.__getitem__) == roofs.LAUNCHES
    straight = replace(PLAIN, outside=Counts(issued=1000))
    found = roofs.seconds(H200, Launch(code=straight, programs=1, num_bytes=0.0))
    assert found[roofs.LAUNCHES] == pytest.approx(roofs.NODE_S + roofs.START_S + 2 * 1000 / CLOCK)


def test_programs_that_return_at_once_take_time_too() -> None:
    one = launch(Counts(issued=100))
    without, beside = (sum(roofs.seconds(H200, replace(one, idle=idle)).values()) for idle in (0, 264 * 3))
    assert beside - without == pytest.approx(3 * roofs.START_S)


def test_a_program_more_than_a_whole_wave_is_another_wave() -> None:
    counts = Counts(issued=1000, mma_clocks=10)
    alone_s = limited_s(launch(counts, 1))[1]
    wave_s = limited_s(launch(counts, 2 * SMS))[1]
    for waves in (1, 2, 5):
        assert limited_s(launch(counts, waves * 2 * SMS))[1] == pytest.approx(waves * wave_s)
        assert limited_s(launch(counts, waves * 2 * SMS + 1))[1] == pytest.approx(waves * wave_s + alone_s)


def test_more_programs_never_take_less() -> None:
    """At the same bytes a program."""
    counts = Counts(issued=300, integers=100, conversions=8, mma_clocks=64)
    times = [
        sum(roofs.seconds(H200, launch(counts, programs, num_bytes=1e5 * programs)).values())
        for programs in range(1, 1200, 7)
    ]
    assert all(later > earlier * (1 - 1e-12) for earlier, later in pairwise(times))


@pytest.mark.parametrize(
    ("n", "fp8", "clocks"), [(256, False, 128), (64, False, 32), (8, False, 16), (128, True, 64), (16, True, 16)]
)
def test_a_wgmma_takes_half_a_clock_a_column_and_no_less_than_its_a(n: int, fp8: bool, clocks: float) -> None:
    """Rows that hold nothing count: M is 64 whatever is in them."""
    k = 32 if fp8 else 16
    assert 4 * roofs.mma_clocks(H200, 64, n, k, fp8=fp8, group=True) == pytest.approx(clocks)


def test_programs_that_a_multiprocessor_holds() -> None:
    def held(**changes: int) -> int:
        return roofs.resident(H200, replace(PLAIN, shared_bytes=0, **changes))

    assert roofs.resident(H200, PLAIN) == 2
    assert (held(registers=128), held(registers=129), held(registers=32)) == (4, 3, 16)
    assert held(warps=1, registers=16) == 32
    assert roofs.resident(H200, replace(PLAIN, shared_bytes=227 << 10)) == 1


def test_roofs_and_data_sheets_need_neither_torch_nor_msgspec() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'msgspec', 'triton', 'numpy'));"
        "from cierzo.engine.cost import data_sheets, operations, roofs, sizes"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
