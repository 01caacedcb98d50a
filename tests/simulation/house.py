"""The real front end on a simulated link: what the simulation and the fuzzer put their clients before."""

from __future__ import annotations

import inspect
import random
from typing import Any, cast

from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.prompt import PromptEncoder
from cierzo.engine.frontend.rpc import RpcServer
from cierzo.engine.messages import ModelInfo

from .link import SimulatedLink
from .reference import byte_tokenizer
from .virtual_time import Clock


class House:
    """Front end and server, in virtual time."""

    def __init__(
        self, rng: random.Random, config: FrontendConfig, model: ModelInfo, link: SimulatedLink, clock: Clock
    ) -> None:
        self.link = link
        prompts = PromptEncoder(byte_tokenizer())
        more: list[Any] = []
        if "encoders" in inspect.signature(Frontend).parameters:
            from .encoders import SimulatedEncoders

            more = [SimulatedEncoders(random.Random(rng.random()), config, model, prompts)]
        self.frontend = Frontend(config, model, prompts, cast(Any, link), *more, clock=clock)
        self.frontend._random = cast(Any, random.Random(rng.random()))
        self.server = RpcServer(config, self.frontend)
        if (turns := getattr(self.server, "turns", None)) is not None:
            turns.clock = clock
        link.start(self.frontend.core)

    async def close(self) -> None:
        """End it, server first."""
        await self.server.close()
        closed: Any = self.frontend.close()
        if inspect.isawaitable(closed):
            await closed
        await self.link.close()
