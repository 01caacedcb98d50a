"""Tenants: what each was served, who is next, and who holds more of the machine than its share.

Service is counted as in "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024): a virtual token
counter for each tenant, service received divided by weight, and the least counter goes first. Virtual time is the
level that the counters have reached. Whoever begins to wait is lifted to it, so that nobody gains credit by asking
for little; who was served beyond it keeps the debt. Not in the paper: turns within a step, and shares of the room.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter

from cierzo.scheduler import policy
from cierzo.scheduler.queue import RequestHeap
from cierzo.scheduler.request import Request, State


@dataclass(slots=True, eq=False)
class Tenant:
    """Books of a tenant. `Tenants` keeps them; the scheduler adds tokens to `counter` and new blocks to `held`."""

    name: str
    number: int  # unique, by first arrival
    weight: float
    counter: float = 0.0  # service received, each part divided by the weight of its time
    token_charge: float = 0.0  # what a generated token adds to it
    num_live: int = 0  # sequences
    num_running: int = 0
    num_aside: int = 0  # that wait, and are out of `waiting` for a moment
    waiting: RequestHeap = field(default_factory=RequestHeap)
    held: dict[int, int] = field(default_factory=dict)  # block -> its running sequences that hold it

    def hold(self, block_ids: Iterable[int]) -> None:
        """Count blocks that one more of its running sequences holds."""
        held = self.held
        for block_id in block_ids:
            held[block_id] = held.get(block_id, 0) + 1

    def rank(self) -> tuple[float, int, int]:
        """Place in the order of turns, least first; among equals whoever has fewer running goes first."""
        return self.counter, self.num_running, self.number


class Tenants:
    """The table of tenants, with their queues. It keeps those that have sequences, and those in debt."""

    def __init__(self, max_running: int, all_blocks: int) -> None:
        self._table: dict[str, Tenant] = {}
        self._max_running, self._all_blocks = max_running, all_blocks
        self._num_arrivals = 0
        self.num_waiting = 0  # sequences
        self._active: dict[Tenant, None] = {}  # those with live sequences
        self._last_turn = 0.0  # the counter with which the last turn was taken

    # --- sequences come and go ---------------------------------------------------------------------------------

    def arrive(self, name: str, weight: float) -> Tenant:
        """Count a sequence that was accepted; its tenant, whose weight is `weight` from now on."""
        tenant = self._table.get(name)
        if tenant is None:
            self._drop_even()
            tenant = self._table[name] = Tenant(name, self._num_arrivals, weight)
            self._num_arrivals += 1
        tenant.weight, tenant.token_charge = weight, policy.GENERATED_CHARGE / weight
        tenant.num_live += 1
        self._active[tenant] = None
        return tenant

    def leave(self, tenant: Tenant) -> None:
        """Count a sequence that has ended."""
        tenant.num_live -= 1
        if tenant.num_live:
            return
        del self._active[tenant]
        if not self._active:
            self._last_turn = max(self._last_turn, tenant.counter)
        if tenant.counter <= self.virtual_time():
            del self._table[tenant.name]

    def _drop_even(self) -> None:
        """Forget whoever has no sequences and no debt any more."""
        now = self.virtual_time()
        for tenant in [*self._table.values()]:
            if not tenant.num_live and tenant.counter <= now:
                del self._table[tenant.name]

    @property
    def are_several(self) -> bool:
        """Whether more than one tenant has sequences."""
        return len(self._active) > 1

    # --- service -----------------------------------------------------------------------------------------------

    def virtual_time(self, but: Tenant | None = None) -> float:
        """The level of the counters: that of the last turn, or the least of all who have sequences, if it is more.
        but: a tenant that is not asked."""
        counters = [tenant.counter for tenant in self._active if tenant is not but]
        return max(self._last_turn, min(counters)) if counters else self._last_turn

    def charge(self, request: Request, start: int, count: int, num_embeddings: int = 0) -> None:
        """Charge a chunk to its tenant, but for what had been computed or charged before; and embeddings of images
        that are made for it."""
        if not count and not num_embeddings:
            return
        tenant = request.tenant
        num_given = request.num_prompt_tokens + len(request.new.output_token_ids)
        tokens, request.num_charged = policy.first_computed(start, count, request.num_charged, num_given)
        self._last_turn = max(self._last_turn, tenant.counter)
        tenant.counter += (tokens + policy.EMBEDDING_CHARGE * num_embeddings) / tenant.weight

    def lift(self, tenant: Tenant) -> None:
        """Take away what credit a tenant gathered while it asked for nothing or filled its share of the room."""
        tenant.counter = max(tenant.counter, self.virtual_time(but=tenant))

    # --- the queue ---------------------------------------------------------------------------------------------

    def waiting(self) -> Iterator[Request]:
        """Sequences that wait, tenant by tenant."""
        return (request for tenant in self._active for request in tenant.waiting)

    def wait(self, request: Request) -> None:
        """Let a sequence wait; a tenant that had none waiting is lifted."""
        if not request.tenant.waiting and not request.tenant.num_aside:
            self.lift(request.tenant)
        self._push(request)

    def put_aside(self, request: Request) -> None:
        """Take a sequence out of the queue for a moment; it counts as waiting all the same."""
        self.discard(request)
        request.tenant.num_aside += 1

    def put_back(self, request: Request) -> None:
        """Let a sequence that was put aside wait on, in its old place."""
        request.tenant.num_aside -= 1
        self._push(request)

    def _push(self, request: Request) -> None:
        request.tenant.waiting.push(request, request.order)
        self.num_waiting += 1

    def discard(self, request: Request) -> None:
        """Take a sequence out of the queue, if it is there."""
        self.num_waiting -= request.tenant.waiting.discard(request)

    def turns(self, prompts: Iterable[Request], admits: bool) -> Turns:
        """The turns of a step. prompts: those that run, in order. admits: whether those that wait have turns."""
        return Turns(prompts, [tenant for tenant in self._active if tenant.waiting] if admits else [])

    # --- room --------------------------------------------------------------------------------------------------

    def begin(self, request: Request) -> None:
        """Count slot and blocks of a sequence that begins to run. What it found is free."""
        request.num_charged = max(request.num_charged, request.num_computed)
        request.tenant.num_running += 1
        request.tenant.hold(request.blocks.block_ids)

    def end(self, request: Request) -> None:
        """Take them away again; to be called while the sequence still has its blocks."""
        tenant = request.tenant
        tenant.num_running -= 1
        held = tenant.held
        for block_id in request.blocks.block_ids:
            if held[block_id] == 1:
                del held[block_id]
            else:
                held[block_id] -= 1

    def excess(self, tenant: Tenant, num_running: int, num_blocks: int) -> float:
        """By how much such a use of the room is above the tenant's share, as a multiple: 1.0 is its share."""
        use = policy.use_of_room(num_running, self._max_running, num_blocks, self._all_blocks)
        return use * sum(one.weight for one in self._active) / tenant.weight

    def excesses(self) -> dict[Tenant, float]:
        """The excess of each tenant that has sequences."""
        return {one: self.excess(one, one.num_running, len(one.held)) for one in self._active}

    def has_a_claim(self, request: Request, num_blocks: int) -> bool:
        """Whether its tenant would be at most at its share of the room with a sequence of `num_blocks` more. Blocks
        that it would find count too: nobody whom a claim has let in is then above its share."""
        tenant = request.tenant
        with_it = self.excess(tenant, tenant.num_running + 1, len(tenant.held) + num_blocks)
        return with_it <= 1.0 + policy.ROUNDING

    def victims(self, running: Collection[Request], slots: int, blocks: int) -> list[Request]:
        """Whom to preempt to gain so many slots and blocks: of the tenant most above its share the last in order,
        and again, while one is above it. Empty if all of them were not enough. One is spared (`policy.spared`).
        """
        left: dict[Tenant, list[Request]] = {}
        spared = policy.spared(running)
        for request in sorted(running, key=lambda request: request.order):
            if request is spared:
                continue
            left.setdefault(request.tenant, []).append(request)
        uses = {one: (one.num_running, len(one.held)) for one in left}
        victims: list[Request] = []
        while slots > 0 or blocks > 0:
            excesses = [(self.excess(one, *uses[one]), one) for one in left]
            excess, most = max(excesses, key=itemgetter(0), default=(0.0, None))
            if most is None or excess <= 1.0 + policy.ROUNDING:
                return []
            victim = left[most].pop()
            if not left[most]:
                del left[most]
            victims.append(victim)
            num_blocks = len(victim.blocks.block_ids)
            uses[most] = uses[most][0] - 1, uses[most][1] - num_blocks
            slots, blocks = slots - 1, blocks - num_blocks
        return victims

    def may_close(self, request: Request, running: Collection[Request], blocks_for: Callable[[int], int]) -> bool:
        """Whether nobody else is admitted until a waiting sequence fits. With one tenant nobody passes anybody.
        With several, others pass it as long as it has to wait for those that came before it for longer than it is
        worth: for more service to those that run than it has tokens itself. Their `max_tokens` tells how long."""
        if not self.are_several:
            return True
        older = [one for one in running if one.order[1] < request.order[1]]
        older.sort(key=lambda one: one.stop.limit_tokens - len(one.tokens))
        slots, steps = self._max_running - len(older), 0
        blocks = (
            self._all_blocks - policy.reserve_blocks(len(older)) - sum(len(one.blocks.block_ids) for one in older)
        )
        for one in older:
            if slots > 0 and blocks >= blocks_for(len(request.tokens)):
                break
            slots, blocks = slots + 1, blocks + 1 + len(one.blocks.block_ids)
            steps = one.stop.limit_tokens - len(one.tokens)
        return steps * len(running) * policy.GENERATED_CHARGE <= len(request.tokens)

    # --- invariants --------------------------------------------------------------------------------------------

    def check(self, live: Iterable[Request], running: Iterable[Request]) -> None:
        """Assert that the books agree with the sequences there are."""
        num_live = Counter(request.tenant.name for request in live)
        num_running = Counter(request.tenant.name for request in running)
        held: dict[str, Counter[int]] = {}
        for request in running:
            held.setdefault(request.tenant.name, Counter()).update(request.blocks.block_ids)
        for name, tenant in self._table.items():
            books = (tenant.num_live, tenant.num_running, tenant.held)
            assert books == (num_live[name], num_running[name], held.get(name, Counter())), f"{name}: {books}"
            assert (tenant in self._active) == (tenant.num_live > 0), name
            assert math.isfinite(tenant.counter), f"{name}: {tenant.counter}"
        assert num_live.keys() <= self._table.keys(), f"tenants without books: {num_live.keys()}"
        assert all(self._table[request.tenant.name] is request.tenant for request in live), "a tenant kept twice"
        assert self.num_waiting == sum(1 for _ in self.waiting()), f"{self.num_waiting} wait"


class Turns:
    """Turns of a step's prompts: next is the tenant with the least counter, its first running prompt, or else its
    first that waits. Each prompt has one turn, and is charged before the next turn is asked for."""

    def __init__(self, prompts: Iterable[Request], admitting: Iterable[Tenant]) -> None:
        self._prompts: dict[Tenant, deque[Request]] = {}
        for request in prompts:
            self._prompts.setdefault(request.tenant, deque()).append(request)
        self._admitting = dict.fromkeys(admitting)
        self._heap = [(one.rank(), one) for one in self._prompts | self._admitting]
        heapq.heapify(self._heap)

    def __iter__(self) -> Iterator[tuple[Request, bool]]:
        """Yield (sequence, whether it waits)."""
        while self._heap:
            tenant = heapq.heappop(self._heap)[1]
            prompts = self._prompts.get(tenant, ())
            while prompts and prompts[0].state is not State.RUNNING:
                prompts.popleft()  # preempted in this step
            if prompts:
                yield prompts.popleft(), False
            elif tenant in self._admitting and (entry := tenant.waiting.first()) is not None:
                yield entry[2], True
            else:
                continue
            heapq.heappush(self._heap, (tenant.rank(), tenant))

    def refresh(self) -> None:
        """Take notice of preemptions, which change ranks."""
        self._heap = [(tenant.rank(), tenant) for _, tenant in self._heap]
        heapq.heapify(self._heap)

    def skip(self, tenant: Tenant) -> None:
        """Admit no more of a tenant's in this step."""
        self._admitting.pop(tenant, None)

    def close(self) -> None:
        """Admit nobody more in this step."""
        self._admitting.clear()
