"""Random traffic of several tenants, against a twin that recomputes counters and choices from what happened."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_traffic import EOS, Traffic

from cierzo.cache.config import CacheConfig
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import StepPlan
from cierzo.scheduler.request import NewRequest, Request, State
from cierzo.scheduler.tenants import Tenant

WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 0.5}  # powers of two: sums of such parts are exact
JUST_ABOVE = 1.0 + 1e-9


class Twin:
    """The rules once more, spelled out: every position by itself, every choice from all sequences there are.

    It is told of each event before it happens; it looks at sequences, and never at the books of `Tenants`.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.scheduler, self.limits, self.cache = traffic.scheduler, traffic.limits, traffic.cache
        self.counters: dict[str, float] = defaultdict(float)
        self.charged: dict[Request, set[int]] = defaultdict(set)
        self.last_turn = 0.0
        self.seen: Counter[str] = Counter()
        self.current: Request | None = None  # whose turn it is
        self.admits = False
        self.had_work: set[str] = set()
        self.past: set[Request] = set()
        self.prompts: list[Request] = []
        for owner in (self.scheduler._tenants, self.scheduler):
            for name in ("leave", "wait", "put_aside", "begin", "charge", "_append", "_preempt"):
                if hasattr(owner, name):
                    setattr(owner, name, self._told(getattr(owner, name), getattr(self, name.strip("_"))))
        tenants: Any = self.scheduler._tenants
        self._turns, self._victims = tenants.turns, tenants.victims
        tenants.turns, tenants.victims = self.turns, self.victims

    @staticmethod
    def _told(act: Any, tell: Any) -> Any:
        def call(*args: Any) -> Any:
            tell(*args)
            return act(*args)

        return call

    # --- what there is ---

    def live(self, name: str | None = None, state: State | None = None) -> list[Request]:
        alive = [one for one in self.scheduler.requests() if one.state is not State.ENDED]
        return [one for one in alive if name in (None, one.new.tenant) and state in (None, one.state)]

    def names(self) -> set[str]:
        return {one.new.tenant for one in self.live()}

    def time(self, but: str) -> float:
        return max([self.last_turn, min([self.counters[name] for name in self.names() - {but}], default=0.0)])

    def excess(self, name: str, slots: int = 0, blocks: int = 0) -> float:
        """Use of the room by a tenant, where 1 is its share; with so many slots and blocks more."""
        running = self.live(name, State.RUNNING)
        held = {block_id for one in running for block_id in one.blocks.block_ids}
        use = max((len(running) + slots) / self.limits.max_running, (len(held) + blocks) / self.cache.num_blocks)
        return use * sum(WEIGHTS[one] for one in self.names()) / WEIGHTS[name]

    def with_it(self, request: Request) -> float:
        num_running = len(self.live(state=State.RUNNING))
        return self.excess(request.new.tenant, 1, self.cache.blocks_for(len(request.tokens)) + num_running)

    # --- service ---

    def leave(self, tenant: Tenant) -> None:
        if not self.names():
            self.last_turn = max(self.last_turn, self.counters[tenant.name])

    def wait(self, request: Request) -> None:
        name = request.new.tenant
        if self.live(name, State.WAITING) == [request]:
            self.counters[name] = max(self.counters[name], self.time(but=name))

    def begin(self, request: Request) -> None:
        self.charged[request] |= {*range(request.num_computed)}

    def charge(self, request: Request, start: int, count: int, num_embeddings: int) -> None:
        if not count and not num_embeddings:
            return
        name, num_given = request.new.tenant, len(request.new.prompt_token_ids) + len(request.new.output_token_ids)
        positions = {*range(start, start + count)}
        if start + count == num_given - 1:
            positions.add(num_given - 1)  # it will be a decode row
        first = {one for one in positions if one < num_given} - self.charged[request]
        self.charged[request] |= positions
        self.last_turn = max(self.last_turn, self.counters[name])
        self.counters[name] += (len(first) + num_embeddings) / WEIGHTS[name]

    def append(self, request: Request, new: list[int], *_: object) -> None:
        self.counters[request.new.tenant] += 2.0 * len(new) / WEIGHTS[request.new.tenant]

    # --- turns ---

    def turns(self, prompts: list[Request], admits: bool) -> Twin:
        self.prompts, self.admits, self.real = [*prompts], admits, self._turns(prompts, admits)
        self.skipped: set[str] = set()
        self.past = set()
        self.late: set[str] = (
            set()
        )  # whose sequences were preempted for another: what they lost may wait for the next step
        self.had_work = {name for name in self.names() if self.eligible(name)}
        return self

    def __iter__(self) -> Iterator[tuple[Request, bool]]:
        for request, waits in self.real:
            name = request.new.tenant
            assert (self.eligible(name), waits) == (request, request.state is State.WAITING)
            others = [one for one in self.had_work - {name} - self.late if self.eligible(one)]
            assert all(self.rank(name) < self.rank(one) for one in others), f"{name} goes before {others}"
            self.seen["choices"] += bool(others)
            if not waits:
                self.prompts.remove(request)
            self.current = request
            yield request, waits
        self.current = None

    def eligible(self, name: str) -> Request | None:
        """The next of a tenant's: of the prompts that run the first, or else of those that wait."""
        for one in self.prompts:
            if one.new.tenant == name and one.state is State.RUNNING:
                return one
        waiting = [one for one in self.live(name, State.WAITING) if one not in self.past]
        is_open = self.admits and name not in self.skipped
        return min(waiting, key=lambda one: one.order) if waiting and is_open else None

    def rank(self, name: str) -> tuple[float, int, int]:
        """Place in the order. Of two who are even in all, the one that came first goes first."""
        number = self.scheduler._tenants._table[name].number
        return self.counters[name], len(self.live(name, State.RUNNING)), number

    def put_aside(self, request: Request) -> None:
        self.past.add(request)

    # --- room ---

    def skip(self, tenant: Tenant) -> None:
        """Who asks for more than its share beside what it has is passed over, and loses its credit. Whoever
        others would have to wait for longer than it is worth is passed over too, and keeps it."""
        assert self.current is not None
        self.refused(self.current)
        if self.live(tenant.name, State.RUNNING) and self.with_it(self.current) > JUST_ABOVE:
            self.seen["skips"] += 1
            self.counters[tenant.name] = max(self.counters[tenant.name], self.time(but=tenant.name))
        else:
            self.seen["passes"] += 1
            assert not self.is_worth_a_wait(self.current)
        self.skipped.add(tenant.name)
        self.real.skip(tenant)

    def refresh(self) -> None:
        self.real.refresh()

    def close(self) -> None:
        assert self.current is not None
        self.refused(self.current)
        assert len(self.names()) == 1 or self.is_worth_a_wait(self.current)
        self.admits = False
        self.real.close()

    def is_worth_a_wait(self, request: Request) -> bool:
        """Try each number of steps after which older sequences are sure to have ended."""
        running = self.live(state=State.RUNNING)
        older = [one for one in running if one.order[1] < request.order[1]]
        left = {one: one.stop.limit_tokens - len(one.tokens) for one in older}
        for steps in sorted({0, *left.values()}):
            there = [one for one in older if left[one] > steps]
            room = self.cache.num_blocks - sum(len(one.blocks.block_ids) + 1 for one in there)
            if len(there) < self.limits.max_running and self.cache.blocks_for(len(request.tokens)) <= room:
                return 2 * steps * len(running) <= len(request.tokens)
        raise AssertionError("it fits nowhere")

    def refused(self, request: Request) -> None:
        """Nobody waits beside room."""
        needed = self.cache.blocks_for(len(request.tokens)) + len(self.live(state=State.RUNNING))
        assert not self.scheduler._free_slots or needed > self.cache.num_free

    def victims(self, running: Any, slots: int, blocks: int) -> list[Request]:
        """Whoever takes room is at most at its share then; whoever gives it is above its own."""
        victims: list[Request] = self._victims(running, slots, blocks)
        assert self.current is not None
        assert self.with_it(self.current) <= JUST_ABOVE
        return victims

    def preempt(self, victim: Request) -> None:
        """The first in order is spared; the last of the tenant most above its share goes."""
        running = self.live(state=State.RUNNING)
        several = len({one.new.tenant for one in running}) > 1
        first = min(running, key=lambda one: one.order[1] if several else one.order)
        if victim in self.prompts:
            self.prompts.remove(victim)
        assert victim is not first or running == [first]
        left = [one for one in running if one is not first] or running
        mine = self.excess(victim.new.tenant)
        assert all(one.order <= victim.order for one in left if one.new.tenant == victim.new.tenant)
        if self.current is None:
            self.seen["growths"] += len({one.new.tenant for one in running}) > 1
            assert mine == max(self.excess(one.new.tenant) for one in left)
        else:
            self.seen["claims"] += 1
            self.late.add(victim.new.tenant)
            assert mine > 1.0

    # --- after each step ---

    def check(self, plan: StepPlan) -> None:
        table = self.scheduler._tenants._table
        for name in self.names():
            assert table[name].counter == self.counters[name], name
        for tenant in table.values():
            assert tenant.num_live or tenant.counter == self.counters[tenant.name], f"{tenant.name} lost its debt"
        has_tokens = plan.num_tokens < self.limits.budget_tokens
        if has_tokens and self.admits and len(self.names()) > 1 and not self.past:  # nobody has stopped admission
            assert {one.new.tenant for one in self.live(state=State.WAITING)} <= self.skipped | self.late
        self.current = None


class FairTraffic(Traffic):
    """Traffic of several tenants, watched by a twin."""

    def __init__(self, cache: CacheConfig, limits: SchedulerConfig) -> None:
        super().__init__(cache, limits)
        self.twin = Twin(self)

    def check_order(self, plan: StepPlan) -> None:
        counts = [len(seq.token_ids) for seq in plan.seqs]
        assert sum(counts) == plan.num_tokens <= self.limits.budget_tokens
        assert all(counts)
        assert len({seq.key for seq in plan.seqs}) == len(plan.seqs) <= self.limits.max_running
        assert plan.seqs or not self.scheduler.has_work(), "there is work, and nothing is done"
        self.twin.check(plan)


def _add(traffic: FairTraffic, rng: random.Random, request_id: int, prompts: list[list[int]]) -> None:
    """Add a request of some tenant's, of one or two samples."""
    name, n, max_tokens = rng.choice(["a", "a", "a", "b", "c", "d"]), rng.choice((1, 1, 2)), rng.randint(1, 14)
    prompt = tuple(rng.choice(prompts)[: traffic.limits.max_model_len])
    for sample in range(n):
        traffic.add(
            NewRequest(
                request_id=request_id,
                sample=sample,
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=max_tokens, seed=sample, n=n),
                eos_token_ids=(EOS,),
                priority=rng.randint(0, 2),
                deadline_at_s=traffic.now + rng.randint(1, 20) if rng.random() < 0.1 else None,
                tenant=name,
                weight=WEIGHTS[name],
                salt=name.encode() if rng.random() < 0.5 else b"",
            )
        )


def _run(seed: int) -> Counter[str]:
    """Run a load; return what happened how often."""
    rng = random.Random(seed)
    block_tokens, num_blocks, max_running = rng.randint(1, 3), rng.randint(6, 24), rng.randint(2, 6)
    traffic = FairTraffic(
        CacheConfig(block_tokens=block_tokens, num_blocks=num_blocks, prefix_caching=rng.random() < 0.8),
        SchedulerConfig(
            budget_tokens=rng.randint(max_running, 14),
            max_chunk_tokens=rng.randint(1, 6),
            max_running=max_running,
            max_waiting=30,
            max_model_len=block_tokens * num_blocks,
            priority_aging_s=2.0,
        ),
    )
    prompts = [[rng.randint(0, 1) for _ in range(rng.randint(1, 4 * block_tokens + 1))] for _ in range(4)]
    for request_id in range(rng.randint(4, 16)):
        _add(traffic, rng, request_id, prompts)
        for _ in range(rng.choice((0, 0, 1, 2, 6))):
            fail = rng.randrange(4) if rng.random() < 0.05 else None
            traffic.step(abort=rng.randrange(request_id + 1) if rng.random() < 0.05 else None, fail=fail)
    traffic.finish()
    assert not traffic.scheduler._tenants._active
    return traffic.twin.seen


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_counters_and_choices_are_the_twin_s(seed: int) -> None:
    _run(seed)


def test_every_kind_of_choice_is_tried() -> None:
    seen: Counter[str] = sum((_run(seed) for seed in range(60)), Counter())
    assert min(seen[kind] for kind in ("choices", "skips", "claims", "growths", "passes")) >= 10, seen
