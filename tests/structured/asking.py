"""A server of a tiny model with random weights, and answers of it that hold a grammar.

Such a model would write spaces, digits and letters for ever. So all that closes something is made likely, and what
leads nowhere unlikely, by `logit_bias`: it comes before the masks, and what a grammar forbids it cannot bring back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from chaos.server import Server

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.client import Client
from cierzo.engine.messages import SampleEnd

AT_ONCE = 32
LIKELY, UNLIKELY = 4.0, -4.0


class Asking:
    """Asks for answers, so many at once. `bias`: what brings them to an end."""

    def __init__(self, client: Client, bias: dict[int, float]) -> None:
        self.client = client
        self._bias = bias
        self._room = asyncio.Semaphore(AT_ONCE)

    async def answer(self, grammar: dict[str, Any], seed: int, **arguments: Any) -> SampleEnd | CierzoError:
        """An answer to its end, or why there is none."""
        async with self._room:
            try:
                return (await self.client.complete(**self.arguments(grammar, seed), **arguments)).samples[0]
            except CierzoError as error:
                return error

    def arguments(self, grammar: dict[str, Any], seed: int) -> dict[str, Any]:
        """The arguments that bring an answer to an end."""
        return {"grammar": grammar, "seed": seed, "logit_bias": self._bias}


@asynccontextmanager
async def asking(server: Server) -> AsyncIterator[Asking]:
    """A client that knows the server's words."""
    async with await Client.connect(server.address) as client:
        model = await client.model_info()
        pieces = await client.token_bytes(range(min(model.vocab_size, 1024)))
        yield Asking(client, bias_of(pieces, model.eos_token_ids))


def bias_of(pieces: Iterable[bytes], eos_token_ids: Iterable[int]) -> dict[int, float]:
    """The bias that brings an answer to an end."""
    bias = {}
    for token_id, piece in enumerate(pieces):
        if piece and piece[-1:] in b'"]}':
            bias[token_id] = LIKELY
        elif not piece.strip() or piece.isdigit():
            bias[token_id] = UNLIKELY
    return bias | dict.fromkeys(eos_token_ids, LIKELY)
