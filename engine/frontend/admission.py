"""An estimate of the time to a request's first token, by which one that must miss its deadline is refused at once.

Told by the core: tokens that wait, the price of a prompt's work, and the rate at which steps with prompts in
them do such work. That rate is the engine's best only while there is more to compute than steps take; what it
was then is believed for a while. Measured here: what has been sent since the core told, and, while requests
queue in the core, the rate at which they get their first token, as they may wait for a place rather than for
the prompts before them. Nothing is refused without evidence of either kind. Pure bookkeeping.

The core shares its work among tenants by weight: who floods it waits behind itself. So a tenant's request has
before it what its own tenant asked for, at its share of the rate, and at most what all did, at the whole rate.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from cierzo.engine.errors import DeadlineUnreachable
from cierzo.engine.frontend.prompt_line import PromptLine
from cierzo.engine.frontend.tenants import DEFAULT
from cierzo.engine.messages import CoreStats

EVIDENCE_S = 10.0  # how long a rate is believed
BACKLOG_STEPS = 2  # of prompt tokens, more than which a core must have waiting for its rate to be its best
FEWEST_STARTS = 8  # first tokens from which a rate of requests is taken
MOST_STARTS = 64
OPTIMISM = 0.75  # of the estimate: a request is refused if it would be late even so. In doubt it is let in


_Run = tuple[int, int, str]  # tokens, priority, tenant


class _Place(NamedTuple):
    """A request's place in the queue. share: its tenant's part of the rate, at which that one's requests alone are
    before it; 1: everybody's are before it, at the whole rate."""

    priority: int
    tenant: str
    share: float

    def is_behind(self, priority: int, tenant: str) -> bool:
        """Whether a request of this priority and tenant goes before it."""
        return priority <= self.priority if tenant == self.tenant else self.share == 1


class Estimate(NamedTuple):
    """Seconds to a first token: until the core comes to the prompt, and from there."""

    queue_s: float
    own_s: float
    place: _Place


class _Prompts:
    """Prompts of a tenant that wait, summed up by priority."""

    __slots__ = ("_sums", "num_runs", "num_tokens", "weight")

    def __init__(self) -> None:
        self.num_runs = self.num_tokens = 0  # these, and those that steps cut
        self.weight = 1.0
        self._sums: dict[int, list[int]] = {}

    def add(self, num_tokens: int, priority: int, count: int = 1) -> None:
        """Count a prompt, or (-1) count it no more."""
        sums = self._sums.get(priority)
        if sums is None:
            sums = self._sums[priority] = [0, 0, 0]
        sums[0] += count
        sums[1] += count * num_tokens
        sums[2] += count * num_tokens * num_tokens

    def clear(self) -> None:
        """Count none of them."""
        self._sums.clear()

    def before(self, priority: int | None) -> tuple[int, int, int]:
        """Sums over what goes before a request of this priority that comes now: prompts, their tokens, and the
        squares of these. priority None: that of another tenant, so all of it."""
        sums = [each for level, each in self._sums.items() if priority is None or level <= priority]
        return sum(each[0] for each in sums), sum(each[1] for each in sums), sum(each[2] for each in sums)


class Admission:
    """The queue before the first token, as the front end can know it. Times are the caller's clock, in seconds."""

    def __init__(self) -> None:
        self._stats = CoreStats()
        self._published_s = 0.0
        self._backlogged = False  # when the core last told
        self._rate = 0.0  # work on prompts a second that the engine can do, as far as known
        self._rate_s = float("-inf")  # when that was seen
        self._runs: dict[int, _Run] = {}  # sent, without a token yet
        self._num_tokens = 0  # of these
        self._short: dict[str, _Prompts] = {}  # of each tenant, those that steps do not cut
        self._long: dict[int, _Run] = {}  # the others
        self._unknown: dict[int, float] = {}  # when they were sent, of those sent after the core last looked
        self._unknown_tokens = 0
        self._starts: deque[float] = deque(maxlen=MOST_STARTS)  # of requests, while others waited in the core

    def published(self, stats: CoreStats, now: float) -> None:
        """The core has told its gauges. Commands that came within its last step are not in them."""
        before, self._stats, self._published_s = self._stats, stats, now
        if bool(stats.prompt_row_s) != bool(before.prompt_row_s):  # work is counted in another unit from now on
            self._rate, self._rate_s, self._backlogged = 0.0, float("-inf"), False
        if stats.max_chunk_tokens != before.max_chunk_tokens:
            self._sort()
        self._learn_rate(now)
        if not stats.waiting:
            self._starts.clear()
        while self._unknown:
            run_id, sent_s = next(iter(self._unknown.items()))
            if sent_s >= now - stats.step_s:
                return
            self._known(run_id)

    def sent(
        self, run_id: int, num_tokens: int, priority: int, now: float, tenant: str = DEFAULT, weight: float = 1.0
    ) -> None:
        """A tenant's run was sent to the core: tokens to compute until it gives one."""
        run = self._runs[run_id] = (num_tokens, priority, tenant)
        self._num_tokens += num_tokens
        prompts = self._short.get(tenant)
        if prompts is None:
            prompts = self._short[tenant] = _Prompts()
        prompts.weight = weight
        prompts.num_runs += 1
        prompts.num_tokens += num_tokens
        self._enter(run_id, run)
        self._unknown[run_id] = now
        self._unknown_tokens += num_tokens

    def left(self, run_id: int, now: float, *, started: bool = False) -> None:
        """A run does not wait for its first token any more: it got one (`started`), or it ended."""
        if run_id not in self._runs:
            return
        self._known(run_id)
        num_tokens, priority, tenant = self._runs.pop(run_id)
        self._num_tokens -= num_tokens
        prompts = self._short[tenant]
        prompts.num_runs -= 1
        prompts.num_tokens -= num_tokens
        if self._long.pop(run_id, None) is None:
            prompts.add(num_tokens, priority, -1)
        if not prompts.num_runs:
            del self._short[tenant]
        if started and self._stats.waiting:
            self._starts.append(now)

    def estimate(
        self, num_tokens: int, priority: int, now: float, tenant: str = DEFAULT, weight: float = 1.0
    ) -> Estimate | None:
        """The time to the first token of a tenant's request that was sent now; None while no rate is known."""
        if now - self._rate_s > EVIDENCE_S and len(self._starts) < FEWEST_STARTS:
            return None
        whole = self._estimate(num_tokens, _Place(priority, tenant, 1.0), now)
        if whole is None or (share := self._share(tenant, weight)) == 1:
            return whole
        own = self._estimate(num_tokens, _Place(priority, tenant, share), now)
        return whole if own is None or whole.queue_s <= own.queue_s else own

    def require(
        self,
        num_tokens: int,
        priority: int,
        deadline_s: float,
        now: float,
        tenant: str = DEFAULT,
        weight: float = 1.0,
    ) -> None:
        """Raise DeadlineUnreachable if the first token is late even if it comes earlier than estimated, by
        OPTIMISM."""
        estimate = self.estimate(num_tokens, priority, now, tenant, weight)
        if estimate is None or OPTIMISM * (estimate.queue_s + estimate.own_s) <= deadline_s:
            return
        if OPTIMISM * estimate.own_s > deadline_s:
            raise DeadlineUnreachable(
                f"its own prompt takes about {estimate.own_s:.3g} s: with this deadline a retry is of no use",
                field="deadline_s",
                limit=f"at least {OPTIMISM * estimate.own_s:.3g} s, with nothing else to compute",
                value=f"{deadline_s:.3g} s left",
            )
        raise DeadlineUnreachable(
            f"the first token is about {estimate.queue_s + estimate.own_s:.3g} s away",
            field="deadline_s",
            limit=f"at least {OPTIMISM * (estimate.queue_s + estimate.own_s):.3g} s at this time",
            value=f"{deadline_s:.3g} s left",
            retry_after_s=self._retry_after_s(estimate, deadline_s, now),
        )

    def _share(self, tenant: str, weight: float) -> float:
        """A tenant's part of the rate, beside all whose prompts wait."""
        if len(self._short) == (tenant in self._short):
            return 1.0
        others = sum([prompts.weight for name, prompts in self._short.items() if name != tenant])
        return weight / (weight + others)

    def _estimate(self, num_tokens: int, place: _Place, now: float) -> Estimate | None:
        line, start_s = self._line(place, now), self._start_s(place, now)
        if line is None and start_s is None:
            return None
        own_s = self._seconds(num_tokens, num_tokens * num_tokens) if line is not None else 0.0
        queue_s = line.queue_s(own_s / place.share) + own_s * (1 / place.share - 1) if line is not None else 0.0
        return Estimate(max(queue_s, start_s or 0.0), own_s + self._stats.step_s, place)

    def _retry_after_s(self, estimate: Estimate, deadline_s: float, now: float) -> float:
        """Seconds after which, by the estimate and if nobody else comes, the first token would be in time."""
        line, start_s = self._line(estimate.place, now), self._start_s(estimate.place, now)
        wait_s = 0.0 if start_s is None else start_s + estimate.own_s - deadline_s
        if line is not None:
            own_s = estimate.own_s / estimate.place.share
            wait_s = max(wait_s, line.time_until(own_s, max(0.0, deadline_s - own_s)))
        return wait_s + self._stats.step_s  # it does not come as a step begins

    def _line(self, place: _Place, now: float) -> PromptLine | None:
        """Work that is to be computed before or beside a request in this place, in seconds at its share of the
        rate; None while no rate is known."""
        if now - self._rate_s > EVIDENCE_S:
            return None
        stats, share = self._stats, place.share
        done: float = max(0, self._num_tokens - self._unknown_tokens - stats.waiting_tokens)
        if share < 1 and self._num_tokens:  # of what is done, its part
            mine = self._short.get(place.tenant)
            done *= 0 if mine is None else mine.num_tokens / self._num_tokens
        long_s = []
        for num_tokens, level, whose in self._long.values():
            if place.is_behind(level, whose):
                computed = min(done, num_tokens)
                done -= computed
                long_s.append(self._seconds(num_tokens - computed, num_tokens**2 - computed**2) / share)
        _, num_tokens, squares = self._sums(place)
        left = max(0.0, 1 - done / num_tokens) if num_tokens else 0.0
        since_s = min(now - self._published_s, self._seconds(stats.waiting_tokens, 0))  # it goes on meanwhile
        return PromptLine(long_s, left * self._seconds(num_tokens, squares) / share).after(since_s)

    def _start_s(self, place: _Place, now: float) -> float | None:
        """Seconds until a place is free, by the rate at which requests got their first token while others waited
        for it; None while there is none."""
        if len(self._starts) < FEWEST_STARTS:
            return None
        requests = self._sums(place)[0]
        requests += sum(place.is_behind(level, whose) for _, level, whose in self._long.values())
        return requests * (now - self._starts[0]) / len(self._starts) / place.share

    def _sums(self, place: _Place) -> tuple[int, int, int]:
        """Sums over the short prompts that go before a request in this place, as of `_Prompts.before`."""
        count = num_tokens = squares = 0
        for whose, prompts in self._short.items():
            if whose == place.tenant or place.share == 1:
                sums = prompts.before(place.priority if whose == place.tenant else None)
                count, num_tokens, squares = count + sums[0], num_tokens + sums[1], squares + sums[2]
        return count, num_tokens, squares

    def _seconds(self, num_tokens: float, squares: float) -> float:
        """Seconds of work on prompts, with nothing else to do: by the core's price; without one, all tokens are
        alike."""
        stats = self._stats
        new_share = 1 - stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 1.0
        if not stats.prompt_row_s:
            return num_tokens * new_share / self._rate
        work_s = num_tokens * stats.prompt_row_s + squares / 2 * stats.prompt_pair_s
        return work_s * new_share / self._rate

    def _learn_rate(self, now: float) -> None:
        """Take in a rate that the core has told: the engine's best if there was a backlog then and the time before,
        else no less than it can do."""
        stats = self._stats
        rate = stats.prefill_share if stats.prompt_row_s else stats.prefill_tokens_per_s
        backlogged = stats.waiting_tokens > BACKLOG_STEPS * stats.prefill_tokens_per_s * stats.step_s and rate > 0
        if backlogged and self._backlogged:
            self._rate, self._rate_s = rate, now
        else:
            self._rate = max(self._rate, rate)
        self._backlogged = backlogged

    def _sort(self) -> None:
        """Learn from which length on prompts are long."""
        self._long = {}
        for prompts in self._short.values():
            prompts.clear()
        for run_id, run in self._runs.items():
            self._enter(run_id, run)

    def _enter(self, run_id: int, run: _Run) -> None:
        num_tokens, priority, tenant = run
        if 0 < self._stats.max_chunk_tokens < num_tokens:
            self._long[run_id] = run
        else:
            self._short[tenant].add(num_tokens, priority)

    def _known(self, run_id: int) -> None:
        """The core's gauges count this run, or it has left the queue."""
        if self._unknown.pop(run_id, None) is not None:
            self._unknown_tokens -= self._runs[run_id][0]
