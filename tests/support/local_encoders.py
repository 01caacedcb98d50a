"""Encoders without a process, for tests where that is not the point."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoding import Encoded, Job, RequestEncoder, packed
from cierzo.engine.frontend.failures import error_of
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.limits import ByteBudget
from cierzo.engine.frontend.tenants import DEFAULT
from cierzo.engine.messages import Failure, ModelInfo
from cierzo.engine.text.prompt import PromptEncoder


@dataclass
class LocalEncoders:
    """Encodes in the event loop: `delay_s` later, if that is given, else in its next turn."""

    encoder: RequestEncoder
    budget: ByteBudget
    delay_s: Callable[[], float] | None = None

    def submit(
        self, job: Job, body: Buffer, attached: list[Buffer], deadline_at_s: float, tenant: str = DEFAULT
    ) -> asyncio.Future[Encoded]:
        num_bytes, loop = len(body) + sum(map(len, attached)), asyncio.get_running_loop()
        self.budget.take(num_bytes, tenant)
        future: asyncio.Future[Encoded] = loop.create_future()
        future.add_done_callback(lambda _: self.budget.give(num_bytes, tenant))
        answer = partial(self._answer, future, job, bytes(body), b"".join(attached))
        if self.delay_s is None:
            loop.call_soon(answer)
        else:
            loop.call_later(self.delay_s(), answer)
        return future

    def _answer(self, future: asyncio.Future[Encoded], job: Job, body: bytes, attached: bytes) -> None:
        if future.done():
            return
        first, *rest = self.encoder.answer(job, body, attached if job.has_attached else None)
        answer = msgspec.msgpack.decode(first, type=Encoded | Failure)
        if isinstance(answer, Failure):
            future.set_exception(error_of(answer))
            return
        submit = msgspec.structs.replace(answer.submit, prompt_token_ids=packed(rest[0]))
        future.set_result(msgspec.structs.replace(answer, submit=submit))


def local_encoders(
    prompts: PromptEncoder, config: FrontendConfig, model: ModelInfo, delay_s: Callable[[], float] | None = None
) -> LocalEncoders:
    """The encoders of a front end with these prompts."""
    return LocalEncoders(RequestEncoder(prompts, config, model), ByteBudget(config), delay_s)
