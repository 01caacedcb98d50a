"""Bounds on what clients may make the front end keep or do: bytes, and cancellations a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from cierzo.engine.errors import Overloaded
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.stream import Sink

RESET_WINDOW_S = 10


class Room:
    """Bytes of prompts that are not encoded yet, of all connections, charged as they come: `max_unencoded_bytes`.

    Whoever keeps bytes takes room for them, and gives it back when it lets go of them.
    """

    def __init__(self, config: FrontendConfig) -> None:
        self.num_bytes = 0
        self._limit = config.max_unencoded_bytes
        self._retry_after_s = config.retry_after_s

    def take(self, num_bytes: int) -> None:
        """Charge bytes; raises Overloaded, and charges nothing, if they are too many."""
        if self.num_bytes + num_bytes > self._limit:
            raise Overloaded(
                f"prompts that wait to be encoded may take {self._limit} bytes together (max_unencoded_bytes)",
                field="max_unencoded_bytes",
                limit=self._limit,
                value=self.num_bytes + num_bytes,
                retry_after_s=self._retry_after_s,
            )
        self.num_bytes += num_bytes

    def give(self, num_bytes: int) -> None:
        """Give back what was charged."""
        self.num_bytes -= num_bytes
        assert self.num_bytes >= 0, self.num_bytes


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled: float


class Resets:
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
