"""The values that cross the scheduler's border: a plan out, a result in, token deltas out.

A step computes, for every request in it, some of the tokens that are known but not yet computed. There is
no prefill phase and no decode phase: a prompt chunk, a generated token, a recomputation after a preemption
and a resumed stream are all `SeqPlan(start, token_ids)`.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

from cierzo.scheduler.cost import StepWork
from cierzo.scheduler.images import Image
from cierzo.scheduler.params import SamplingParams, ThinkingBudget

FinishReason = Literal["stop", "length", "cancelled", "deadline", "failed"]
GrammarState = Literal["open", "may end", "ended"]  # what a grammar says of an output
RequestKey = tuple[int, int]  # (request id, sample index); one running sequence each
ENTRY_BYTES, ALTERNATIVE_BYTES = 29, 14
_encode = msgspec.msgpack.Encoder().encode
PENDING = -1  # a token that a step in flight is about to choose: the runner knows it, and nobody else yet


class Constraint(Protocol):
    """The grammar of a sequence, which follows its output (engine/worker/grammars.py)."""

    state: GrammarState
    error: str  # why no token can come next

    def settle(self) -> bool:
        """Whether the token that comes next can be chosen."""
        ...

    def drop(self) -> None:
        """Follow nothing any more: its sequence has ended."""
        ...


class Admission(msgspec.Struct, frozen=True, gc=False):
    """Facts about a sequence that a runner needs once per epoch: sent with the first plan after (re)admission.

    banned: sequences of tokens that the output may not hold. constraint: what its grammar is followed by.
    """

    sampling: SamplingParams
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    banned: tuple[tuple[int, ...], ...] = ()
    thinking: ThinkingBudget | None = None
    constraint: Any = None  # Constraint | None, which no reader of messages knows


class Scoring(msgspec.Struct, frozen=True, gc=False):
    """Tokens of a prompt whose log-probabilities a step gives, and at each place those of the `count` likeliest.

    Each of `token_ids` is scored by the row before it: the first by the row at position `start`.
    """

    start: int
    token_ids: list[int]
    count: int


class SeqPlan(msgspec.Struct, frozen=True, gc=False):
    """The part of a step that belongs to one sequence.

    Computes `token_ids` at positions start .. start+len-1. Positions below `num_prompt_tokens` are computed in
    expanded form, the others in absorbed form (docs/architecture.md, "Exact"). `new_block_ids` end the block
    table row `slot` at the last token's block; with an `admission` they replace the row. If `samples`, the last
    token's logits give one new token, at position start+len. The last of `token_ids` may be PENDING.
    """

    key: RequestKey
    slot: int
    epoch: int
    start: int
    token_ids: list[int]
    num_prompt_tokens: int
    new_block_ids: list[int]
    samples: bool
    admission: Admission | None
    scoring: Scoring | None = None
    images: tuple[Image, ...] = ()


class StepPlan(msgspec.Struct, frozen=True, gc=False):
    """The rows that one step computes, in the order in which rows are laid out. Empty when there is nothing to do.

    ahead: some of its tokens are PENDING. work: as priced when it was planned; None where the step is not priced,
    or run again. predicted_s: of this step, or the last priced one; 0.0: no price was known. kept: the images, by
    key, whose embeddings the runner keeps from now on, what it makes in this step included; None: as before. begun:
    images that no row of it needs yet, of each the stages of the tower that are done before its rows.
    """

    step: int
    seqs: list[SeqPlan]
    num_tokens: int
    ahead: bool = False
    work: StepWork | None = None
    predicted_s: float = 0.0
    kept: tuple[bytes, ...] | None = None
    begun: list[tuple[Image, int]] = []


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position: of the token that stands there, and of the most likely ones."""

    token_id: int
    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


unpacked_entry = msgspec.msgpack.Decoder(TokenLogprobs).decode


def packed_entry(entry: TokenLogprobs) -> msgspec.Raw:
    """An entry of a prompt's log-probabilities, as it travels."""
    return msgspec.Raw(_encode(entry))


def entry_bytes(num_top: int) -> int:
    """Bytes that a TokenLogprobs with so many alternatives takes at most as MessagePack, and a place in a list."""
    return ENTRY_BYTES + ALTERNATIVE_BYTES * num_top


class StepResult(msgspec.Struct, frozen=True, gc=False):
    """The results of a step: for each sequence of the plan its new tokens (empty where it does not sample).

    `logprobs[i]` is None where sequence i asked for none; `failures` maps sequence indices to the reason why
    their result must not be used (for instance logits that are not finite). `prompt_logprobs`: by sequence index,
    of each whose plan has a scoring, a TokenLogprobs for each token scored, as MessagePack: nobody on their way
    reads them. `grammars`: by sequence index, of each with a grammar what that says of the output with the new
    token. `late`: sequences whose token was not chosen, as their mask was not there; their last row comes again.
    """

    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None] | None = None
    failures: dict[int, str] = {}
    prompt_logprobs: dict[int, list[msgspec.Raw]] = {}
    grammars: dict[int, GrammarState] = {}
    late: frozenset[int] = frozenset()


class Finish(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a sequence ended, and what it cost. Times in seconds; `stop_token_id` set when a token ended it.

    computed_tokens: rows of steps that were its; recomputed_tokens: of these, tokens that this core had computed
    before. steps: those with a row of it. kv_block_s: blocks that it held, times seconds. incomplete: it had a
    grammar, which had not ended.
    """

    reason: FinishReason
    message: str
    stop_token_id: int | None
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    queue_s: float
    prefill_s: float
    decode_s: float
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    steps: int = 0
    kv_block_s: float = 0.0
    incomplete: bool = False


class TokenDelta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one sequence, in order; `finish` is set exactly once, on the last delta.

    prompt_logprobs: entries of the next tokens of its prompt, each the MessagePack of a TokenLogprobs.
    """

    request_id: int
    sample: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: Finish | None
    prompt_logprobs: list[msgspec.Raw] | None = None
