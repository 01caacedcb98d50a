"""The scheduler's choices, as pure functions."""

from __future__ import annotations

from collections.abc import Iterable

from cierzo.scheduler.request import Request

MAX_LOOKED_PAST = 64  # waiting sequences in one step, each asked once; more, and a step would be spent on asking
PRICED_STRIDE = 16  # of steps that only decode, with nobody waiting, one in so many is priced: they are much alike
HOPELESS = 2.0  # a prompt is given up when it takes, by prediction, so many times the seconds that it has left


def waiting_order(arrived_at: float, priority: int, priority_aging_s: float, sequence: int) -> tuple[float, int]:
    """Place in the queue, least first. `sequence` counts arrivals and breaks ties.

    A level of priority is worth `priority_aging_s` seconds of arrival, so that no level starves: whoever arrives
    later than that comes after. A preempted request keeps its place, ahead of all who arrived after it.
    """
    return arrived_at + priority * priority_aging_s, sequence


def chunk_tokens(num_missing: int, budget_tokens: int, max_chunk_tokens: int, contended: bool) -> int:
    """How many of a prompt's `num_missing` tokens to compute in this step, of the budget that is left.

    Alone, as many as the budget allows. Beside others, a prompt that does not fit in `max_chunk_tokens` is cut
    to it, and to half of what is left, so that something always remains for those behind it: a 256k prompt
    cannot stop short ones, and neither can two.
    """
    if contended and num_missing > max_chunk_tokens:
        return min(max_chunk_tokens, (budget_tokens + 1) // 2)
    return min(num_missing, budget_tokens)


def reserve_blocks(num_running: int) -> int:
    """Blocks that an admission must leave free: one for each running sequence to grow into.

    Without it an admission could take the last blocks, only to be preempted at the next step.
    """
    return num_running


def choose_victim(running: Iterable[Request]) -> Request:
    """Whom to preempt: the last in the waiting order. The first one is never chosen while others run, hence it
    always advances, and each gets to be the first."""
    return max(running, key=lambda request: request.order)
