"""The real front end on a simulated link: what the simulation and the fuzzer put their clients before."""

from __future__ import annotations

import random
from typing import Any, cast

from cierzo.bench.virtual import VirtualClock
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.rpc import RpcServer
from cierzo.engine.messages import ModelInfo
from cierzo.engine.testing.local_encoders import local_encoders
from cierzo.engine.text.prompt import PromptEncoder

from .link import SimulatedLink
from .reference import THOUGHTS, byte_tokenizer

LONGEST_ENCODING_S = 0.005


class House:
    """Front end and server, in virtual time."""

    def __init__(
        self,
        rng: random.Random,
        config: FrontendConfig,
        model: ModelInfo,
        link: SimulatedLink,
        clock: VirtualClock,
        thinks: bool = False,
    ) -> None:
        self.link = link
        prompts = PromptEncoder(byte_tokenizer(), syntax=THOUGHTS if thinks else None)
        delays, seeds = random.Random(rng.random()), random.Random(rng.random())
        encoders = local_encoders(prompts, config, model, lambda: delays.random() * LONGEST_ENCODING_S)
        self.frontend = Frontend(config, model, prompts, link, encoders, clock)
        self.frontend._arrivals._random = cast(Any, seeds)
        self.server = RpcServer(config, self.frontend)
        self.server.turns.clock = clock
        link.start(self.frontend.core)

    async def close(self) -> None:
        """End it, server first."""
        await self.server.close()
        await self.frontend.close()
        await self.link.close()
