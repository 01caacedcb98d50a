"""A request to the fake core and its answer, what tests read of generations, and the wait for what comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from cierzo.engine.frontend.client import Generation
from cierzo.engine.messages import Final, Generate, SamplingParams


def generate(stream: int = 1, *, deltas: bool = True, **sampling: Any) -> Generate:
    """A request whose first sample is `answer(max_tokens)`, with this seed."""
    params = SamplingParams(**{"seed": 0, **sampling})
    return Generate(stream=stream, token_ids=[0], sampling=params, deltas=deltas)


def answer(count: int) -> list[int]:
    """The tokens of the fake core to `generate`."""
    return [7 * position % 256 for position in range(count)]


async def tokens_of(generation: Generation) -> list[int]:
    """The tokens that are left of a one-sample generation."""
    return [token async for delta in generation for token in delta.token_ids]


async def all_of(generation: Generation) -> tuple[list[int], str, Final]:
    """(token ids, text, final) of a one-sample generation."""
    deltas = [delta async for delta in generation]
    return [t for d in deltas for t in d.token_ids], "".join(d.text for d in deltas), generation.final


async def by_sample(generation: Generation) -> tuple[dict[int, list[int]], dict[int, str]]:
    """The token ids and the text of each sample."""
    token_ids: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    async for delta in generation:
        token_ids.setdefault(delta.sample, []).extend(delta.token_ids)
        texts[delta.sample] = texts.get(delta.sample, "") + delta.text
    return token_ids, texts


async def final_of(generation: Generation) -> Final:
    """The end of a generation, whatever comes before."""
    async for _ in generation:
        pass
    return generation.final


async def until(condition: Callable[[], object]) -> None:
    """Look again in each turn of the loop."""
    while not condition():
        await asyncio.sleep(0)
