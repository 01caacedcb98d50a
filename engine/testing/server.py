"""A server of the real protocol with a made-up model, in a thread of this process, for tests of what calls cierzo.

`cierzo.testing` says how it is used.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Self

import msgspec

from cierzo.engine.errors import CierzoError, refusal
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.loop_thread import LoopThread
from cierzo.engine.messages import Generate
from cierzo.engine.settings import settings_of
from cierzo.engine.testing.house import STATES, House
from cierzo.engine.testing.paced_core import PacedCore
from cierzo.engine.testing.script import Answers, Script, ScriptedPrompts
from cierzo.engine.testing.words import VISION, fake_model, marked_prompts, seeing_prompts

NOT_RUNNING = "this FakeServer does not run: it does within `with FakeServer() as server:`"


class FakeServer:
    """Serves made-up answers within a `with` block; `address` is for clients. Any thread may call its methods.

    answers: a text, token ids below 300, a FakeAnswer, or a CierzoError to refuse with; a list of these, given in
    turn; a mapping from prompts (a text, the text of a chat's last turn, a tuple of token ids; None: all others);
    or a function of the Generate message, which is called in the server's thread. A token is a byte of UTF-8, and
    an answer ends with one more, unless limits or stops of the request end it before; all n answers are the same.
    Grammars are refused as by any server; what they hold, as required calls do, answers need not.
    first_token_s, token_s: seconds before the first token, and between tokens, by `clock`.
    health: the state in which it starts. model: its name. takes_images: it takes images, which are checked, decoded
    and counted as by any server; answers depend on none. Further keywords are the limits of a server, as fields of
    FrontendConfig: address, max_open_samples, max_images, tls_certificate, ..., but no metrics. Raises ConfigError
    for what it cannot be.
    """

    def __init__(
        self,
        answers: Answers = "This is a test.",
        *,
        first_token_s: float = 0.0,
        token_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        health: str = "ready",
        model: str = "fake",
        takes_images: bool = False,
        max_model_len: int = 4096,
        **limits: Any,
    ) -> None:
        for name, seconds in (("first_token_s", first_token_s), ("token_s", token_s)):
            if not 0 <= seconds < math.inf:
                raise refusal(name, "a finite number of at least 0", seconds)
        if health not in STATES:
            raise refusal("health", f"one of {', '.join(STATES)}", health)
        if max_model_len < 1:
            raise refusal("max_model_len", "at least 1", max_model_len)
        if "metrics" in limits:
            raise refusal("metrics", "left out", limits["metrics"], "a FakeServer tells none")
        self._config = settings_of(FrontendConfig, {"address": "127.0.0.1:0", **limits})
        self._script = Script(answers)
        self._pace = (first_token_s, token_s, clock)
        self._first_health = health
        prompts = seeing_prompts() if takes_images else marked_prompts()
        self._prompts = ScriptedPrompts(
            prompts.tokenizer,
            template=prompts.template,
            image_token_ids=prompts.image_token_ids,
            syntax=prompts.syntax,
            script=self._script,
        )
        self._model = fake_model(
            name=model,
            max_model_len=max_model_len,
            reasoning_efforts=list(prompts.efforts or ()),
            marks_thinking=True,
            marks_calls=True,
            vision=VISION if takes_images else None,
        )
        self._thread: LoopThread | None = None
        self._house: House | None = None
        self._thread_id = 0

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise RuntimeError("this FakeServer runs already")
        thread = LoopThread("cierzo fake server")
        try:
            thread.run(self._open)
        except BaseException:
            thread.close()
            raise
        self._thread = thread
        return self

    def __exit__(self, *exc: object) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                thread.run(self._close)
            finally:
                thread.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.__exit__)

    # --- what there is to see --------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """The address that clients connect to."""
        return self._running.server.address

    @property
    def requests(self) -> list[Generate]:
        """The valid requests that came, in order, refused ones included."""
        return [*self._script.requests]

    @property
    def num_connections(self) -> int:
        """Connections that are open."""
        return len(self._running.server.connections)

    @property
    def health(self) -> str:
        """loading, ready, stalled, draining or failed. It can be set: while the server is loading or stalled, open
        answers wait, and go on afterwards; draining ends it for new requests, failed for all."""
        return self._running.frontend.health

    @health.setter
    def health(self, state: str) -> None:
        if state not in STATES:
            raise refusal("health", f"one of {', '.join(STATES)}", state)
        self._do(lambda: self._running.become(state))

    # --- faults ----------------------------------------------------------------------------------------

    def refuse(
        self,
        error: type[CierzoError] | CierzoError,
        *,
        times: int | None = 1,
        when: Callable[[Generate], object] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """Refuse the next `times` requests (None: all) of those for which `when` is true (None: any) with an error,
        or one of a class of cierzo.engine.errors. Orders are looked at in the order in which they were given."""
        self._script.refuse(error, times, when, retry_after_s)

    def accept(self) -> None:
        """Take back all orders to refuse that are left."""
        self._script.accept()

    def reset(self, *, after_deltas: int = 0, times: int = 1) -> None:
        """Cut the connection of each of the next `times` requests behind so many deltas of its answer, or where it
        is 0 once it is accepted; before the last record at the latest, which is all that comes of an answer without
        deltas (`ask`, `complete`). The answer goes on without it, and can be resumed."""
        for name, value, least in (("after_deltas", after_deltas, 0), ("times", times, 1)):
            if value < least:
                raise refusal(name, f"at least {least}", value)
        self._script.resets.extend([after_deltas] * times)

    def disconnect(self) -> None:
        """Cut all connections now."""
        self._do(self._cut_all)

    def _cut_all(self) -> None:
        for connection in self._running.server.connections:
            connection.cut()

    def restart(self, *, down_s: float = 0.0) -> None:
        """End as a server that is killed, and start again at the same address `down_s` later: its connections,
        its answers and the ids of its requests are gone."""
        if not 0 <= down_s < math.inf:
            raise refusal("down_s", "a finite number of at least 0", down_s)
        self._ask(lambda: self._restart(down_s))

    # --- inside ----------------------------------------------------------------------------------------

    @property
    def _running(self) -> House:
        if self._house is None:
            raise RuntimeError(NOT_RUNNING)
        return self._house

    def _do(self, act: Callable[[], object]) -> None:
        """Call a function in the server's thread."""

        async def call() -> None:
            act()

        self._ask(call)

    def _ask(self, ask: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._thread is None:
            raise RuntimeError(NOT_RUNNING)
        if threading.get_ident() == self._thread_id:
            raise RuntimeError("a function that answers for a FakeServer cannot wait for it")
        self._thread.run(ask)

    async def _open(self) -> None:
        self._thread_id = threading.get_ident()
        self._house = House(self._config, self._model, self._prompts, PacedCore(*self._pace))
        try:
            await self._house.open()
            self._house.become(self._first_health)
        except BaseException:
            await self._close()
            raise

    async def _close(self) -> None:
        house, self._house = self._house, None
        if house is not None:
            await house.close()

    async def _restart(self, down_s: float) -> None:
        self._config = msgspec.structs.replace(self._config, address=self.address)
        self._first_health = "ready"
        await self._close()
        await asyncio.sleep(down_s)
        await self._open()
