"""What each request gets when it runs alone, on a fresh core, without neighbours, chunks, hits, deaths or haste."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cierzo.cache.config import CacheConfig
from cierzo.engine.config import EngineConfig
from cierzo.engine.messages import SamplingParams, Submit, TokenLogprobs
from cierzo.engine.text.tokenizer import _BYTE_OF, Tokenizer
from cierzo.engine.text.tokenizer_config import TokenizerConfig

from .history import Body, Request
from .link import new_core


@lru_cache(maxsize=1)
def byte_tokenizer() -> Tokenizer:
    """Token ids up to 255 are bytes; those above have no text."""
    vocabulary = {char: _BYTE_OF[char] for char in pre_tokenizers.ByteLevel.alphabet()}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner, TokenizerConfig(named={}))


@dataclass(frozen=True)
class Answer:
    """One sample, complete."""

    tokens: list[int]
    text: str
    logprobs: list[TokenLogprobs]
    reason: str
    stop: str | int | None


class References:
    """Answers, each computed once."""

    def __init__(self, config: EngineConfig) -> None:
        limits = config.scheduler
        cache = CacheConfig(block_tokens=16, num_blocks=4 * (limits.max_model_len // 16 + 1), prefix_caching=False)
        scheduler = msgspec.structs.replace(
            limits, budget_tokens=4096, max_chunk_tokens=4096, max_running=4, max_waiting=64
        )
        self._config = msgspec.structs.replace(config, scheduler=scheduler, cache=cache)
        self._core = new_core(self._config, lambda: 0.0)
        self._known: dict[int, list[Answer]] = {}

    def of(self, request: Request) -> list[Answer]:
        """The samples of a request."""
        if request.number not in self._known:
            self._known[request.number] = self._alone(request.body)
        return self._known[request.number]

    def _alone(self, body: Body) -> list[Answer]:
        params = msgspec.convert(body["sampling"], SamplingParams)
        room = self._config.scheduler.max_model_len - len(body["token_ids"])
        params = msgspec.structs.replace(params, max_tokens=min(params.max_tokens, room))
        core = self._core = new_core(self._config, lambda: 0.0)
        core.submit(Submit(request_id=0, prompt_token_ids=body["token_ids"], sampling=params))
        tokens: list[list[int]] = [[] for _ in range(params.n)]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(params.n)]
        finishes: list[Any] = [None] * params.n
        while None in finishes:
            for delta in core.step_plain():
                tokens[delta.sample] += delta.token_ids
                logprobs[delta.sample] += delta.logprobs or []
                finishes[delta.sample] = delta.finish
        return [self._answer(params, *each) for each in zip(tokens, logprobs, finishes, strict=True)]

    def _answer(
        self, params: SamplingParams, tokens: list[int], logprobs: list[TokenLogprobs], finish: Any
    ) -> Answer:
        decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
        for count, token_id in enumerate(tokens, start=1):
            text += decoder.decode(bytes([token_id]) if token_id < 256 else b"", final=count == len(tokens))
            if (found := _first_stop(text, params.stop)) is not None:
                begin, stop = found
                return Answer(tokens[:count], text[:begin], logprobs[:count], "stop", stop)
        return Answer(tokens, text, logprobs, finish.reason, finish.stop_token_id)


def _first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the stop string begins that ends first, of several that end there the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return None
    end, _, stop = min(ends)
    return end - len(stop), stop
