"""Continuous batching in counts: which steps a workload comes to, without tokens and without block ids
(docs/architecture.md, section 10). The rules are the scheduler's, written a second time.

A step computes a token of every request that decodes, then chunks of the prompts that run, then prompts that
wait, while slots, budget and blocks last. A request that comes while a step is in flight is seen after it. The
answer to a finished request leaves at the end of a step, when the next step has begun: a client's next request is
a step late.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter

import numpy as np

from cierzo.bench.workload import TracedRequest
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.step_model import FloatArray, StepModel
from cierzo.engine.cost.work import StepShape
from cierzo.engine.worker.step_cost import fitted_cost
from cierzo.scheduler.cost import LEAST_CHUNK, StepCost, StepWork

LOOKED_PAST = 64  # requests that a step may pass over because another one computes their prefix


@dataclass(slots=True)
class Row:
    """A step, or `repeat` steps in a row that differ by one token per decoding sequence.

    decodes, context: sequences that decode, and the tokens that they attend to together. running: sequences that
    hold a slot. prompts: those that have a chunk. The rest is of these chunks, as in StepShape; what a preemption
    lost of generated tokens is computed in absorbed form.
    """

    decodes: int
    context: int
    running: int
    repeat: int = 1
    prompts: int = 0
    expanded_tokens: int = 0
    expanded_pairs: float = 0.0
    expanded_context: int = 0
    absorbed_tokens: int = 0
    absorbed_pairs: float = 0.0
    absorbed_context: int = 0
    sampled: int = 0
    embeddings: int = 0
    embedding_pairs: int = 0

    def chunk(self, start: int, count: int, input_tokens: int, samples: bool) -> None:
        """Add a chunk: tokens `start` to `start + count` of a sequence whose prompt has `input_tokens`."""
        prompt = max(0, min(count, input_tokens - start))
        again = count - prompt
        if prompt:
            self.expanded_tokens += prompt
            self.expanded_pairs += prompt * (start + (prompt + 1) / 2)
            self.expanded_context += start + prompt
        if again:
            self.absorbed_tokens += again
            self.absorbed_pairs += again * (start + prompt + (again + 1) / 2)
            self.absorbed_context += start + count
        self.prompts += 1
        self.sampled += samples


_FIELDS = attrgetter(*Row.__slots__)


def expand(rows: Sequence[Row]) -> tuple[StepShape, FloatArray]:
    """Shapes of each of the rows' steps by itself, and the sequences in them; arrays [S]."""
    table = np.array([_FIELDS(row) for row in rows], dtype=np.float64)
    repeats = table[:, Row.__slots__.index("repeat")].astype(np.int64)
    of = dict(zip(Row.__slots__, np.repeat(table, repeats, axis=0).T, strict=True))
    decodes = of["decodes"]
    earlier = np.arange(len(decodes)) - np.repeat(np.cumsum(repeats) - repeats, repeats)  # steps of the same row
    context = of["context"] + decodes * earlier
    for name in ("absorbed_tokens", "sampled"):
        of[name] = of[name] + decodes
    for name in ("absorbed_pairs", "absorbed_context"):
        of[name] = of[name] + context
    return StepShape(**{name: of[name] for name in StepShape.__slots__}), decodes + of["prompts"]


@dataclass(slots=True, eq=False)
class _Request:
    """A request and how far it has come.

    known, computed: tokens that it has, and those of them with cache entries. While it decodes both stand still,
    and `offset` tells: computed tokens at the beginning of a step, less the step's number; `end`: the step that it
    ends with. before: tokens of its prompt that were computed before this step. paused: the step of the last token
    before a preemption.

    images: those that were not made yet, as (first token, tokens); each is made, once and whole, in the step that
    computes its first token.

    blocks: held from its admission on. shared: blocks of the prefix that it shares. twins: blocks of that prefix
    that it computes although another request does too. kept: blocks that hold its tokens although it does not run,
    as a list of one number, which the queue of free blocks holds too.
    """

    index: int
    input_tokens: int
    output_tokens: int
    shared: int
    known: int
    images: list[tuple[int, int]]
    computed: int = 0
    decodes: bool = False
    offset: int = 0
    end: int = 0
    before: int = 0
    paused: int = 0
    blocks: int = 0
    twins: int = 0
    kept: list[int] = field(default_factory=lambda: [0])


class _Room:
    """The cache's blocks: how many are free, and which of those still hold tokens, the oldest first.

    Of the prefix that requests share, the first `held` blocks belong to the requests that run, the first `ready` of
    them have been computed, and `kept[0]` blocks after them are free and still hold their tokens.
    """

    def __init__(self, num_blocks: int) -> None:
        self.free = self._blank = num_blocks
        self._cached: deque[list[int]] = deque()  # free blocks that hold tokens: a count for each request that left
        self._holders: Counter[int] = Counter()  # blocks of the shared prefix -> requests that hold so many
        self.held = self.ready = 0
        self.kept = [0]

    @property
    def found(self) -> int:
        """Leading blocks of the shared prefix that a request finds when it is admitted."""
        return self.ready + (self.kept[0] if self.ready == self.held else 0)

    def take(self, count: int) -> None:
        """Take `count` free blocks: blank ones first, then those whose tokens are the oldest."""
        self.free -= count
        taken = min(count, self._blank)
        self._blank -= taken
        count -= taken
        while count:
            oldest = self._cached[0]
            taken = min(count, oldest[0])
            oldest[0] -= taken
            count -= taken
            if not oldest[0]:
                self._cached.popleft()

    def give(self, blank: int, kept: list[int]) -> None:
        """Free `blank` blocks without tokens that could be found again, and kept[0] with them."""
        self.free += blank + kept[0]
        self._blank += blank
        if kept[0]:
            self._cached.append(kept)

    def find(self, kept: list[int], count: int) -> None:
        """Take `count` of the blocks that an earlier `give` has freed, with the tokens that they hold."""
        self.free -= count
        kept[0] -= count

    def hold(self, shared: int) -> int:
        """Count one request more that holds `shared` prefix blocks; return how many it must take for itself."""
        self._holders[shared] += 1
        found = self.found
        beyond = max(0, shared - self.held)
        again = min(self.kept[0], beyond) if self.ready == self.held else 0
        self.find(self.kept, again)
        self.held += beyond
        self.ready += again
        return shared - min(shared, found)

    def let_go(self, shared: int) -> None:
        """Release one request's hold on `shared` prefix blocks."""
        self._holders[shared] -= 1
        left = max(+self._holders, default=0)
        if left < self.held:
            ready = max(0, self.ready - left)
            kept, self.kept[0] = [ready + self.kept[0]], 0  # together, as if all were given back now
            self.free -= kept[0] - ready
            self.give(self.held - left - ready, kept)
            self.kept, self.held, self.ready = kept, left, min(self.ready, left)


class Batching:
    """A run of a load under an engine's limits: its steps as `rows`, in order, and where its requests are in them.

    first, last, arrival: steps [N] with whose end came a request's first token, its last one, and in a closed loop
    the request itself (-1: the start). pauses: (request, step of the token before a preemption, step of the token
    after it). idle_s: step -> idle seconds before it.
    """

    def __init__(self, config: EngineConfig, load: Sequence[TracedRequest], clients: int, model: StepModel) -> None:
        """clients: of a closed loop, in which so many requests come at the start and one more whenever one has
        ended; 0: requests come when they say, and the model's seconds decide between which steps."""
        self._limits, self._block_tokens = config.scheduler, config.cache.block_tokens
        self._caching = config.cache.prefix_caching
        self._load, self._clients = load, clients
        self._model = None if clients else model
        self._cost = fitted_cost(config, model) if config.scheduler.max_step_s else None
        self.first, self.last, self.arrival = np.full((3, len(load)), -1)
        self.rows: list[Row] = []
        self.pauses: list[tuple[int, int, int]] = []
        self.idle_s: dict[int, float] = {}
        self.most_running = self.most_waiting = self.preemptions = 0
        self.kv_room_reached = self.max_running_reached = False
        self._room = _Room(config.cache.num_blocks)
        self._seconds = math.inf  # of predicted time that the step has left
        self._step, self._now_s, self._arrived = 0, 0.0, 0
        self._late: list[int] = []  # for each answer that its client has not followed up: the step it came with
        self._waiting: list[_Request] = []  # in order of arrival
        self._prompts: list[_Request] = []
        self._running: dict[int, _Request] = {}
        self._decodes = self._context = 0
        self._grows = [0] * self._block_tokens  # step, modulo block -> decoding requests that then need a block
        self._ends: list[tuple[int, int]] = []  # a heap: (step, request that ends then), unless it is preempted
        self._blocked = False

    def run(self) -> Batching:
        """Take steps until every request has ended; return this."""
        for _ in range(self._clients):
            self._arrive(-1)
        while self._running or self._waiting or self._late or self._arrived < len(self._load):
            self._take()
            if steps := self._sure_steps():
                self._advance(steps)
            else:
                self._single()
        return self

    # --- arrivals ------------------------------------------------------------------------------------------------

    def _arrive(self, step: int) -> None:
        """Queue the load's next request, if there is one; it comes with the end of `step`."""
        index = self._arrived
        if index == len(self._load):
            return
        new = self._load[index]
        tokens = new.input_tokens
        shared = min(new.shared_tokens, tokens - 1) // self._block_tokens if self._caching else 0
        self.arrival[index] = step
        images = [*zip(accumulate(new.image_tokens, initial=new.shared_tokens), new.image_tokens, strict=False)]
        self._waiting.append(_Request(index, tokens, new.output_tokens, shared, tokens, images))
        self._arrived += 1
        self._blocked = False
        self.most_waiting = max(self.most_waiting, len(self._waiting))

    def _next_s(self) -> float:
        """When the next request of an open load comes; never, if there is none."""
        is_open = not self._clients and self._arrived < len(self._load)
        return self._load[self._arrived].arrival_s if is_open else math.inf

    def _take(self) -> None:
        """Queue the requests that have come by the beginning of this step."""
        idle = not self._running and not self._waiting
        due = [step for step in self._late if step < self._step - 1]
        if idle and not due:
            due = self._late
        self._late = self._late[len(due) :]
        for step in due:
            self._arrive(step)
        if idle and self._now_s < self._next_s() < math.inf:
            self.idle_s[self._step] = self._next_s() - self._now_s
            self._now_s = self._next_s()
        while self._next_s() <= self._now_s:
            self._arrive(-1)

    # --- steps ---------------------------------------------------------------------------------------------------

    def _sure_steps(self) -> int:
        """Number of coming steps that only decode: up to the next end, or as many as there are blocks for."""
        if not self._decodes or self._prompts or (self._waiting and not self._blocked):
            return 0
        steps = 1 if self._late else self._next_end() - self._step + 1
        low = 0
        while low < steps:
            middle = (low + steps + 1) // 2
            low, steps = (middle, steps) if self._growth(middle) <= self._room.free else (low, middle - 1)
        return low

    def _growth(self, steps: int) -> int:
        """Blocks that the requests that decode need for the next `steps` steps."""
        size, first = self._block_tokens, self._step % self._block_tokens
        whole, part = divmod(steps, size)
        return whole * self._decodes + sum((self._grows[first:] + self._grows[:first])[:part])

    def _next_end(self) -> int:
        """The next step that a request ends with; some must decode."""
        while True:
            step, index = self._ends[0]
            request = self._running.get(index)
            if request is not None and request.decodes and request.end == step:
                return step
            heapq.heappop(self._ends)  # it was preempted

    def _advance(self, steps: int) -> None:
        """Take `steps` steps that only decode, or those of them that have begun when a request comes."""
        row = Row(self._decodes, self._context, len(self._running), steps)
        if self._model is not None:
            ends = self._now_s + np.cumsum(self._model.time(*expand([row])).total_s)
            row.repeat = steps = min(steps, int(np.searchsorted(ends, self._next_s())) + 1)
            self._now_s = float(ends[steps - 1])
        self._room.take(self._growth(steps))
        self._end(row)

    def _single(self) -> None:
        """Take one step: preempt for the requests that decode, then run chunks of prompts, then admit."""
        preemptions = self.preemptions
        while self._growth(1) > self._room.free:
            self._preempt()
        self._room.take(self._growth(1))
        row = Row(self._decodes, self._context, 0)
        budget = self._limits.budget_tokens - self._decodes
        self._seconds = math.inf
        if self._cost is not None:
            decodes_s = self._cost.seconds(StepWork(self._decodes, self._context))
            self._seconds = self._limits.max_step_s - decodes_s - self._cost.prompt_s
        for request in self._prompts:
            if not self._is_spent(row, budget):
                budget -= self._chunk(request, row, budget)
        if preemptions == self.preemptions:
            self._admit(row, budget)
        row.running = len(self._running)
        if self._model is not None:
            self._now_s += float(self._model.time(*expand([row])).total_s[0])
        self._end(row)

    def _is_spent(self, row: Row, budget: int) -> bool:
        """Whether no token is left, or, after a chunk, no time."""
        return budget <= 0 or (self._seconds <= 0 and row.prompts > 0)

    def _chunk(self, request: _Request, row: Row, budget: int, passed: int | None = None) -> int:
        """Add the next chunk of a prompt to the step; return its tokens. Alone a prompt takes the whole budget;
        beside others a long one is cut, and leaves half of the budget. passed: of a request that is just admitted,
        how many this step has passed over."""
        missing = request.known - request.computed
        count = min(missing, budget)
        is_long = missing > self._limits.max_chunk_tokens
        if len(self._running) + len(self._waiting) > 1 and is_long:
            count = min(self._limits.max_chunk_tokens, (budget + 1) // 2)
        if self._cost is not None:
            others = len(self._prompts) + len(self._waiting) - (passed or 0) - 1
            half = 2 if is_long and others else 1
            count = min(count, self._most(self._cost, request.computed, row, self._seconds / half, passed))
            if not count:
                return 0
            count -= count == missing - 1 > 1
            self._seconds -= self._cost.chunk_s(request.computed, count)
        row.chunk(request.computed, count, request.input_tokens, count == missing)
        request.computed += count
        while request.images and request.images[0][0] < request.computed:
            embeddings = request.images.pop(0)[1]
            row.embeddings += embeddings
            row.embedding_pairs += embeddings**2
            self._seconds -= 0.0 if self._cost is None else self._cost.image_s(embeddings)
        return count

    @staticmethod
    def _most(cost: StepCost, start: int, row: Row, seconds: float, passed: int | None) -> int:
        """Tokens of a chunk that `seconds` are enough for. The step's first one has a least size, and so has that
        of a request that is just admitted; any other waits where it would be smaller."""
        most = cost.most_tokens(start, seconds)
        if not row.prompts:
            return max(most, cost.least_tokens(start))
        if passed is not None:
            return max(most, LEAST_CHUNK)
        return most if most >= LEAST_CHUNK else 0

    def _admit(self, row: Row, budget: int) -> None:
        """Admit requests that wait, in order, until the first that finds no room."""
        passed, before, had_budget = 0, len(self._running), not self._is_spent(row, budget)
        while not self._is_spent(row, budget) and passed < len(self._waiting):
            request = self._waiting[passed]
            if len(self._running) >= self._limits.max_running:
                self.max_running_reached = True
                break
            if passed < LOOKED_PAST and self._is_coming(request):
                passed += 1
                continue
            if not self._enter(request):
                self.kv_room_reached = True
                break
            del self._waiting[passed]
            budget -= self._chunk(request, row, budget, passed)
        self._blocked = had_budget and not passed and len(self._running) == before

    def _is_coming(self, request: _Request) -> bool:
        """Whether another request is computing the next block of the shared prefix."""
        found = self._room.found
        return request.shared > found and any(
            one.shared > found and one.before // self._block_tokens == found for one in self._prompts
        )

    def _enter(self, request: _Request) -> bool:
        """Admit a request with blocks for all its tokens, unless too few would be left for those that run."""
        room, size, shared = self._room, self._block_tokens, request.shared
        total, found = -(-request.known // size), min(shared, room.found)
        if total - min(found, room.held) > room.free - len(self._running):
            return False
        mine = min(request.kept[0], (request.known - 1) // size - shared) if found == shared else 0
        room.find(request.kept, mine)
        beyond = max(0, shared - room.held)
        again = room.hold(shared)
        request.twins = max(0, again - beyond)
        room.take(total - shared - mine + again)
        request.computed = request.before = (found + mine) * size
        request.blocks, request.kept = total, [0]
        self._running[request.index] = request
        self._prompts.append(request)
        self.most_running = max(self.most_running, len(self._running))
        return True

    # --- ends ----------------------------------------------------------------------------------------------------

    def _end(self, row: Row) -> None:
        """End a step, or a stretch of steps: requests end, prompts that are computed begin to decode."""
        self.rows.append(row)
        step = self._step = self._step + row.repeat - 1
        self._context += self._decodes * row.repeat
        while self._decodes and self._next_end() == step:
            request = self._running[heapq.heappop(self._ends)[1]]
            self._stop_decoding(request, step + 1)
            self._finish(request, step)
        self._step = step + 1
        going_on = []
        for request in self._prompts:
            request.before = request.computed
            ready = min(request.computed // self._block_tokens, request.shared)
            self._room.ready = max(self._room.ready, ready)
            if request.computed < request.known:
                going_on.append(request)
            else:
                self._sampled(request, step)
        self._prompts = going_on

    def _sampled(self, request: _Request, step: int) -> None:
        """Give a token to a request whose prompt has been computed: its first, unless it had been preempted."""
        index = request.index
        if self.first[index] < 0:
            self.first[index] = step
        else:
            self.pauses.append((index, request.paused, step))
        request.known += 1
        remaining = request.input_tokens + request.output_tokens - request.known
        if not remaining:
            self._finish(request, step)
            return
        request.decodes = True
        request.offset, request.end = request.computed - step - 1, step + remaining
        self._decodes += 1
        self._context += request.known
        self._grows[-request.offset % self._block_tokens] += 1
        heapq.heappush(self._ends, (request.end, index))

    def _stop_decoding(self, request: _Request, step: int) -> None:
        """End a request's decoding before `step`."""
        request.decodes = False
        request.computed = request.offset + step
        request.known = request.computed + 1
        self._decodes -= 1
        self._context -= request.known
        self._grows[-request.offset % self._block_tokens] -= 1

    def _finish(self, request: _Request, step: int) -> None:
        self.last[request.index] = step
        self._leave(request)
        if self._clients and self._arrived + len(self._late) < len(self._load):
            self._late.append(step)

    def _preempt(self) -> None:
        """Send the request that came last back to its place in the queue."""
        request = self._running[max(self._running)]
        self.preemptions += 1
        self.kv_room_reached = True
        if request.decodes:
            self._stop_decoding(request, self._step)
            request.paused = self._step - 1
        else:
            self._prompts.remove(request)
        self._leave(request)
        bisect.insort(self._waiting, request, key=lambda one: one.index)

    def _leave(self, request: _Request) -> None:
        """Free a request's slot and blocks; its full blocks keep the tokens that they hold."""
        del self._running[request.index]
        size, shared, room = self._block_tokens, request.shared, self._room
        held = max(request.blocks, -(-request.computed // size)) - shared
        full = max(0, request.computed // size - shared) if self._caching else 0
        request.kept = [full]
        room.let_go(shared)
        room.give(held - full + request.twins, request.kept)
        self._blocked = False
