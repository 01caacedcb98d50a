"""What each request gets when it runs alone, on a fresh core, without neighbours, chunks, hits, deaths or haste."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cierzo.cache.config import CacheConfig
from cierzo.engine.config import EngineConfig
from cierzo.engine.messages import Generate, Grammar, SamplingParams, Submit, TokenLogprobs, Vocabulary
from cierzo.engine.text.grammar import GrammarWriter
from cierzo.engine.text.syntax import Syntax
from cierzo.engine.text.tokenizer import _BYTE_OF, Tokenizer
from cierzo.engine.text.tokenizer_config import TokenizerConfig

from .history import Body, Request
from .images import placed
from .link import new_core

# Tokens of some worlds that begin and end a thought.
THOUGHTS = Syntax(
    tokens={**dict.fromkeys((3, 23, 43), "think"), **dict.fromkeys((4, 24, 44, 64), "/think")},
)


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
    thoughts: str = ""


class References:
    """Answers, each computed once. vocabulary: what grammars are about."""

    def __init__(self, config: EngineConfig, vocabulary: Vocabulary | None = None) -> None:
        self._vocabulary = vocabulary
        limits = config.scheduler
        cache = CacheConfig(block_tokens=16, num_blocks=4 * (limits.max_model_len // 16 + 1), prefix_caching=False)
        scheduler = msgspec.structs.replace(
            limits, budget_tokens=4096, max_chunk_tokens=4096, max_running=4, max_waiting=64
        )
        self._config = msgspec.structs.replace(config, scheduler=scheduler, cache=cache)
        self._core = new_core(self._config, lambda: 0.0)
        self._known: dict[tuple[int, bool], list[Answer]] = {}

    def of(self, request: Request, is_apart: bool = False) -> list[Answer]:
        """The samples of a request; is_apart: with thoughts apart from the text."""
        key = (request.number, is_apart)
        if key not in self._known:
            self._known[key] = self._alone(request.body, is_apart)
        return self._known[key]

    def _alone(self, body: Body, is_apart: bool) -> list[Answer]:
        params = msgspec.convert(body["sampling"], SamplingParams)
        room = self._config.scheduler.max_model_len - len(body["token_ids"])
        params = msgspec.structs.replace(params, max_tokens=min(params.max_tokens, room))
        held, grammar = body.get("grammar"), ""
        if held is not None:
            asked = Generate(stream=0, token_ids=[0], grammar=msgspec.convert(held, Grammar))
            assert self._vocabulary is not None
            writer = GrammarWriter(self._vocabulary, THOUGHTS if is_apart else None)
            grammar = writer.write(asked, in_thinking=False, one_call=False, apart=is_apart)
        core = self._core = new_core(self._config, lambda: 0.0, self._vocabulary if held else None)
        prompt = body["token_ids"]
        images = placed(body["images"], prompt, self._config.model.vocab_size) if "images" in body else []
        core.submit(Submit(request_id=0, prompt_token_ids=prompt, sampling=params, grammar=grammar, images=images))
        tokens: list[list[int]] = [[] for _ in range(params.n)]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(params.n)]
        finishes: list[Any] = [None] * params.n
        while None in finishes:
            for delta in core.step_plain():
                tokens[delta.sample] += delta.token_ids
                logprobs[delta.sample] += delta.logprobs or []
                finishes[delta.sample] = delta.finish
        answer = _apart if is_apart else self._answer
        if held is not None:
            for each, finish in zip(tokens, finishes, strict=True):
                _hold(held["value"], each, finish, self._config.model.eos_token_ids)
        return [answer(params, *each) for each in zip(tokens, logprobs, finishes, strict=True)]

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


def _hold(pattern: str, tokens: list[int], finish: Any, eos_token_ids: tuple[int, ...]) -> None:
    """Demand that an answer which ended by itself matches its pattern."""
    text = bytes(token for token in tokens if token not in eos_token_ids).decode()
    matches = re.fullmatch(pattern, text) is not None
    assert matches or finish.reason != "stop", (pattern, text)
    assert finish.incomplete != matches, (pattern, text, finish)


def _apart(params: SamplingParams, tokens: list[int], logprobs: list[TokenLogprobs], finish: Any) -> Answer:
    """As `_answer`, by a reader of its own: texts and thoughts in turn, each decoded alone."""
    runs: list[tuple[bool, list[int]]] = [(False, [])]
    for count, token_id in enumerate(tokens, start=1):
        mark = THOUGHTS.tokens.get(token_id)
        is_thought = runs[-1][0]
        if mark is not None and (mark == "think") != is_thought:
            runs.append((not is_thought, []))
        elif mark is None and token_id < 256:
            runs[-1][1].append(token_id)
        read = [(thought, bytes(run).decode("utf-8", "replace")) for thought, run in runs]
        is_last, (thought, text) = count == len(tokens), read[-1]
        certain = text if is_last else _whole_characters(runs[-1][1])
        if not thought and (found := _first_stop(certain, params.stop)) is not None:
            begin, stop = found
            read[-1] = (False, text[:begin])
            return Answer(tokens[:count], _joined(read, False), logprobs[:count], "stop", stop, _joined(read, True))
    return Answer(tokens, _joined(read, False), logprobs, finish.reason, finish.stop_token_id, _joined(read, True))


def _whole_characters(run: list[int]) -> str:
    return codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(run))


def _joined(read: list[tuple[bool, str]], thoughts: bool) -> str:
    return "".join(text for is_thought, text in read if is_thought == thoughts)


def _first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the stop string begins that ends first, of several that end there the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return None
    end, _, stop = min(ends)
    return end - len(stop), stop
