"""Figures that a core tells of itself, as they cross a socket; `messages` has the rest."""

from __future__ import annotations

import msgspec

from cierzo.engine.expert_statistics import ExpertStatistics


class CoreStats(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False
):
    """Gauges and counters of scheduler and cache, as the core last published them.

    computed_tokens, recomputed_tokens, sequence_steps, kv_block_s: sums of what `Cost` says of each request.
    waiting_tokens: known tokens of running and waiting sequences that are not computed yet. prefill_tokens_per_s:
    rate at which steps with prompts in them computed their tokens of late; 0 before the first one. step_s: time of
    a step of late. prompt_row_s, prompt_pair_s: predicted seconds of a prompt's token, and of a pair of one and one
    before it; 0 while no price is known. prefill_share: such seconds of work a second of the steps with prompts in
    them, of late. max_chunk_tokens: longer prompts leave half a step to others. Version 2 has none of these.
    experts: which ones the tokens of all its steps chose; None where they are not counted.
    """

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    sequence_steps: int = 0
    kv_block_s: float = 0.0
    waiting_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0
    prompt_row_s: float = 0.0
    prompt_pair_s: float = 0.0
    prefill_share: float = 0.0
    max_chunk_tokens: int = 0
    experts: ExpertStatistics | None = None
