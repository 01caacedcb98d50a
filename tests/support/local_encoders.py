"""Encoders without a process, for tests where that is not the point."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec

from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoding import Encoded, Job, Refused, RequestEncoder, packed
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.prompt import PromptEncoder
from cierzo.engine.frontend.room import Room
from cierzo.engine.messages import ModelInfo


@dataclass
class LocalEncoders:
    """Encodes in the event loop, a turn later."""

    encoder: RequestEncoder
    room: Room

    def submit(
        self, job: Job, body: Buffer, attached: list[Buffer], deadline_at_s: float
    ) -> asyncio.Future[Encoded]:
        num_bytes = len(body) + sum(map(len, attached))
        self.room.take(num_bytes)
        future: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self.room.give(num_bytes))
        asyncio.get_running_loop().call_soon(self._answer, future, job, bytes(body), b"".join(attached))
        return future

    def _answer(self, future: asyncio.Future[Encoded], job: Job, body: bytes, attached: bytes) -> None:
        if future.done():
            return
        first, *rest = self.encoder.answer(job, body, attached if job.has_attached else None)
        answer = msgspec.msgpack.decode(first, type=Encoded | Refused)
        if isinstance(answer, Refused):
            future.set_exception(answer.error())
            return
        submit = msgspec.structs.replace(answer.submit, prompt_token_ids=packed(rest[0]))
        future.set_result(msgspec.structs.replace(answer, submit=submit))


def local_encoders(prompts: PromptEncoder, config: FrontendConfig, model: ModelInfo) -> LocalEncoders:
    """The encoders of a front end with these prompts."""
    return LocalEncoders(RequestEncoder(prompts, config, model), Room(config))
