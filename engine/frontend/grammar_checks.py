"""Grammars that requests bring: each is compiled once, away from the loop, and its outcome is kept by its digest.

Requests that bring the same one wait together. What is kept has a limit: the one that was asked for longest ago is
forgotten first.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from cierzo.engine.errors import CierzoError, InvalidRequest, Overloaded
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoders import Encoder, Late, TooSlow
from cierzo.engine.frontend.encoding import Compiled
from cierzo.engine.text.grammar import about

WAIT_S = 30.0  # for the process that compiles
DIGEST_BYTES = 16


@dataclass(slots=True)
class GrammarCounts:
    """Requests with a grammar since the start of the front end: `known` ones had been compiled before; `refused`
    ones have no place among the other two."""

    compiled: int = 0
    known: int = 0
    refused: int = 0


@dataclass(slots=True, eq=False)
class _Compiling:
    """A grammar that is being compiled, and who waits for it."""

    answer: asyncio.Future[Compiled]
    waiters: list[asyncio.Future[None]] = field(default_factory=list)


class GrammarChecks:
    """Answers whether the core could follow a grammar."""

    def __init__(self, config: FrontendConfig, encoders: Encoder, clock: Callable[[], float]) -> None:
        self.counts = GrammarCounts()
        self._config = config
        self._encoders = encoders
        self._clock = clock
        self._known: OrderedDict[bytes, InvalidRequest | None] = OrderedDict()  # by digest; None: it compiles
        self._compiling: dict[bytes, _Compiling] = {}

    def ask(self, grammar: str, tenant: str) -> asyncio.Future[None] | None:
        """None for a grammar that is known to compile; else a future of whether it does, for the caller to cancel.

        Raises the InvalidRequest that refuses it, as the future does, without a field; and Overloaded.
        """
        data = grammar.encode()
        digest = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
        if digest in self._known:
            self._known.move_to_end(digest)
            if (error := self._known[digest]) is not None:
                self.counts.refused += 1
                raise about(None, error)
            self.counts.known += 1
            return None
        compiling = self._compiling.get(digest)
        if compiling is None:
            answer = self._encoders.compile(data, self._clock() + WAIT_S, tenant)
            compiling = self._compiling[digest] = _Compiling(answer)
            answer.add_done_callback(lambda _: self._done(digest, compiling))
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        compiling.waiters.append(waiter)
        waiter.add_done_callback(lambda _: self._left(digest, compiling))
        return waiter

    def close(self) -> None:
        """Wait for nothing any more."""
        for compiling in [*self._compiling.values()]:
            compiling.answer.cancel()

    def _left(self, digest: bytes, compiling: _Compiling) -> None:
        """A request has its answer, or does not wait any more; the grammar that nobody waits for is dropped."""
        if not compiling.answer.done() and all(waiter.done() for waiter in compiling.waiters):
            del self._compiling[digest]  # at once: who asks for it now must not wait for what is cancelled
            compiling.answer.cancel()

    def _done(self, digest: bytes, compiling: _Compiling) -> None:
        """Tell everybody who waits."""
        if self._compiling.get(digest) is compiling:
            del self._compiling[digest]
        waiting = [waiter for waiter in compiling.waiters if not waiter.done()]
        if compiling.answer.cancelled():
            for waiter in waiting:
                waiter.cancel()
            return
        error = compiling.answer.exception()
        if error is None:
            self.counts.compiled += len(waiting)
        else:
            self.counts.refused += len(waiting)
        if error is None or (isinstance(error, InvalidRequest) and not isinstance(error, TooSlow)):
            self._keep(digest, error)
        for waiter in waiting:
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(self._told(error))

    def _keep(self, digest: bytes, outcome: InvalidRequest | None) -> None:
        self._known[digest] = outcome
        while len(self._known) > self._config.max_known_grammars:
            self._known.popitem(last=False)

    def _told(self, error: BaseException) -> Exception:
        """An error of one request's own."""
        if isinstance(error, Late):
            what = f"the process that compiles grammars was busy for {WAIT_S:g} s"
            return Overloaded(what, field="max_grammar_s", retry_after_s=self._config.retry_after_s)
        return about(None, error) if isinstance(error, CierzoError) else CierzoError(f"internal error: {error!r}")
