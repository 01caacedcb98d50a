"""The heap that all answers take together, within `max_kept_bytes`: those that run, wait, or are kept; and the
pixels of images, which are kept until their request ends, as a new core gets them again.

What is given up first costs least: answers that have ended are forgotten (`Keeper`); from three quarters of the
limit on, requests are refused, and answers that can be resumed lose log-probabilities that were sent; at the limit
streams end, those that nobody reads before the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from cierzo.engine.errors import CierzoError, Overloaded
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.frontend.tenancy import Tenancy
from cierzo.engine.frontend.tenants import Tenant

TURN_BYTES = 16 * 1024 * 1024  # of logs that are cut in a turn of the loop
STREAM_BYTES = 64 * 1024  # what a stream counts for besides: its turn
STEPS = 64  # the limit is approached in so many


class Kept(Protocol):
    """The part of `Keeper` that is used: answers that have ended."""

    kept_bytes: int

    def fit(self, num_bytes: int) -> None:
        """Forget the oldest until they take at most so many bytes."""
        ...


class Heap:
    """Counts the answers of streams: `measure` one from time to time, `release` it when nobody has it any more."""

    def __init__(
        self,
        config: FrontendConfig,
        tenancy: Tenancy,
        kept: Kept,
        overflow: Callable[[Stream, CierzoError], None],
    ) -> None:
        """overflow: ends a stream with an error, now, and lets go of its answer."""
        self.num_bytes = 0
        self._limit = config.max_kept_bytes
        self._soft = self._limit * 3 // 4
        self._retry_after_s = config.retry_after_s
        self._pool = tenancy.pools["max_kept_bytes"]
        self._kept = kept
        self._overflow = overflow
        self._held: dict[Stream, int] = {}
        self._pixels: dict[Stream, int] = {}
        self._look_at = self._soft
        self._cutting: list[Stream] = []  # the largest last
        self._busy = False
        self._turn: asyncio.Handle | None = None

    def require(self, tenant: Tenant) -> None:
        """Raise Overloaded if there is no room for the answer of another request. A tenant that has no more than
        its part is not refused for what others take."""
        if self.num_bytes > self._soft and self._pool.has_more_than_its_part(tenant.name):
            raise self._error("open answers take three quarters of it", tenant)

    def measure(self, stream: Stream) -> None:
        """Take note of what a stream's answer takes now."""
        num_bytes = stream.num_bytes
        more = num_bytes - self._held.get(stream, 0)
        self.num_bytes += more
        self._pool.add(stream.tenant.name, more)
        self._held[stream] = num_bytes
        self.fit()
        if self.num_bytes > self._look_at and not self._busy:
            self._busy = True
            self._cutting = sorted(self._held, key=self._held.__getitem__)
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)

    def hold(self, stream: Stream, num_bytes: int) -> None:
        """Make room for the images of a stream that begins. Raises Overloaded if there is none; a tenant that has
        no more than its part then is not refused for what others take, up to the limit."""
        tenant, after = stream.tenant, self.num_bytes + num_bytes
        self._pool.add(tenant.name, num_bytes)
        if after > (self._soft if self._pool.has_more_than_its_part(tenant.name) else self._limit):
            self._pool.add(tenant.name, -num_bytes)
            raise self._error(f"there is no room for {num_bytes} bytes of images", tenant)
        self.num_bytes = after
        self._pixels[stream] = num_bytes
        self.fit()

    def let_go(self, stream: Stream) -> None:
        """Give back the room of a stream's images."""
        self._give(stream, self._pixels.pop(stream, 0))

    def fit(self) -> None:
        """Have ended answers forgotten to make room for the others."""
        if self._kept.kept_bytes > (room := self._limit - self.num_bytes):
            self._kept.fit(room)

    def release(self, stream: Stream) -> None:
        """A stream has ended, and its reader has all of it or is gone."""
        self._give(stream, self._held.pop(stream, 0))

    def _give(self, stream: Stream, num_bytes: int) -> None:
        if num_bytes:
            self.num_bytes -= num_bytes
            self._pool.add(stream.tenant.name, -num_bytes)
            if self.num_bytes <= self._soft:
                self._look_at = self._soft

    def close(self) -> None:
        """Stop what is to come."""
        if self._turn is not None:
            self._turn.cancel()

    def _take_turn(self) -> None:
        """Cut logs, the largest first, to half the limit; end streams if that is not enough."""
        left = TURN_BYTES
        while self._cutting and self.num_bytes > self._limit // 2 and left > 0:
            stream = self._cutting.pop()
            if stream in self._held:
                left -= STREAM_BYTES + self._held[stream]
                stream.forget(1 / 2, sent_only=True)
                self.measure(stream)
        if left > 0 and self.num_bytes > self._limit:
            for stream in sorted(self._held, key=self._cost_of_ending):
                if self.num_bytes <= self._limit or left <= 0:
                    break
                left -= STREAM_BYTES
                self._overflow(stream, self._error("open answers take more", stream.tenant))
                self.release(stream)
        if left <= 0:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)
            return
        self._look_at = max(self._soft, min(self.num_bytes + self._limit // STEPS, self._limit))
        self._busy = False

    def _cost_of_ending(self, stream: Stream) -> tuple[bool, bool, int]:
        """Order of streams to be ended, least first: of who takes too much, then those that nobody reads."""
        is_within = not self._pool.has_more_than_its_part(stream.tenant.name)
        return is_within, stream.sink is not None, -(self._held[stream] + self._pixels.get(stream, 0))

    def _error(self, why: str, tenant: Tenant) -> Overloaded:
        """The error for a tenant, which is told its own answers' bytes."""
        return Overloaded(
            f"max_kept_bytes is {self._limit}: {why}",
            field="max_kept_bytes",
            limit=self._limit,
            value=self._pool.used(tenant.name),
            retry_after_s=self._retry_after_s,
        )
