"""Encoders of prompts in the loop itself: what a process would do, a random time later."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec

from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoding import Encoded, Job, Refused, RequestEncoder, packed
from cierzo.engine.frontend.prompt import PromptEncoder
from cierzo.engine.frontend.room import Room
from cierzo.engine.messages import ModelInfo

MOST_S = 0.005


class SimulatedEncoders:
    """Stands for `Encoders`."""

    def __init__(
        self, rng: random.Random, config: FrontendConfig, model: ModelInfo, prompts: PromptEncoder
    ) -> None:
        self.room = Room(config)
        self._rng = rng
        self._encoder = RequestEncoder(prompts, config, model)

    def submit(self, job: Job, body: Any, attached: list[Any], deadline_at_s: float) -> asyncio.Future[Encoded]:
        """Have a request encoded. Raises Overloaded."""
        num_bytes, loop = len(body) + sum(map(len, attached)), asyncio.get_running_loop()
        self.room.take(num_bytes)
        future: asyncio.Future[Encoded] = loop.create_future()
        future.add_done_callback(lambda _: self.room.give(num_bytes))
        loop.call_later(self._rng.random() * MOST_S, self._answer, future, job, bytes(body), b"".join(attached))
        return future

    def _answer(self, future: asyncio.Future[Encoded], job: Job, body: bytes, attached: bytes) -> None:
        if future.done():
            return
        first, *rest = self._encoder.answer(job, body, attached if job.has_attached else None)
        answer = msgspec.msgpack.decode(first, type=Encoded | Refused)
        if isinstance(answer, Refused):
            future.set_exception(answer.error())
            return
        submit = msgspec.structs.replace(answer.submit, prompt_token_ids=packed(rest[0]))
        future.set_result(msgspec.structs.replace(answer, submit=submit))
