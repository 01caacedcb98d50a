"""Observer of the front end's requests: numbers by tenant, records of their cost, a line of the log for each that
did not end as planned."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.observe.tallies import TenantTally
from cierzo.engine.frontend.observe.usage_file import UsageFile
from cierzo.engine.frontend.observe.usage_record import UsageRecord, ends_of, record_of, refusal_of
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.frontend.tenants import DEFAULT, Tenant

log = logging.getLogger(__name__)

MAX_TENANTS = 64  # told apart, that of all others included
OTHERS = "(others)"  # which is no name that a tenant can have
LIMITS = {*FrontendConfig.__struct_fields__, *Tenant.__struct_fields__, "priority"}  # that are told by name
GRAVEST = ("failed", "deadline", "cancelled", "length", "tool_calls", "stop")
PLANNED = {"stop", "length", "tool_calls"}


class Observer:
    """Hears of first tokens, ends and refusals. `tenants`: sums by tenant. refusals: counts by error code, by the
    limit that was met ("" for none), and by whose it is: "tenant" (in its line of the key file) or "server".

    logs_ends: each request that did not end as planned has a line in the log. num_lost_lines: lines of the log that
    were lost. certificate_expires_s: when the server's certificate expires (Unix time), if it has one.
    """

    def __init__(self, config: FrontendConfig) -> None:
        """Raises ConfigError if the usage file cannot be had."""
        self.tenants: dict[str, TenantTally] = {DEFAULT: TenantTally()}
        self.refusals: Counter[tuple[str, str, str]] = Counter()
        self.usage = UsageFile(config.usage_file, config.max_usage_bytes) if config.usage_file else None
        self.logs_ends = config.log_format == "json"
        self.num_lost_lines: Callable[[], int] = lambda: 0
        self.certificate_expires_s: Callable[[], float | None] = lambda: None

    def expect(self, tenants: Iterable[str]) -> None:
        """Tell these tenants apart from now on, as far as there is room."""
        for name in tenants:
            self._tally(name)

    def first_token(self, stream: Stream, seconds: float) -> None:
        """A request has its first token, so long after its arrival."""
        self._tally(stream.tenant.name).first_tokens.add(seconds)

    def ended(self, stream: Stream) -> None:
        """A request has ended, and all that cores owe of its cost is known."""
        cost, ends, num_cached = stream.cost, ends_of(stream), stream.num_cached
        tally = self._tally(stream.tenant.name)
        tally.count(ends[0] if len(ends) == 1 else gravest(ends))
        tally.prompt_tokens += stream.num_prompt_tokens
        tally.cached_tokens += num_cached
        tally.output_tokens += stream.num_generated
        tally.computed_tokens += cost.computed_tokens
        tally.recomputed_tokens += cost.recomputed_tokens
        tally.steps += cost.steps
        tally.preemptions += cost.preemptions
        tally.kv_block_s += cost.kv_block_s
        is_logged = self.logs_ends and not PLANNED.issuperset(ends)
        if self.usage is None and not is_logged:
            return
        record = record_of(stream, ends, num_cached)
        if self.usage is not None:
            self.usage.add(record)
        if is_logged:
            self._log("a request ended", record, stream.error)

    def refused(
        self,
        error: CierzoError,
        *,
        tenant: str,
        peer: str,
        request_id: str = "",
        caller_id: str = "",
        traceparent: str = "",
        total_s: float = 0.0,
    ) -> None:
        """A request was refused: at once, or after its prompt had been looked at."""
        self.refusals[error.code, _limit(error) or "", "tenant" if error.is_quota else "server"] += 1
        self._tally(tenant).count(error.code)
        if self.usage is None and not self.logs_ends:
            return
        record = refusal_of(error, tenant, peer, request_id, caller_id, traceparent, total_s)
        if self.usage is not None:
            self.usage.add(record)
        if self.logs_ends:
            self._log("a request was refused", record, error)

    def close(self) -> None:
        """Write what waits."""
        if self.usage is not None:
            self.usage.close()

    def label(self, tenant: str) -> str:
        """Name under which a tenant is told: its own, as long as there is room."""
        return tenant if tenant in self.tenants or len(self.tenants) < MAX_TENANTS - 1 else OTHERS

    def _tally(self, tenant: str) -> TenantTally:
        if (tally := self.tenants.get(tenant)) is None:
            tally = self.tenants.setdefault(self.label(tenant), TenantTally())
        return tally

    def _log(self, what: str, record: UsageRecord, error: CierzoError | None) -> None:
        """Write a line. Errors are told by their code and what limit it was: their words and values may hold what
        the request said."""
        told = {
            "request_id": record.request_id,
            "caller_id": record.caller_id,
            "traceparent": record.traceparent,
            "tenant": record.tenant,
            "peer": record.peer,
            "why": ",".join(record.end),
            "limit": _limit(error),
        }
        log.info("%s: %s", what, told["why"], extra={"told": told})


def _limit(error: CierzoError | None) -> str | None:
    """Name of the limit that an error tells of; other fields may hold what the request said."""
    return error.field if error is not None and error.field in LIMITS else None


def gravest(ends: Iterable[str]) -> str:
    """The end of a request whose samples ended so."""
    found = {*ends}
    return next((end for end in GRAVEST if end in found), "failed")
