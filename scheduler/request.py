"""A sequence in the scheduler: its request, its progress, its legal changes of state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec

from cierzo.cache.manager import SequenceBlocks
from cierzo.scheduler import images
from cierzo.scheduler.images import Image
from cierzo.scheduler.params import SamplingParams, ThinkingBudget
from cierzo.scheduler.plan import Admission, Finish, FinishReason, GrammarState, RequestKey, Scoring, SeqPlan
from cierzo.scheduler.stop import StopReason, StopRule, stop_rule

if TYPE_CHECKING:
    from cierzo.scheduler.tenants import Tenant

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
    Admission; no decision here depends on them. `weight`: of the tenant, from now on. Requests of different `salt`
    share no block. `num_scored`: log-probabilities of the prompt that an earlier run has delivered. `constraint`:
    of one with a grammar, which is held until `Scheduler.release`. `images`: of the prompt, in its order.
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
    tenant: str = ""
    weight: float = 1.0
    salt: bytes = b""
    num_scored: int = 0
    constraint: Any = None  # Constraint | None
    images: tuple[Image, ...] = ()

    def require(self, max_model_len: int) -> None:
        """Raise ValueError for what cannot be run."""
        key = (self.request_id, self.sample)
        if self.sampling.seed is None:
            raise ValueError(f"request {key} has no seed")
        if not 1 <= len(self.prompt_token_ids) <= max_model_len:
            raise ValueError(
                f"request {key}: prompt of {len(self.prompt_token_ids)} tokens, must be 1 to {max_model_len}"
            )
        if not 0 < self.weight < math.inf:
            raise ValueError(f"request {key}: weight {self.weight} of tenant {self.tenant!r} must be above 0")
        images.require(self.images, len(self.prompt_token_ids))


class State(Enum):
    """Where a sequence is.

    ::

        HELD -> WAITING <-> RUNNING      and from each of the three -> ENDED
    """

    HELD = "held"  # behind a sibling that is computing the prompt they share, or until its grammar is made
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
    one by one, num_planned is num_computed, and nothing is pending. Log-probabilities of `num_scored` tokens of the
    prompt were delivered, behind its first. Times are readings of the scheduler's clock, in seconds.
    """

    key: RequestKey
    new: NewRequest
    tokens: list[int]
    num_prompt_tokens: int
    blocks: SequenceBlocks
    stop: StopRule
    order: tuple[float, int]  # waiting order, least first; unique
    arrived_at: float
    tenant: Tenant
    state: State = State.HELD
    num_computed: int = 0
    num_planned: int = 0
    num_pending: int = 0
    num_scored: int = 0
    slot: int = -1
    epoch: int = -1
    num_charged: int = 0  # leading positions that its tenant was charged for, or that were found
    num_cached_prompt_tokens: int = 0  # at the first admission
    num_preemptions: int = 0
    grammar: GrammarState | None = None  # what it says of the output; None: it has none
    is_held: bool = False  # until its grammar is made
    is_late: bool = False  # its grammar's mask was not there when a step chose tokens
    is_new: bool = False  # admitted, and in no plan yet
    inside_image: bytes | None = None  # key of the image that its last planned chunk ends inside of
    paid_images_end: int = 0  # images that end by here are paid for
    admitted_at: float | None = None  # first admission
    first_token_at: float | None = None  # first token of this run; resumed ones came before
    spent: Spent = field(default_factory=Spent)

    @classmethod
    def of(
        cls,
        new: NewRequest,
        tokens: list[int],
        blocks: SequenceBlocks,
        tenant: Tenant,
        order: tuple[float, int],
        arrived_at: float,
        max_model_len: int,
    ) -> Request:
        """A sequence as it arrives. tokens: its prompt, and what it comes with of its output."""
        num_prompt_tokens = len(new.prompt_token_ids)
        return cls(
            key=(new.request_id, new.sample),
            new=new,
            tokens=tokens,
            num_prompt_tokens=num_prompt_tokens,
            blocks=blocks,
            stop=stop_rule(new.sampling, new.eos_token_ids, num_prompt_tokens, max_model_len),
            order=order,
            arrived_at=arrived_at,
            tenant=tenant,
            num_scored=new.num_scored,
            grammar=None if new.constraint is None else "open",
        )

    def move(self, state: State) -> None:
        """Change state; an illegal move is a bug of the scheduler."""
        assert state in LEGAL_MOVES[self.state], f"request {self.key}: {self.state} -> {state}"
        self.state = state

    def complete(self) -> tuple[StopReason | None, int | None]:
        """Why it needs no token more than those that it came with, if that is so, and the token that ended it."""
        reason: StopReason | None = "length" if len(self.tokens) >= self.stop.limit_tokens else None
        if self.new.output_token_ids:
            reason = self.stop.check(self.tokens[-1], len(self.tokens))
        if reason == "stop":
            return reason, self.tokens[-1]
        return "stop" if self.grammar == "ended" else reason, None

    def wait_for_mask(self) -> None:
        """Note that a step computed its last known token, and chose none, as the mask for it was not there."""
        self.is_late, self.num_planned, self.num_pending = True, self.num_computed, 0
        self.spent.other_steps += 1

    def has_mask(self) -> bool:
        """Whether the mask is there now that was late."""
        self.is_late = not self.new.constraint.settle()
        return not self.is_late

    def take(self, new: list[int]) -> tuple[int, StopReason | None, int | None]:
        """Append sampled tokens up to the one that ends the sequence: how many, why it ends, and the token that
        ended it, if one did. A grammar that has ended ends it too."""
        tokens, check = self.tokens, self.stop.check
        for count, token_id in enumerate(new, 1):
            tokens.append(token_id)
            reason = check(token_id, len(tokens))
            if reason is not None or self.grammar == "ended":
                stop_token_id = token_id if reason == "stop" else None
                return count, "stop" if self.grammar == "ended" else reason, stop_token_id
        return len(new), None, None

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of its prompt are still to come."""
        return self.new.sampling.prompt_logprobs is not None and self.num_scored < self.num_prompt_tokens - 1

    @property
    def findable_tokens(self) -> int:
        """Leading tokens that the cache may have; the others are computed, as they are scored."""
        return self.num_scored if self.is_scored else len(self.tokens)

    def scoring(self, start: int, end: int) -> Scoring | None:
        """Tokens that a step scores which computes positions start .. end-1, if there are any."""
        if not self.is_scored:
            return None
        first, last = max(start, self.num_scored), min(end, self.num_prompt_tokens - 1)
        count = self.new.sampling.prompt_logprobs or 0
        return Scoring(first, self.tokens[first + 1 : last + 1], count) if first < last else None

    def chunk(self, start: int, count: int, *, samples: bool) -> SeqPlan:
        """Plan so many tokens of it for a step; with all that a runner has to know, the first time in its slot."""
        admitted, self.is_new = self.is_new, False
        return SeqPlan(
            key=self.key,
            slot=self.slot,
            epoch=self.epoch,
            start=start,
            token_ids=self.tokens[start : start + count],
            num_prompt_tokens=self.num_prompt_tokens,
            new_block_ids=[*self.blocks.block_ids] if admitted else [],
            samples=samples,
            admission=self.admission() if admitted else None,
            scoring=self.scoring(start, start + count),
            images=images.within(self.new.images, start, start + count) if self.new.images else (),
        )

    def revised(self, seq: SeqPlan) -> SeqPlan | None:
        """A plan of it that is to be run again, with the tokens that are known by now; None if it was preempted
        since (its blocks may be another's), or if no token was chosen to go on with."""
        token_ids = self.tokens[seq.start : seq.start + len(seq.token_ids)]
        if self.epoch != seq.epoch or len(token_ids) < len(seq.token_ids):
            return None
        return msgspec.structs.replace(seq, token_ids=token_ids)

    def check(self) -> None:
        """Assert what holds of it in its state."""
        if self.state is State.RUNNING:
            assert self.num_computed < len(self.tokens) < self.stop.limit_tokens, self
            assert self.num_computed <= self.num_planned <= self.blocks.capacity_tokens, self
            assert self.num_planned < len(self.tokens) + self.num_pending, self
            assert 0 <= self.num_pending <= 2, self
        else:
            assert not self.blocks.block_ids, self
            assert (self.num_computed, self.slot) == (0, -1), self
            assert (self.num_planned, self.num_pending) == (0, 0), self

    def admission(self) -> Admission:
        """The facts that the runner is told at (re)admission."""
        new = self.new
        output_token_ids = tuple(self.tokens[self.num_prompt_tokens :])
        facts = new.sampling, new.prompt_token_ids, output_token_ids, new.eos_token_ids
        return Admission(*facts, new.banned, new.thinking, new.constraint)

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
            incomplete=self.grammar == "open",
        )
