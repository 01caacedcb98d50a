"""Seconds of a kernel's launch on a card, from its machine code: the roofs that it is under. No torch, no msgspec.

A launch runs in waves of as many programs as are resident together. A warp computes in turn with the instruction
pipes, of which the busiest counts (issue slots, integer ALU, conversions), and with the tensor cores, since its
next product waits for what its instructions unpack. So a scheduler that has R warps to choose from hides behind the
busier of the two all but an R-th of the other; of the memory, which works ahead, or of the work behind it, half as
much is left:

    computing = max(pipes, tensor) + min(pipes, tensor) / R
    wave      = max(computing, memory) + min(computing, memory) / 2 R        R large: the worst roof alone

(the bound of a closed queueing network of R customers). The constants below are FROZEN with the commit that brought
this file: only a measurement on a card changes them, or takes the place of the prediction. How far predictions lie
from what others have published of their kernels is printed by `make gpu-report`;
the constants were chosen with those in view, so that it is a fit and no proof.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cierzo.engine.cost.data_sheets import DataSheet

# What a copy reaches of the memory's rate: 4.3 of 4.8 TB/s, seen on an H200; vLLM's bf16 experts reach 89 % on an
# H100 at batch 256 (its pull request 39902).
COPY_SHARE = 0.9
# A load's way to memory and back where the memory is busy: what the published times of DeepGEMM's, Marlin's and
# FlashMLA's decoding imply of their stages. (Idle: 479 clocks, 0.27 us, arXiv 2402.13499.) So a full memory needs
# 34 KB under way in each multiprocessor of an H200. Of the stages of a pipeline one and a half are not under way:
# the one that is computed with, and half of the one before it.
LATENCY_S, STAGES_HELD = 1.05e-6, 1.5
# Of the tensor cores' rate, what a loop without other work reaches: FlashMLA 88 % on an H20 (its issue 30), where
# they are slow. The best products of H100 and H200, 71 to 80 %, come out of this and of what they do not hide.
TENSOR_SHARE = 0.9
# Of the issue slots, those that code fills. Marlin, published at 2.5 TB/s on an H200 (37 % of what its instructions
# allow, 52 % of the memory's rate), then comes out within 15 %, DeepGEMM within 25 %, FlashMLA within 9 %.
ISSUE_SHARE = 0.8
# What loads ahead leave unhidden, beside computing: as above.
UNHIDDEN = 0.5
# mma.sync's part of the rate that wgmma reaches (arXiv 2402.13499).
MMA_SYNC_SHARE = 0.63
# Columns below which a wgmma takes no less time: its 64x16 values of A, 2 KB, come from shared memory at 128 bytes
# a clock (CUDA programming guide: 32 banks of 4 bytes), in 16 clocks; N columns take N / 2.
LEAST_COLUMNS = 32
# Clocks of an instruction outside the loop: half of those of a warp wait for its own results (an arithmetic
# instruction takes 4, CUDA programming guide, multiprocessor level).
STRAIGHT_CLOCKS = 2.0
# From a kernel's start to its first loads' arrival, and from its last results to its end: what the same published
# decoding times leave.
START_S = 1.0e-6
# From one kernel of a replayed graph to the next, between 1.0 and 1.4 us with a dependence between them. Stated.
NODE_S = 1.2e-6
# Of a launch that is not replayed, on the host: Triton's launcher 37 us, its `Configuration` 30 us, on a
# host without a card; it counts where the device is quicker.
HOST_LAUNCH_S = 67e-6

MEMORY, IN_FLIGHT, TENSOR, ISSUE, INTEGERS, CONVERSIONS, LAUNCHES = ROOFS = (
    "memory", "bytes in flight", "tensor cores", "issue", "integer ALU", "conversions", "launches",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Counts:
    """Instructions of one warp: all; those of the integer ALU (LOP3, SHF, PRMT, IADD3, ..); conversions (F2F,
    MUFU). mma_clocks: clocks of the tensor cores of a multiprocessor."""

    issued: float = 0.0
    integers: float = 0.0
    conversions: float = 0.0
    mma_clocks: float = 0.0

    def times(self, number: float) -> Counts:
        """Count so often."""
        every = self.issued, self.integers, self.conversions, self.mma_clocks
        return Counts(*(count * number for count in every))

    def plus(self, other: Counts) -> Counts:
        """Add other counts."""
        return Counts(
            self.issued + other.issued,
            self.integers + other.integers,
            self.conversions + other.conversions,
            self.mma_clocks + other.mma_clocks,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A kernel as the compiler made it: warps and shared bytes of a program, registers of a thread, stages of the
    pipeline that loads ahead, instructions of a turn of the main loop, and those outside it."""

    warps: int
    registers: int
    shared_bytes: int
    stages: int = 1
    turn: Counts = field(default_factory=Counts)
    outside: Counts = field(default_factory=Counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A launch: programs that work and programs that return at once; turns of a program's main loop; bytes that all
    of them must move to and from memory. follows: a later stage of the launch before, whose programs are there and
    wait for what that one writes: no kernel of its own, but first loads and last results like any."""

    code: Code
    programs: int
    num_bytes: float
    turns: float = 0.0
    idle: int = 0
    follows: bool = False

    @property
    def instructions(self) -> float:
        """Instructions that all warps issue."""
        code = self.code
        return self.programs * code.warps * (self.turns * code.turn.issued + code.outside.issued)


def mma_clocks(card: DataSheet, m: int, n: int, k: int, *, fp8: bool, group: bool) -> float:
    """Clocks of a multiprocessor's tensor cores for a warp's part of an instruction of M x N x K products. Rows of
    M and columns of N that hold nothing count like others. group: of four warps together (wgmma)."""
    rate = card.products * (2 if fp8 else 1)
    if group:
        return m * max(n, LEAST_COLUMNS) * k / rate / 4
    return m * n * k / rate / MMA_SYNC_SHARE


def resident(card: DataSheet, code: Code) -> int:
    """Programs that a multiprocessor holds at once, at least one."""
    registers = 8 * ceil(code.registers / 8) * 32 * code.warps  # handed out by eights
    rooms = (
        card.programs,
        card.warps // code.warps,
        card.registers // max(registers, 1),
        card.shared_bytes // (code.shared_bytes + card.program_shared_bytes),
    )
    return max(1, min(rooms))


def seconds(card: DataSheet, launch: Launch) -> dict[str, float]:
    """Seconds of a launch, or of a stage, in a replayed graph, by the roof that they are under; their sum is its
    time."""
    code, capacity = launch.code, card.multiprocessors * resident(card, launch.code)
    outside_s = code.outside.issued * STRAIGHT_CLOCKS / card.clock
    found: defaultdict[str, float] = defaultdict(float)
    node_s = 0.0 if launch.follows else NODE_S
    found[LAUNCHES] = node_s + START_S + outside_s + START_S * launch.idle / capacity
    whole, rest = divmod(launch.programs, capacity)
    for count, programs in ((whole, capacity), (1, rest)):
        if count and programs:
            name, wave_s = _wave(card, launch, programs)
            found[name] += count * wave_s
    return dict(found)


def _wave(card: DataSheet, launch: Launch, programs: int) -> tuple[str, float]:
    """The worst roof of a wave, and its seconds."""
    code, together = launch.code, ceil(programs / card.multiprocessors)  # in the fullest multiprocessor
    num_bytes = launch.num_bytes / launch.programs
    ahead = max(1.0, code.stages - STAGES_HELD) / launch.turns if launch.turns else 1.0
    under_way = num_bytes * min(1.0, ahead)
    copied = card.bytes_per_s * COPY_SHARE
    rate = min(copied, programs * under_way / LATENCY_S) if num_bytes else copied
    memory = (programs * num_bytes / rate, MEMORY if rate == copied else IN_FLIGHT)

    def busy_s(pipe: str, a_clock: float) -> float:
        turn, outside = getattr(code.turn, pipe), getattr(code.outside, pipe)
        return together * code.warps * (launch.turns * turn + outside) / a_clock / card.clock

    tensor = (busy_s("mma_clocks", TENSOR_SHARE), TENSOR)
    pipes = max(
        (busy_s("issued", card.schedulers * ISSUE_SHARE), ISSUE),
        (busy_s("integers", card.integers / 32), INTEGERS),
        (busy_s("conversions", card.conversions / 32), CONVERSIONS),
    )
    warps = max(1.0, together * code.warps / card.schedulers)
    computing = max(tensor, pipes)
    computing_s = computing[0] + min(tensor, pipes)[0] / warps
    name = computing[1] if computing_s > memory[0] else memory[1]
    return name, max(computing_s, memory[0]) + min(computing_s, memory[0]) * UNHIDDEN / warps
