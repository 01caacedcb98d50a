"""The scheduler's choices, as pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from cierzo.scheduler.cost import StepCost
from cierzo.scheduler.images import MissingImage
from cierzo.scheduler.plan import entry_bytes
from cierzo.scheduler.request import Request

if TYPE_CHECKING:
    from cierzo.scheduler.tenants import Tenant

MAX_LOOKED_PAST = 64  # waiting sequences in one step, each asked once; more, and a step would be spent on asking
PRICED_STRIDE = 16  # of steps that only decode, with nobody waiting, one in so many is priced: they are much alike
HOPELESS = 2.0  # a prompt is given up when it takes, by prediction, so many times the seconds that it has left
# Service in units of a prompt token: what a generated one counts for in "Fairness in Serving Large Language Models"
# (Sheng et al., OSDI 2024), whose virtual token counter `Tenants` keeps.
GENERATED_CHARGE = 2.0
# An image token that the tower makes an embedding of, beside the prompt token that it is: Small 4's largest image
# takes 24 TFLOP in the tower, and 40 in the text model.
EMBEDDING_CHARGE = 1.0
SCORED_BYTES = 256 << 10  # of log-probabilities of a prompt in a step
ROUNDING = 1e-9  # of shares, which are sums of fractions


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


def missing(request: Request) -> int:
    """Tokens that the next chunk of a request may have: all that it lacks, or, where a prompt's log-probabilities
    are wanted, as many as give SCORED_BYTES of these. A reader who stalls has no more to come than that."""
    start, num_missing = request.num_planned, len(request.tokens) - request.num_planned
    if not request.is_scored:
        return num_missing
    num_bytes = entry_bytes(request.new.sampling.prompt_logprobs or 0)
    return min(num_missing, max(request.num_scored - start, 0) + SCORED_BYTES // num_bytes)


def reserve_blocks(num_running: int) -> int:
    """Blocks that an admission must leave free: one for each running sequence to grow into.

    Without it an admission could take the last blocks, only to be preempted at the next step.
    """
    return num_running


def is_hopeless(request: Request, cost: StepCost | None, now: float, lacking: Iterable[MissingImage] = ()) -> bool:
    """Whether a prompt is sure to miss its deadline: what is left of it would take more than HOPELESS times the
    seconds that are left, if it had the machine to itself. lacking: images that it needs made."""
    deadline_at_s = request.new.deadline_at_s
    if deadline_at_s is None or cost is None:
        return False
    least_s = cost.prompt_seconds(request.num_planned, len(request.tokens))
    if lacking:
        least_s += sum(one.share * cost.image_s(one.image.num_embeddings) for one in lacking)
    return least_s > HOPELESS * (deadline_at_s - now)


def spared(running: Collection[Request]) -> Request:
    """The sequence that is not preempted while others run, hence it always advances, and each gets to be it: the
    first in the waiting order; of several tenants' the first that arrived, as priorities order a tenant's own."""
    several = len({request.tenant for request in running}) > 1
    return min(running, key=lambda request: request.order[1] if several else request.order)


def choose_victim(running: Collection[Request], excess: Mapping[Tenant, float]) -> Request:
    """Whom to preempt when a running sequence grows: of the tenant most above its share of the room, by `excess`,
    the last in the waiting order, but not the one that is spared unless it is alone."""
    first = spared(running)
    others = [request for request in running if request is not first] or [first]
    most = max((request.tenant for request in others), key=lambda tenant: (excess[tenant], tenant.number))
    return max((request for request in others if request.tenant is most), key=lambda request: request.order)


# --- shares between tenants ------------------------------------------------------------------------------------


def first_computed(start: int, count: int, num_charged: int, num_given: int) -> tuple[int, int]:
    """Tokens of a chunk that are computed for the first time, and `num_charged` from then on.

    num_charged: leading positions that were charged before, or found by then. num_given: tokens that the request
    came with; those behind them were charged when they were generated. A last one that remains alone will be a
    decode row, which nobody charges: it is charged with the chunk before it.
    """
    end = start + count
    if end == num_given - 1:
        end = num_given
    first, end = max(start, num_charged), min(end, num_given)
    return max(0, end - first), max(num_charged, end)


def use_of_room(num_running: int, max_running: int, num_blocks: int, all_blocks: int) -> float:
    """Part of the machine that a tenant holds: of its slots or of its blocks, whichever is more."""
    return max(num_running / max_running, num_blocks / all_blocks)
