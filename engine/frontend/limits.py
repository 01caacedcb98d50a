"""Limits on what clients may make the front end keep or do: whatever a setting counts, bytes, cancels a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from cierzo.engine.errors import Overloaded
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.pool import Pool
from cierzo.engine.frontend.stream import Sink
from cierzo.engine.frontend.tenants import DEFAULT

RESET_WINDOW_S = 10


def require_room(config: FrontendConfig, name: str, value: int, retry_after_s: float | None = None) -> None:
    """Raise Overloaded if `value` is beyond the limit of this name, with the usual hint or another one."""
    limit = getattr(config, name)
    if value > limit:
        hint_s = config.retry_after_s if retry_after_s is None else retry_after_s
        raise Overloaded(f"{name} is {limit}", field=name, limit=limit, value=value, retry_after_s=hint_s)


class ByteBudget:
    """Bytes of prompts that are not encoded yet, of all connections, charged to a tenant as they come:
    `max_unencoded_bytes`.

    Whoever keeps bytes takes so many, and gives them back when it lets go.
    """

    def __init__(self, config: FrontendConfig) -> None:
        self.pool = Pool("max_unencoded_bytes", config.max_unencoded_bytes)
        self._hint_s = config.retry_after_s

    @property
    def num_bytes(self) -> int:
        """Bytes that are charged."""
        return self.pool.num

    def take(self, num_bytes: int, tenant: str = DEFAULT) -> None:
        """Charge bytes; raises Overloaded, and charges nothing, if they are too many."""
        self.pool.require(tenant, num_bytes, self._hint_s)
        self.pool.add(tenant, num_bytes)

    def give(self, num_bytes: int, tenant: str = DEFAULT) -> None:
        """Give back what was charged."""
        self.pool.add(tenant, -num_bytes)


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled: float


class CancelLimiter:
    """Counts the generations that a connection opened and ended before their time: a token bucket for each.

    It holds ten seconds' worth of `max_cancels_per_s`, and is filled at that rate.
    """

    def __init__(self, config: FrontendConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._buckets: WeakKeyDictionary[Sink, _Bucket] = WeakKeyDictionary()

    def count(self, sink: Sink) -> None:
        """Take one; raises Overloaded, which is the connection's end, if none is left."""
        rate, now = self._config.max_cancels_per_s, self._clock()
        most = float(rate * RESET_WINDOW_S)
        bucket = self._buckets.setdefault(sink, _Bucket(most, now))
        bucket.tokens = min(most, bucket.tokens + rate * (now - bucket.filled))
        bucket.filled = now
        if bucket.tokens < 1:
            raise Overloaded(
                f"this connection opens and cancels more than {rate} generations a second (max_cancels_per_s)",
                field="max_cancels_per_s",
                limit=rate,
                retry_after_s=self._config.retry_after_s,
            )
        bucket.tokens -= 1
