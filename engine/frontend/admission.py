"""An estimate of the time to a request's first token, by which one that must miss its deadline is refused at once.

Measured by the core: tokens that wait, and the rate at which steps with prompts in them compute tokens. That rate
is the engine's best only while there is more to compute than steps take; what it was then is believed for a while.
Measured here: what has been sent since the core told, and, while requests queue in the core, the rate at which they
get their first token, as they may wait for a place rather than for the prompts before them. Nothing is refused
without evidence of either kind. Pure bookkeeping.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from cierzo.engine.errors import DeadlineUnreachable
from cierzo.engine.messages import CoreStats

EVIDENCE_S = 10.0  # how long a rate is believed
BACKLOG_STEPS = 2  # of prompt tokens, more than which a core must have waiting for its rate to be its best
FEWEST_STARTS = 8  # first tokens from which a rate of requests is taken
MOST_STARTS = 64


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds to a first token: until the core comes to the prompt, and from there."""

    queue_s: float
    own_s: float


class Admission:
    """The queue before the first token, as the front end can know it. Times are the caller's clock, in seconds."""

    def __init__(self) -> None:
        self._stats = CoreStats()
        self._published_s = 0.0
        self._backlogged = False  # when the core last told
        self._rate = 0.0  # prompt tokens a second that the engine can compute, as far as known
        self._rate_s = float("-inf")  # when that was seen
        self._runs: dict[int, tuple[int, int]] = {}  # sent, without a token yet: (tokens, priority)
        self._tokens: Counter[int] = Counter()  # of these, by priority
        self._requests: Counter[int] = Counter()
        self._unknown: dict[int, float] = {}  # when they were sent, of those sent after the core last looked
        self._unknown_tokens = 0
        self._starts: deque[float] = deque(maxlen=MOST_STARTS)  # of requests, while others waited in the core

    def published(self, stats: CoreStats, now: float) -> None:
        """The core has told its gauges. Commands that came within its last step are not in them."""
        self._stats, self._published_s = stats, now
        self._learn_rate(stats.prefill_tokens_per_s, now)
        if not stats.waiting:
            self._starts.clear()
        while self._unknown:
            run_id, sent_s = next(iter(self._unknown.items()))
            if sent_s >= now - stats.step_s:
                return
            self._known(run_id)

    def sent(self, run_id: int, num_tokens: int, priority: int, now: float) -> None:
        """A run was sent to the core: tokens to compute until it gives one."""
        self._runs[run_id] = (num_tokens, priority)
        self._tokens[priority] += num_tokens
        self._requests[priority] += 1
        self._unknown[run_id] = now
        self._unknown_tokens += num_tokens

    def left(self, run_id: int, now: float, *, started: bool = False) -> None:
        """A run does not wait for its first token any more: it got one (`started`), or it ended."""
        if run_id not in self._runs:
            return
        self._known(run_id)
        num_tokens, priority = self._runs.pop(run_id)
        self._tokens[priority] -= num_tokens
        self._requests[priority] -= 1
        if started and self._stats.waiting:
            self._starts.append(now)

    def estimate(self, num_tokens: int, priority: int, now: float) -> Estimate | None:
        """The time to the first token of a request that was sent now; None while no rate is known."""
        stats = self._stats
        rate_known, starts_known = now - self._rate_s <= EVIDENCE_S, len(self._starts) >= FEWEST_STARTS
        if not rate_known and not starts_known:
            return None
        queue_s = s_per_token = 0.0
        if rate_known:
            new_share = 1 - stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 1.0
            s_per_token = new_share / self._rate
            waiting = max(0.0, stats.waiting_tokens - (now - self._published_s) * self._rate)
            queue_s = min(waiting + self._unknown_tokens, _up_to(priority, self._tokens)) * s_per_token
        if starts_known:
            s_per_start = (now - self._starts[0]) / len(self._starts)
            queue_s = max(queue_s, _up_to(priority, self._requests) * s_per_start)
        return Estimate(queue_s, num_tokens * s_per_token + stats.step_s)

    def require(self, num_tokens: int, priority: int, deadline_s: float, now: float) -> None:
        """Raise DeadlineUnreachable if the first token cannot come within `deadline_s`, by the estimate."""
        estimate = self.estimate(num_tokens, priority, now)
        if estimate is None or estimate.queue_s + estimate.own_s <= deadline_s:
            return
        if estimate.own_s > deadline_s:
            raise DeadlineUnreachable(
                f"its own prompt takes about {estimate.own_s:.3g} s: with this deadline a retry is of no use",
                field="deadline_s",
                limit=f"at least {estimate.own_s:.3g} s, with nothing else to compute",
                value=f"{deadline_s:.3g} s left",
            )
        late_s = estimate.queue_s + estimate.own_s - deadline_s
        raise DeadlineUnreachable(
            f"the first token is about {estimate.queue_s + estimate.own_s:.3g} s away",
            field="deadline_s",
            limit=f"at least {estimate.queue_s + estimate.own_s:.3g} s at this time",
            value=f"{deadline_s:.3g} s left",
            retry_after_s=late_s,
        )

    def _learn_rate(self, rate: float, now: float) -> None:
        """Take in a rate that the core has told: the engine's best if there was a backlog then and the time before,
        else no less than it can do."""
        backlogged = self._stats.waiting_tokens > BACKLOG_STEPS * rate * self._stats.step_s and rate > 0
        if backlogged and self._backlogged:
            self._rate, self._rate_s = rate, now
        else:
            self._rate = max(self._rate, rate)
        self._backlogged = backlogged

    def _known(self, run_id: int) -> None:
        """The core's gauges count this run, or it has left the queue."""
        if self._unknown.pop(run_id, None) is not None:
            self._unknown_tokens -= self._runs[run_id][0]


def _up_to(priority: int, counts: Counter[int]) -> int:
    """Sum of what goes before a request of this priority that comes now."""
    return sum(count for level, count in counts.items() if level <= priority)
