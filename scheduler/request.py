"""A sequence in the scheduler: its request, its progress, its legal changes of state."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import msgspec

from cierzo.cache.manager import SequenceBlocks
from cierzo.scheduler.params import SamplingParams, ThinkingBudget
from cierzo.scheduler.plan import Admission, Finish, FinishReason, RequestKey
from cierzo.scheduler.stop import StopRule

# Block-seconds are counted in these parts, so that sums of them are exact in floating point, in whatever order.
TICKS_PER_S = 1 << 16


class QueueFull(Exception):
    """`max_waiting` sequences wait already; try again later."""


class DuplicateRequest(Exception):
    """This (request id, sample) is still alive."""


class NewRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A sequence to run. `sampling.seed` is set.

    `output_token_ids` resumes: tokens generated before, which count as output and are not delivered again.
    `arrival_s` (None: now) and `deadline_at_s` are readings of the scheduler's clock. `banned`, `thinking`: as in
    Admission; no decision here depends on them.
    """

    request_id: int
    sample: int = 0
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    banned: tuple[tuple[int, ...], ...] = ()
    thinking: ThinkingBudget | None = None
    priority: int = 0
    arrival_s: float | None = None
    deadline_at_s: float | None = None


class State(Enum):
    """Where a sequence is.

    ::

        HELD -> WAITING <-> RUNNING      and from each of the three -> ENDED
    """

    HELD = "held"  # behind a sibling that is computing the prompt they share
    WAITING = "waiting"  # in the queue; holds no blocks
    RUNNING = "running"  # has a slot and blocks
    ENDED = "ended"


LEGAL_MOVES = {
    State.HELD: (State.WAITING, State.ENDED),
    State.WAITING: (State.RUNNING, State.ENDED),
    State.RUNNING: (State.WAITING, State.ENDED),
    State.ENDED: (),
}


@dataclass(slots=True, eq=False)
class Spent:
    """Cost of a sequence up to its last preemption or its end, but for `other_steps`."""

    num_found: int = 0  # computed tokens that it found at its last admission
    most_computed: int = 0  # before its last admission
    computed_tokens: int = 0  # rows of steps
    recomputed_tokens: int = 0  # of these, below most_computed
    kv_ticks: int = 0  # blocks held times time; see Accounts
    held_since_ticks: int = 0
    other_steps: int = 0  # beside the one that each token came with: those that chose none


@dataclass(slots=True, eq=False)
class Request:
    """A live sequence. Only the scheduler writes it; `blocks` belongs to the cache manager.

    `tokens` are all known tokens, prompt first; the first `num_computed` of them are in the cache. Steps in flight
    will have computed `num_planned`, and will have chosen `num_pending` tokens more, 0 or 1. Between steps that run
    one by one, num_planned is num_computed, and nothing is pending. Times are readings of the scheduler's clock, in
    seconds.
    """

    key: RequestKey
    new: NewRequest
    tokens: list[int]
    num_prompt_tokens: int
    blocks: SequenceBlocks
    stop: StopRule
    order: tuple[float, int]  # waiting order, least first; unique
    arrived_at: float
    state: State = State.HELD
    num_computed: int = 0
    num_planned: int = 0
    num_pending: int = 0
    slot: int = -1
    epoch: int = -1
    num_cached_prompt_tokens: int = 0  # at the first admission
    num_preemptions: int = 0
    admitted_at: float | None = None  # first admission
    first_token_at: float | None = None  # first token of this run; resumed ones came before
    spent: Spent = field(default_factory=Spent)

    def move(self, state: State) -> None:
        """Change state; an illegal move is a bug of the scheduler."""
        assert state in LEGAL_MOVES[self.state], f"request {self.key}: {self.state} -> {state}"
        self.state = state

    def admission(self) -> Admission:
        """The facts that the runner is told at (re)admission."""
        new = self.new
        output_token_ids = tuple(self.tokens[self.num_prompt_tokens :])
        facts = new.sampling, new.prompt_token_ids, output_token_ids, new.eos_token_ids
        return Admission(*facts, new.banned, new.thinking)

    def finish(self, reason: FinishReason, message: str, stop_token_id: int | None, now: float) -> Finish:
        """The record of its end at time `now`. A phase it did not reach, or left unfinished, ends now."""
        admitted_at = now if self.admitted_at is None else self.admitted_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        spent = self.spent
        return Finish(
            reason=reason,
            message=message,
            stop_token_id=stop_token_id,
            prompt_tokens=self.num_prompt_tokens,
            output_tokens=len(self.tokens) - self.num_prompt_tokens,
            cached_tokens=self.num_cached_prompt_tokens,
            preemptions=self.num_preemptions,
            queue_s=admitted_at - self.arrived_at,
            prefill_s=first_token_at - admitted_at,
            decode_s=now - first_token_at,
            computed_tokens=spent.computed_tokens,
            recomputed_tokens=spent.recomputed_tokens,
            steps=spent.other_steps + len(self.tokens) - self.num_prompt_tokens - len(self.new.output_token_ids),
            kv_block_s=spent.kv_ticks / TICKS_PER_S,
        )
