"""Books of what each tenant has open, and the limits that it meets.

Its own limits stand in its line of the key file; the server's limits are shared by all (`pool.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cierzo.engine.errors import CierzoError, InvalidRequest, Overloaded
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.pool import Pool
from cierzo.engine.frontend.tenants import NO_LIMIT, Tenant

MINUTE_S = 60.0
POOLS = (
    *("max_connections", "max_open_samples", "max_open_tokens"),
    *("max_kept_bytes", "max_idempotency_keys"),
)


@dataclass(slots=True, eq=False)
class Book:
    """Record of what a tenant has open. level: tokens of this minute that it may still have; below 0: a debt."""

    tenant: Tenant
    num_requests: int = 0
    num_tokenless: int = 0  # of these, without a first token
    num_tokens: int = 0
    is_rated: bool = False
    level: float = 0.0
    filled_s: float = 0.0


class Tenancy:
    """The books of all tenants, and the pools that they share. `arrange` says who there is."""

    def __init__(self, config: FrontendConfig, clock: Callable[[], float], *more: Pool) -> None:
        """more: pools that others own, to be divided as well."""
        self._hint_s = config.retry_after_s
        self._clock = clock
        self._books: dict[str, Book] = {}
        self.pools = {name: Pool(name, getattr(config, name)) for name in POOLS}
        self._all_pools = [*self.pools.values(), *more]
        self.arrange([Tenant()])

    def arrange(self, tenants: Iterable[Tenant]) -> None:
        """Know these tenants from now on; one that is gone keeps what it has open until that ends."""
        tenants = [*tenants]
        for tenant in tenants:
            self._rewrite(self._books.setdefault(tenant.name, Book(tenant)), tenant)
        for name in self._books.keys() - {tenant.name for tenant in tenants}:
            if not self._books[name].num_requests:
                del self._books[name]
        for pool in self._all_pools:
            pool.divide(tenants)

    def book(self, tenant: Tenant) -> Book:
        """The book of a tenant."""
        book = self._books.get(tenant.name)
        if book is None:
            book = self._books[tenant.name] = Book(tenant)
            self._rewrite(book, tenant)
        return book

    def books(self) -> Iterable[Book]:
        """The books of all tenants, to be read."""
        return self._books.values()

    def require_request(self, book: Book, num_samples: int) -> None:
        """Raise Overloaded if a tenant cannot open another request."""
        if book.num_requests >= book.tenant.max_requests:
            raise self._refusal(book, "max_requests", book.tenant.max_requests, book.num_requests + 1)
        if book.is_rated:
            self._require_rate(book, 1)
        self.require("max_open_samples", book.tenant, num_samples)

    def require_tokens(self, book: Book, num_tokens: int, priority: int) -> None:
        """Raise the CierzoError that says why a tenant cannot have a request of so many prompt and resumed tokens,
        of this priority."""
        tenant = book.tenant
        if not tenant.min_priority <= priority <= tenant.max_priority:
            allowed = f"{tenant.min_priority} to {tenant.max_priority}"
            text = f"priority is {priority}, the tenant {tenant.name} may have {allowed}"
            raise _quota(InvalidRequest(text, field="priority", limit=allowed, value=priority))
        if num_tokens >= tenant.max_model_len or num_tokens > tenant.max_open_tokens:
            is_long = num_tokens >= tenant.max_model_len
            name, most = (
                ("max_model_len", tenant.max_model_len - 1)
                if is_long
                else ("max_open_tokens", tenant.max_open_tokens)
            )
            text = f"{num_tokens} prompt and resumed tokens, the tenant {tenant.name} may have {most} ({name})"
            raise _quota(InvalidRequest(text, field=name, limit=most, value=num_tokens))
        if book.num_tokens + num_tokens > tenant.max_open_tokens:
            raise self._refusal(book, "max_open_tokens", tenant.max_open_tokens, book.num_tokens + num_tokens)
        if book.is_rated:
            self._require_rate(book, num_tokens)
        self.require("max_open_tokens", tenant, num_tokens)

    def require(self, name: str, tenant: Tenant, count: int, retry_after_s: float | None = None) -> None:
        """Raise Overloaded if a tenant cannot have so much more of a pool."""
        self.pools[name].require(tenant.name, count, self._hint_s if retry_after_s is None else retry_after_s)

    def add(self, name: str, tenant: Tenant, count: int) -> None:
        """Take so much of a pool for a tenant, or (less than 0) give it back."""
        self.pools[name].add(tenant.name, count)

    def charge(self, book: Book, num_tokens: int) -> None:
        """Count prompt and resumed tokens of a request, which use up those of a minute; or (less than 0) count them
        no more."""
        book.num_tokens += num_tokens
        self.pools["max_open_tokens"].add(book.tenant.name, num_tokens)
        if book.is_rated and num_tokens > 0:
            book.level -= num_tokens

    def _require_rate(self, book: Book, num_tokens: int) -> None:
        """Raise Overloaded unless a tenant may have so many tokens now; more than a minute's at once it may have
        when it has had none for a minute."""
        limit, now = book.tenant.max_tokens_per_minute, self._clock()
        per_s = limit / MINUTE_S
        if now > book.filled_s:
            book.level = min(float(limit), book.level + per_s * (now - book.filled_s))
            book.filled_s = now
        lacking = min(num_tokens, limit) - book.level
        if lacking > 0:
            used = round(limit - book.level) + num_tokens
            raise self._refusal(book, "max_tokens_per_minute", limit, used, lacking / per_s)

    def _rewrite(self, book: Book, tenant: Tenant) -> None:
        """A tenant has these limits from now on. What it has used of a minute's tokens stays used."""
        before, limit = book.tenant.max_tokens_per_minute, tenant.max_tokens_per_minute
        used = float(before) - book.level if book.is_rated else 0.0
        book.tenant, book.is_rated = tenant, limit < NO_LIMIT
        book.level = float(limit) - used if book.is_rated else 0.0
        if book.is_rated and not book.filled_s:
            book.filled_s = self._clock()

    def _refusal(
        self, book: Book, name: str, limit: int, value: int, retry_after_s: float | None = None
    ) -> CierzoError:
        hint_s = self._hint_s if retry_after_s is None else retry_after_s
        text = f"the tenant {book.tenant.name} may have {name} {limit}"
        return _quota(Overloaded(text, field=name, limit=limit, value=value, retry_after_s=hint_s))


def _quota(error: CierzoError) -> CierzoError:
    """The error, as one that tells of a limit in the tenant's line."""
    error.is_quota = True
    return error
