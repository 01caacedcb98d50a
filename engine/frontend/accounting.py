"""The sum of what a request's runs cost. Pure."""

from __future__ import annotations

from cierzo.engine.messages import Cost, Finish


def add_run(cost: Cost, finish: Finish, computed_before: int) -> Cost:
    """`cost`, and what a core reported of one sample's run.

    computed_before: positions of the sample that runs before this one have computed for sure; 0 in a first run.
    Those that this run computed too, rather than find them in the prefix cache, count as recomputed: its rows less
    those of new positions. The core itself counts what it computed twice within a run.
    """
    once = finish.computed_tokens - finish.recomputed_tokens
    reached = finish.prompt_tokens + finish.output_tokens - 1
    again = min(once - max(0, reached - computed_before), computed_before - finish.cached_tokens)
    return Cost(
        computed_tokens=cost.computed_tokens + finish.computed_tokens,
        recomputed_tokens=cost.recomputed_tokens + finish.recomputed_tokens + max(0, again),
        steps=cost.steps + finish.steps,
        preemptions=cost.preemptions + finish.preemptions,
        kv_block_s=cost.kv_block_s + finish.kv_block_s,
    )
