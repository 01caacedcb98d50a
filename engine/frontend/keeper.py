"""Requests by names that outlive a connection, request ids and idempotency keys, and what is kept under them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cierzo.engine.errors import InvalidRequest, KeyReused, NotFound
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoding import digest
from cierzo.engine.frontend.expiry import Expiry
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.frontend.tenancy import Tenancy
from cierzo.engine.frontend.tenants import Tenant
from cierzo.engine.messages import Generate

NAME_BYTES = 16
NAMES = 256  # made at a time: asking the kernel for each takes as long as all else that is done for a name
MAX_KEY_CHARS = 128
KEPT_BYTES, KEPT_SAMPLE_BYTES = 2048, 768  # heap of an answer that is kept, besides what its logs say


_Place = tuple[str, str]  # tenant, key


@dataclass(slots=True)
class _Key:
    """An idempotency key: the digest of its request, and the stream of it; None once its answer was forgotten."""

    digest: bytes
    stream: Stream | None


class Keeper:
    """Named streams: those that run, and those that have ended, for `orphan_s` (with a key: `idempotency_s`).

    What has ended takes what `max_kept_bytes` leaves to it beside what runs (`Heap`); beyond that the oldest
    answers are forgotten. A key is remembered all the same: it never generates twice.
    """

    def __init__(
        self,
        config: FrontendConfig,
        tenancy: Tenancy,
        clock: Callable[[], float],
        abandon: Callable[[Stream], None],
    ) -> None:
        self.kept_bytes = 0
        self._config = config
        self._tenancy = tenancy
        self._names = _random_names()
        self._named: dict[str, Stream] = {}
        self._keys: dict[_Place, _Key] = {}
        # those that have ended, oldest first -> bytes, of each tenant
        self._kept: dict[str, OrderedDict[Stream, int]] = {}
        self._orphans: Expiry[Stream] = Expiry(config.orphan_s, clock, abandon)
        self._ended: Expiry[Stream] = Expiry(config.orphan_s, clock, self._forget)
        self._ended_keys: Expiry[_Place] = Expiry(config.idempotency_s, clock, self._forget_key)

    def __len__(self) -> int:
        return len(self._named)

    def find(self, name: str, tenant: Tenant) -> Stream:
        """The stream of a request id. Raises NotFound, also for that of another tenant: in the same words."""
        stream = self._named.get(name)
        if stream is None or stream.tenant.name != tenant.name:
            raise NotFound("no request has this id", field="request_id", value=name)
        return stream

    def find_key(self, message: Generate, tenant: Tenant, content: bytes | None = None) -> Stream | None:
        """The stream that a tenant has begun with the message's idempotency key, if there is one. content: the
        digest of what is asked for, if the message does not hold all of it.

        Raises InvalidRequest, KeyReused, NotFound if its answer is kept no longer, and Overloaded if there is no
        room for another key.
        """
        key = message.idempotency_key
        if key is None:
            return None
        if not 1 <= len(key) <= MAX_KEY_CHARS:
            raise InvalidRequest(
                f"idempotency_key has {len(key)} characters, allowed: 1 to {MAX_KEY_CHARS}",
                field="idempotency_key",
                limit=f"1 to {MAX_KEY_CHARS} characters",
                value=len(key),
            )
        known = self._keys.get((tenant.name, key))
        if known is None:
            self._room_for_key(tenant)
            return None
        if known.digest != (content or digest(message)):
            raise KeyReused("this key came before with another request", field="idempotency_key", value=key)
        if known.stream is None:
            raise NotFound(
                "the request under this key has ended, and its answer is kept no longer",
                field="idempotency_key",
                value=key,
            )
        return known.stream

    def enter(self, stream: Stream) -> None:
        """Name a new stream."""
        stream.name = next(self._names)
        self._named[stream.name] = stream

    def claim(self, stream: Stream, message: Generate, content: bytes | None = None) -> None:
        """Give a named stream the message's idempotency key, if it has one, which must be free."""
        if message.idempotency_key is not None:
            stream.key = message.idempotency_key
            self._keys[stream.tenant.name, stream.key] = _Key(content or digest(message), stream)
            self._tenancy.add("max_idempotency_keys", stream.tenant, 1)

    def refused(self, stream: Stream) -> None:
        """A stream was not accepted after all: its names are free."""
        self._named.pop(stream.name, None)
        if stream.key is not None and self._keys.pop((stream.tenant.name, stream.key), None) is not None:
            self._tenancy.add("max_idempotency_keys", stream.tenant, -1)
        self._orphans.discard(stream)

    def orphaned(self, stream: Stream) -> None:
        """The connection of a stream that runs is lost: it is abandoned, unless somebody comes for it."""
        self._orphans.add(stream)

    def adopted(self, stream: Stream) -> None:
        """A stream has a reader again."""
        self._orphans.discard(stream)

    def ended(self, stream: Stream) -> None:
        """Nothing of a stream is computed any more: keep its answer for a while."""
        self._orphans.discard(stream)
        if stream.name not in self._named:
            return
        num_bytes = KEPT_BYTES + KEPT_SAMPLE_BYTES * stream.num_samples + stream.num_bytes
        self._kept.setdefault(stream.tenant.name, OrderedDict())[stream] = num_bytes
        self.kept_bytes += num_bytes
        self._tenancy.add("max_kept_bytes", stream.tenant, num_bytes)
        if stream.key is None:
            self._ended.add(stream)
        else:
            self._ended_keys.add((stream.tenant.name, stream.key))
        self.fit(self._config.max_kept_bytes)

    def fit(self, num_bytes: int) -> None:
        """Forget answers until all take at most so many bytes: the oldest of the tenant that has most beyond its
        part."""
        while self.kept_bytes > num_bytes and (kept := self._first_to_go()):
            self._forget(next(iter(kept)))

    def close(self) -> None:
        """Stop all timers."""
        for expiry in (self._orphans, self._ended, self._ended_keys):
            expiry.close()

    def _first_to_go(self) -> OrderedDict[Stream, int] | None:
        """The ended answers of whoever takes too much, which is the only tenant where there is one; None: there are
        none left."""
        over = self._tenancy.pools["max_kept_bytes"].over
        name = max(self._kept, key=over, default=None) if len(self._kept) > 1 else next(iter(self._kept), None)
        return None if name is None else self._kept[name]

    def _room_for_key(self, tenant: Tenant) -> None:
        hint_s = self._ended_keys.next_s if self._ended_keys else None
        self._tenancy.require("max_idempotency_keys", tenant, 1, hint_s)

    def _forget(self, stream: Stream) -> None:
        """Drop an answer; its key, if it has one, stays."""
        kept = self._kept[stream.tenant.name]
        num_bytes = kept.pop(stream)
        if not kept:
            del self._kept[stream.tenant.name]
        self.kept_bytes -= num_bytes
        self._tenancy.add("max_kept_bytes", stream.tenant, -num_bytes)
        del self._named[stream.name]
        self._ended.discard(stream)
        if stream.key is not None:
            self._keys[stream.tenant.name, stream.key].stream = None

    def _forget_key(self, place: _Place) -> None:
        stream = self._keys[place].stream
        if stream is not None:
            self._forget(stream)
        del self._keys[place]
        self._tenancy.pools["max_idempotency_keys"].add(place[0], -1)


def _random_names() -> Iterator[str]:
    """Names that nobody can guess."""
    while True:
        digits, width = os.urandom(NAMES * NAME_BYTES).hex(), 2 * NAME_BYTES
        yield from (digits[at : at + width] for at in range(0, len(digits), width))
