"""Encoders without a process of their own, for front ends that are started in a test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoding import COMPILE, Compiled, Encoded, Job, RequestEncoder, joined
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.limits import ByteBudget
from cierzo.engine.frontend.tenants import DEFAULT
from cierzo.engine.messages import ModelInfo, Worded
from cierzo.engine.text.grammar import vocabulary_of
from cierzo.engine.text.grammar_check import GrammarCompiler, on_deep_stack
from cierzo.engine.text.prompt import PromptEncoder


@dataclass
class LocalEncoders:
    """Encodes in the event loop: `delay_s` later, if that is given, else in its next turn."""

    encoder: RequestEncoder
    budget: ByteBudget
    prompts: PromptEncoder
    model: ModelInfo
    delay_s: Callable[[], float] | None = None

    def submit(
        self,
        job: Job,
        body: Buffer,
        attached: Sequence[Buffer],
        deadline_at_s: float,
        tenant: str = DEFAULT,
        images: Sequence[Sequence[Buffer]] = (),
    ) -> asyncio.Future[Encoded]:
        """Have a request encoded, as `Encoders.submit` does."""
        files = [b"".join(pieces) for pieces in images]
        num_bytes, loop = len(body) + sum(map(len, (*attached, *files))), asyncio.get_running_loop()
        self.budget.take(num_bytes, tenant)
        future: asyncio.Future[Any] = loop.create_future()
        future.add_done_callback(lambda _: self.budget.give(num_bytes, tenant))
        answer = partial(self._answer, future, job, bytes(body), b"".join(attached), files)
        if self.delay_s is None:
            loop.call_soon(answer)
        else:
            loop.call_later(self.delay_s(), answer)
        return future

    def word(self, job: Job, body: Buffer, deadline_at_s: float, tenant: str = DEFAULT) -> asyncio.Future[Worded]:
        """Have a message about words answered, as `Encoders.word` does."""
        return cast("asyncio.Future[Worded]", self.submit(job, body, [], deadline_at_s, tenant))

    def compile(self, grammar: bytes, deadline_at_s: float, tenant: str = DEFAULT) -> asyncio.Future[Compiled]:
        """Have a grammar compiled, as `Encoders.compile` does."""
        job = Job(stream=0, features=[], has_attached=False, method=COMPILE)
        return cast("asyncio.Future[Compiled]", self.submit(job, grammar, [], deadline_at_s, tenant))

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        table = vocabulary_of(self.prompts, self.model)
        assert table is not None
        return GrammarCompiler(table)

    def _answer(
        self, future: asyncio.Future[Any], job: Job, body: bytes, attached: bytes, images: Sequence[bytes]
    ) -> None:
        if future.done():
            return
        try:
            if job.method == COMPILE:
                on_deep_stack(partial(self._compiler.check, body.decode()))
                future.set_result(Compiled())
                return
            if job.method != "generate":
                future.set_result(self.encoder.word(job, body))
                return
            given = attached if job.has_attached else None
            encoded, token_ids, pixels = self.encoder.encode_job(job, body, given, images)
        except CierzoError as error:
            future.set_exception(error)
            return
        future.set_result(joined(encoded, token_ids, pixels))


def local_encoders(
    prompts: PromptEncoder, config: FrontendConfig, model: ModelInfo, delay_s: Callable[[], float] | None = None
) -> LocalEncoders:
    """The encoders of a front end with these prompts."""
    return LocalEncoders(RequestEncoder(prompts, config, model), ByteBudget(config), prompts, model, delay_s)
