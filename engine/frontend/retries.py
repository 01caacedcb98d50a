"""Second attempts of clients: at connections that were lost, and at requests that certainly did not run."""

from __future__ import annotations

import random
from typing import Annotated

import msgspec
from msgspec import Meta

from cierzo.engine.errors import (
    CierzoError,
    ConnectionLost,
    CoreFailed,
    CoreStalled,
    DeadlineUnreachable,
    Draining,
    InvalidRequest,
    KeyReused,
    NotFound,
    Overloaded,
)

# Errors by which a server refuses, and does not end, a request; it also says others of one that runs.
_REFUSALS = (Overloaded, Draining, CoreStalled, InvalidRequest, NotFound, KeyReused)
Attempts = Annotated[int, Meta(ge=1)]
Amount = Annotated[float, Meta(ge=0)]
_ENDS_RUNNING = "max_kept_bytes"  # the one limit whose `overloaded` also ends requests that run


class Reconnect(msgspec.Struct, frozen=True):
    """Bounds on the mending of a lost connection; past them its requests end with ConnectionLost.

    max_attempts, within_s: connections tried, and seconds since the loss; both count from the last connection on
    which something came for a request. The pause before an attempt doubles up to `longest_pause_s`, and is cut at
    random to a half at least, so that many clients do not come back at once.
    """

    max_attempts: Attempts = 10
    within_s: Amount = 30.0
    first_pause_s: Amount = 0.05
    longest_pause_s: Amount = 5.0

    def pause_s(self, num_failures: int) -> float:
        """Seconds for which an address is left alone after so many failures in a row."""
        pause_s: float = min(self.first_pause_s * 2.0 ** min(num_failures - 1, 60), self.longest_pause_s)
        return pause_s * random.uniform(0.5, 1.0)


class Retry(msgspec.Struct, frozen=True):
    """Bounds on the repetition of requests that a server refused for now.

    max_attempts: of one request, the first included. ratio, burst: of all requests together, such a part may be
    repeated, beside so many. within_s: seconds from its beginning in which a request is repeated, if its deadline
    is not sooner. The pause before an attempt at a server that refused before is what that server asks for
    (`retry_after_s`) or else doubles up to `longest_pause_s`, and is drawn at random between a half and all of it,
    on top of what was asked for.
    """

    max_attempts: Attempts = 3
    ratio: Amount = 0.1
    burst: Amount = 10.0
    first_pause_s: Amount = 0.1
    longest_pause_s: Amount = 5.0
    within_s: Amount = 30.0

    def pause_s(self, num_tries: int, error: CierzoError) -> float:
        """Seconds to wait after `num_tries` refusals, of which `error` was the last."""
        own_s: float = min(self.first_pause_s * 2.0 ** (num_tries - 1), self.longest_pause_s)
        return (error.retry_after_s or 0.0) + own_s * random.uniform(0.5, 1.0)


class Budget:
    """A bucket of tokens: each request puts a part of one in, each repetition takes one out."""

    def __init__(self, policy: Retry) -> None:
        self._policy = policy
        self._tokens = policy.burst

    def earn(self) -> None:
        """A request is made."""
        self._tokens = min(self._tokens + self._policy.ratio, self._policy.burst)

    def spend(self) -> bool:
        """Take a token; False if there is none, and nothing is to be repeated."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def is_refusal(error: CierzoError, *, tells_acceptance: bool) -> bool:
    """Whether an error about a request of which nothing had come says that it did not run. tells_acceptance: the
    server would have said before that it accepts it."""
    if isinstance(error, ConnectionLost):
        return False
    return tells_acceptance or (isinstance(error, _REFUSALS) and error.field != _ENDS_RUNNING)


def is_worth_repeating(error: CierzoError) -> bool:
    """Whether the same request may be taken later, or elsewhere."""
    return error.retry and not (isinstance(error, DeadlineUnreachable) and error.retry_after_s is None)


def is_of_server(error: CierzoError) -> bool:
    """Whether a refusal says that the server takes no request at all for now."""
    return isinstance(error, Draining | CoreFailed)
