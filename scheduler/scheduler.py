"""The scheduler: decides what each step computes, and owns every request from arrival to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from cierzo.cache.manager import KVCacheManager
from cierzo.scheduler import policy
from cierzo.scheduler.accounts import Accounts, SchedulerStats
from cierzo.scheduler.budget import StepBudget
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.cost import StepCost
from cierzo.scheduler.images import EmbeddingBook
from cierzo.scheduler.plan import (
    PENDING,
    Constraint,
    FinishReason,
    RequestKey,
    SeqPlan,
    StepPlan,
    StepResult,
    TokenDelta,
    TokenLogprobs,
)
from cierzo.scheduler.queue import GrammarGate, RequestHeap, SiblingGate
from cierzo.scheduler.request import DuplicateRequest, NewRequest, QueueFull, Request, State
from cierzo.scheduler.tenants import Tenants, Turns


class Scheduler:
    """Continuous batching on a budget of tokens and predicted seconds (`StepBudget`).

    A step computes, for each request in it, some of (known tokens - computed tokens): see `plan.py`. Calls come
    from one thread: `add` and `abort` at any moment, `schedule` and `commit` once per step, `take_deltas` after.
    One more step may be scheduled before the one in flight is committed: it takes for granted that every sequence
    goes on, and what it computes for one that does not is dropped. Memory that is freed meanwhile may be given away
    at once, as a device runs its steps in order.

    A subclass in bench/virtual.py takes many decode steps at once, and says which of the state it touches.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: KVCacheManager,
        clock: Callable[[], float] = time.monotonic,
        cost: StepCost | None = None,
    ) -> None:
        """cost: the price of a step; without one, chunks are cut by tokens alone (`reprice` gives one later)."""
        config.require(cache.num_blocks * cache.block_tokens)
        self._config = config
        self._cache = cache
        self._clock = clock
        self._live: dict[int, dict[int, Request]] = {}  # request id -> sample -> request
        self._running: dict[RequestKey, Request] = {}  # in admission order
        self._tenants = Tenants(config.max_running, cache.num_blocks)
        self._images = EmbeddingBook(config.image_cache_tokens, config.image_stages)
        self._gate = SiblingGate()
        self._grammar_gate = GrammarGate()
        self._deadlines = RequestHeap()
        self._free_slots = list(range(config.max_running - 1, -1, -1))  # a stack
        self._deltas: list[TokenDelta] = []
        self._num_arrivals = self._num_epochs = self._num_steps = self.num_finished = 0
        self._blocked = False  # whoever waits found no room, and nothing has changed since
        self._accounts, self._cost, self._predicted_s = Accounts(), cost, 0.0

    def reprice(self, cost: StepCost) -> None:
        """Cut chunks by another price from the next step on. No bit of any result depends on it."""
        self._cost = cost

    # --- requests in and out -----------------------------------------------------------------------------------

    def add(self, new: NewRequest) -> None:
        """Accept a sequence: from now on it ends exactly once, in a delta with `finish`.

        Raises QueueFull, DuplicateRequest; ValueError as of NewRequest.require.
        """
        self._refuse(new)
        tokens = [*new.prompt_token_ids, *new.output_token_ids]
        arrived_at = self._clock() if new.arrival_s is None else new.arrival_s
        order = policy.waiting_order(arrived_at, new.priority, self._config.priority_aging_s, self._num_arrivals)
        blocks = self._cache.open(tokens, len(new.prompt_token_ids), new.salt, new.images)
        tenant = self._tenants.arrive(new.tenant, new.weight)
        request = Request.of(new, tokens, blocks, tenant, order, arrived_at, self._config.max_model_len)
        self._num_arrivals += 1
        self._live.setdefault(new.request_id, {})[new.sample] = request
        if new.constraint is None and self._ends_on_arrival(request):
            return
        if new.deadline_at_s is not None:
            self._deadlines.push(request, (new.deadline_at_s, order[1]))
        if new.constraint is not None:
            self._grammar_gate.enter(request)
        else:
            self._arrive(request)

    def release(self, key: RequestKey, constraint: Constraint) -> None:
        """Let a sequence queue whose grammar is made, or end it as that says. Nothing happens if it is over."""
        request = self._grammar_gate.made(key, constraint)
        if request is None:
            return
        request.grammar = constraint.state
        if constraint.error:
            self._finish(request, "failed", constraint.error)
        elif not self._ends_on_arrival(request):
            self._arrive(request)

    @property
    def is_held_up(self) -> bool:
        """Whether there are sequences, and all that could go on wait for their grammars or a mask."""
        return bool(self._live) and all(one.is_held or one.is_late for one in self.requests())

    def abort(self, request_id: int, sample: int | None = None, reason: FinishReason = "cancelled") -> int:
        """End one sample, or all of a request, now: how many ended. Unknown ones (already over) count nothing."""
        samples = self._live.get(request_id, {})
        ended = [request for number, request in samples.items() if sample in (None, number)]
        for request in ended:
            self._finish(request, reason)
        return len(ended)

    def take_deltas(self) -> list[TokenDelta]:
        """Everything that happened since the last call, in order."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def has_work(self) -> bool:
        """Whether any accepted sequence has not ended."""
        return bool(self._live)

    def requests(self) -> Iterator[Request]:
        """All live sequences, by arrival of their request; to be read."""
        return (request for samples in self._live.values() for request in samples.values())

    def stats(self) -> SchedulerStats:
        """Gauges and counters of this moment."""
        live = [*self._running.values(), *self._tenants.waiting()]
        return self._accounts.stats(
            running=len(self._running),
            waiting=self._num_waiting,
            waiting_tokens=sum(len(one.tokens) - one.num_computed for one in live),
            steps=self._num_steps,
            finished=self.num_finished,
        )

    # --- one step ----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next step: tokens to decode first, then prompts that run, then prompts that wait.

        Every plan is committed, in order: whole, or its sequences in several parts.
        """
        now = self._clock()
        self._expire(now)
        preemptions = self._accounts.preemptions
        self._images.begin_step()
        decodes, prefills, num_pending = self._plan_decodes()
        prefills = [request for request in prefills if request.state is State.RUNNING]
        is_priced = bool(prefills or self._tenants.num_waiting or self._num_steps % policy.PRICED_STRIDE == 0)
        context = sum([seq.start for seq in decodes.values()]) + len(decodes) if is_priced else 0
        budget = StepBudget(self._config, self._cost, decodes.values(), context, len(prefills), self._images)
        # after a preemption there is no room, and nobody is admitted
        if prefills or self._tenants.num_waiting:
            self._plan_prompts(prefills, budget, now, admits=preemptions == self._accounts.preemptions)
        seqs = budget.seqs
        ahead = num_pending > 0 and PENDING in [seq.token_ids[-1] for seq in seqs]
        self._num_steps += 1
        work = budget.work() if is_priced else None
        if work is not None and seqs and self._cost is not None:
            self._predicted_s = self._cost.seconds(work)
        num_tokens = self._config.budget_tokens - budget.tokens
        images = self._images.take_changes(is_empty=not seqs)
        return StepPlan(self._num_steps, seqs, num_tokens, ahead, work, self._predicted_s, *images)

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Take in what a step produced. Results of sequences that ended or were preempted since are dropped. Who
        then is past a deadline ends with this step, not with the next.

        Raises ValueError if the result does not fit the plan.
        """
        if len(result.token_ids) != len(plan.seqs):
            raise ValueError(f"{len(result.token_ids)} results for a plan of {len(plan.seqs)} sequences")
        now = self._clock()
        running, failures, logprobs, late = self._running, result.failures, result.logprobs, result.late
        num_tokens, num_seqs = plan.num_tokens, len(plan.seqs)
        for index, seq in enumerate(plan.seqs):
            request = running.get(seq.key)
            if request is None or request.epoch != seq.epoch or request.num_computed != seq.start:
                num_tokens, num_seqs = num_tokens - len(seq.token_ids), num_seqs - 1
                continue
            if failures and index in failures:
                num_tokens, num_seqs = num_tokens - len(seq.token_ids), num_seqs - 1
                self._finish(request, "failed", failures[index])
                continue
            is_late = index in late
            request.num_computed = computed = seq.start + len(seq.token_ids) - is_late
            if computed >= request.blocks.next_index_tokens:
                self._cache.index(request.blocks, computed)
            if seq.scoring is not None:
                entries = result.prompt_logprobs[index]
                request.num_scored = seq.scoring.start + len(entries)
                self._deltas.append(TokenDelta(*request.key, [], None, None, entries))
            if is_late:
                request.wait_for_mask()
            elif seq.samples:
                if request.grammar is not None:
                    request.grammar = result.grammars[index]
                self._append(request, result.token_ids[index], logprobs[index] if logprobs else None, now)
            else:
                request.spent.other_steps += 1
        self._accounts.computed_tokens += num_tokens
        self._accounts.sequence_steps += num_seqs
        self._expire(now)

    def revise(self, plan: StepPlan) -> StepPlan:
        """A plan that has to be run again, once every plan before it is committed: of what still runs, with the
        tokens that were PENDING. A sequence that was late got none, and is left out."""
        running = ((self._running.get(seq.key), seq) for seq in plan.seqs)
        revised = (request.revised(seq) for request, seq in running if request is not None)
        seqs = [seq for seq in revised if seq is not None]
        return StepPlan(plan.step, seqs, sum(len(seq.token_ids) for seq in seqs))

    def check(self) -> None:
        """Assert every invariant of scheduler and cache. O(tokens): for tests and idle moments."""
        live = {request.key: request for request in self.requests()}
        for request in live.values():
            places = (request.key in request.tenant.waiting, request.key in self._running)
            assert places == (request.state is State.WAITING, request.state is State.RUNNING), request
            request.check()
        assert len(live) == len(self._running) + self._num_waiting, live
        slots = [*self._free_slots, *(request.slot for request in self._running.values())]
        assert sorted(slots) == list(range(self._config.max_running)), f"slots {slots}"
        assert all(live.get(request.key) is request for request in self._deadlines), "a dead request has a deadline"
        self._gate.check(live)
        self._grammar_gate.check(live)
        self._tenants.check(live.values(), self._running.values())
        self._images.check([*self._running.values()])
        self._cache.check(request.blocks for request in self._running.values())

    # --- arrival -----------------------------------------------------------------------------------------------

    @property
    def _num_waiting(self) -> int:
        return self._tenants.num_waiting + len(self._gate) + len(self._grammar_gate)

    def _refuse(self, new: NewRequest) -> None:
        """Raise if the sequence cannot be accepted."""
        if new.sample in self._live.get(new.request_id, {}):
            raise DuplicateRequest(f"request {(new.request_id, new.sample)} is still alive")
        new.require(self._config.max_model_len)
        if self._num_waiting >= self._config.max_waiting:
            raise QueueFull(f"{self._config.max_waiting} sequences are waiting (max_waiting)")

    def _ends_on_arrival(self, request: Request) -> bool:
        """A resumed sequence may be complete already, and a prompt may leave no room for a token."""
        reason, stop_token_id = request.complete()
        if reason is not None:
            self._finish(request, reason, stop_token_id=stop_token_id)
        return reason is not None

    def _arrive(self, request: Request) -> None:
        """Queue a newcomer, unless another sample of its request computes their prompt."""
        if request.new.sampling.n == 1 or not self._cache.prefix_caching or self._gate.enter(request):
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        if request.state is not State.WAITING:
            request.move(State.WAITING)
        self._tenants.wait(request)
        self._blocked = False

    # --- planning ----------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        """End every sequence whose deadline has passed."""
        while (entry := self._deadlines.first()) is not None and entry[0] <= now:
            self._finish(entry[2], "deadline")

    def _plan_decodes(self) -> tuple[dict[RequestKey, SeqPlan], list[Request], int]:
        """Plans of all running sequences that lack one token, and the others, both in admission order; how many
        tokens steps in flight are about to choose.

        `max_running` is at most the budget, so that these always fit in it. A sequence that a step in flight is
        sure to end is in neither.
        """
        plans: dict[RequestKey, SeqPlan] = {}
        others: list[Request] = []
        all_pending = 0
        for request in [*self._running.values()]:
            if request.state is not State.RUNNING:
                continue  # preempted by one before it
            start, tokens, blocks = request.num_planned, request.tokens, request.blocks
            if request.is_late and not request.has_mask():
                continue
            pending = request.num_pending
            all_pending += pending
            num_tokens = len(tokens) + pending
            if num_tokens >= request.stop.limit_tokens:
                continue
            if num_tokens - start != 1:
                others.append(request)
                continue
            new_block_ids: list[int] = []
            if start >= blocks.capacity_tokens:
                grown = self._grow(request, start + 1, plans)
                if grown is None:
                    continue
                new_block_ids = grown
            key = request.key
            request.num_planned += 1
            request.num_pending += 1
            token_ids, num_prompt = [tokens[start] if start < len(tokens) else PENDING], request.num_prompt_tokens
            plans[key] = SeqPlan(
                key, request.slot, request.epoch, start, token_ids, num_prompt, new_block_ids, True, None
            )
        return plans, others, all_pending

    def _grow(self, request: Request, num_tokens: int, plans: dict[RequestKey, SeqPlan]) -> list[int] | None:
        """Blocks for `num_tokens` tokens, preempting for them if need be; None if `request` itself had to go."""
        while (new := self._cache.allocate(request.blocks, num_tokens)) is None:
            victim = policy.choose_victim(self._running.values(), self._tenants.excesses())
            self._preempt(victim)
            plans.pop(victim.key, None)
            if victim is request:
                return None
        self._accounts.hold(request, len(request.blocks.block_ids) - len(new), self._clock())
        request.tenant.hold(new)
        return new

    def _plan_prompts(self, prefills: list[Request], budget: StepBudget, now: float, *, admits: bool) -> None:
        """Append chunks of the prompts that run, and of those that wait until the first that finds no room, in the
        order of the tenants' turns.

        One whose next block another sequence is about to compute is looked past: it finds that block later, instead
        of computing it too. Its place stays, and so does that of all who share a prefix that is being computed.
        """
        looked_past: list[Request] = []
        turns, num_epochs = self._tenants.turns(prefills, admits), self._num_epochs
        for request, waits in turns:
            if budget.is_spent:
                break
            if not waits:
                self._plan_chunk(request, budget, now)
            elif not self._free_slots and not self._tenants.are_several:
                break
            elif len(looked_past) < policy.MAX_LOOKED_PAST and self._cache.is_coming(
                request.blocks, request.findable_tokens
            ):
                self._tenants.put_aside(request)
                looked_past.append(request)
            elif self._admit(request, budget, turns, now):
                budget.num_prompts += 1
                self._plan_chunk(request, budget, now)
            elif request.tenant.num_running and not self._has_a_claim(request):
                self._tenants.lift(request.tenant)
                turns.skip(request.tenant)
            elif self._tenants.may_close(request, self._running.values(), self._cache.blocks_for):
                turns.close()
            else:
                turns.skip(request.tenant)
        for request in looked_past:
            self._tenants.put_back(request)
        if admits:
            found_none = not budget.is_spent and not looked_past and self._num_epochs == num_epochs
            self._blocked = found_none and not self._tenants.are_several

    def _plan_chunk(self, request: Request, budget: StepBudget, now: float) -> None:
        """Append the next chunk of a prompt (or of what a preemption lost), if there is time for one."""
        start, num_tokens, missing = request.num_planned, len(request.tokens), policy.missing(request)
        lacking = self._images.lacking(request, start, missing)
        if policy.is_hopeless(request, self._cost, now, lacking):
            self._finish(request, "deadline", "what is left of the prompt takes longer than its deadline")
            return
        num_waiting = self._tenants.num_waiting
        contended = len(self._running) + num_waiting > 1
        count = budget.chunk(
            start, missing, contended=contended, num_waiting=num_waiting, admitted=request.is_new, lacking=lacking
        )
        self._tenants.charge(request, start, count, self._images.take(request, start, count, budget.begun))
        if not count:
            return
        samples = start + count == num_tokens
        request.num_planned += count
        request.num_pending += samples
        budget.seqs.append(request.chunk(start, count, samples=samples))

    def _admit(self, request: Request, budget: StepBudget, turns: Turns, now: float) -> bool:
        """Give a waiting sequence a slot and blocks; a tenant within its share takes them from those above theirs.
        Whether it runs now."""
        blocks = request.blocks
        while True:
            reserve = policy.reserve_blocks(len(self._running))
            cached_tokens = (
                self._cache.admit(blocks, reserve, request.findable_tokens) if self._free_slots else None
            )
            if cached_tokens is not None:
                self._start(request, cached_tokens, now)
                return True
            if not self._tenants.are_several or not self._has_a_claim(request):
                return False
            wanted = blocks.refused_blocks or self._cache.blocks_for(len(request.tokens))
            lacking = wanted + reserve - self._cache.num_free
            victims = self._tenants.victims(self._running.values(), 1 - len(self._free_slots), lacking)
            if not victims:
                return False
            for victim in victims:
                self._preempt(victim)
            budget.withdraw({victim.key for victim in victims})
            turns.refresh()

    def _has_a_claim(self, request: Request) -> bool:
        reserve = policy.reserve_blocks(len(self._running))
        return self._tenants.has_a_claim(request, self._cache.blocks_for(len(request.tokens)) + reserve)

    def _start(self, request: Request, cached_tokens: int, now: float) -> None:
        self._tenants.discard(request)
        request.move(State.RUNNING)
        request.slot = self._free_slots.pop()
        request.is_new = True
        request.epoch = self._num_epochs  # never given twice: a late result cannot meet a later run
        request.num_computed = request.num_planned = cached_tokens
        self._accounts.begin(request, now)
        self._tenants.begin(request)
        self._num_epochs += 1
        self._running[request.key] = request
        if request.admitted_at is None:
            request.admitted_at = now
            request.num_cached_prompt_tokens = min(cached_tokens, request.num_prompt_tokens)
            self._accounts.prompt_tokens += request.num_prompt_tokens
            self._accounts.cached_tokens += request.num_cached_prompt_tokens

    # --- taking in ---------------------------------------------------------------------------------------------

    def _append(self, request: Request, new: list[int], logprobs: list[TokenLogprobs] | None, now: float) -> None:
        """Take in sampled tokens up to the one that ends the sequence, and report them."""
        request.tenant.counter += len(new) * request.tenant.token_charge
        if request.first_token_at is None:
            request.first_token_at = now
            for sibling in self._gate.prompt_computed(request):
                self._enqueue(sibling)
        request.num_pending -= 1
        count, reason, stop_token_id = request.take(new)
        self._accounts.output_tokens += count
        if count > 1:
            request.spent.other_steps += 1 - count
        if reason is None:
            self._deltas.append(TokenDelta(*request.key, new, logprobs, None))
        else:
            logprobs = None if logprobs is None else logprobs[:count]
            self._finish(request, reason, "", new[:count], logprobs, stop_token_id)

    # --- leaving -----------------------------------------------------------------------------------------------

    def _preempt(self, request: Request) -> None:
        """Back into the queue, at its old place; what it computed will be computed again, or found again."""
        self._leave_slot(request)
        request.move(State.WAITING)
        request.num_preemptions += 1
        self._accounts.preemptions += 1
        self._tenants.wait(request)

    def _leave_slot(self, request: Request) -> None:
        """A running sequence gives slot and blocks back."""
        self._accounts.leave(request, self._clock())
        self._blocked = False
        del self._running[request.key]
        self._free_slots.append(request.slot)
        request.slot = -1
        self._tenants.end(request)
        self._images.leave(request)
        request.num_computed = request.num_planned = request.num_pending = 0
        self._cache.free(request.blocks)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        message: str = "",
        token_ids: list[int] | None = None,
        logprobs: list[TokenLogprobs] | None = None,
        stop_token_id: int | None = None,
    ) -> None:
        """The single release point: every accepted sequence passes here once, from whatever state."""
        if request.state is State.RUNNING:
            self._leave_slot(request)
        request.move(State.ENDED)
        self._tenants.discard(request)
        self._deadlines.discard(request)
        self._grammar_gate.ended(request)
        self._tenants.leave(request.tenant)
        request_id, sample = request.key
        samples = self._live[request_id]
        del samples[sample]
        if not samples:
            del self._live[request_id]
        heir = self._gate.ended(request)
        if heir is not None:
            self._enqueue(heir)
        self.num_finished += 1
        finish = request.finish(reason, message, stop_token_id, self._clock())
        self._deltas.append(TokenDelta(request_id, sample, token_ids or [], logprobs, finish))
