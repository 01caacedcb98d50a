"""Endpoints for completions: a body comes in, the engine is asked, its answer is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cierzo.engine.frontend.generation import Generation
from cierzo.engine.frontend.pool import Pool
from cierzo.engine.gateway import answers
from cierzo.engine.gateway.answers import Head, Told
from cierzo.engine.gateway.asked import Asked, Rules, read_chat, read_completions
from cierzo.engine.gateway.backend import Backend
from cierzo.engine.gateway.call import Call
from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.gateway.errors import unplanned
from cierzo.engine.gateway.sse import Run, heard, stream
from cierzo.engine.gateway.token_words import TokenWords, chat_entry, tokens_of
from cierzo.engine.messages import Delta, Final, ModelInfo

MODEL_S = 10.0  # for which a description of the model is taken to be true
WHOLE_TOKENS = 4096  # an answer of more is gathered as it is made: the engine keeps none of it back
RETRY_AFTER_S = 1.0
ANYBODY = "default"


class House:
    """Things that all requests share: settings, the model that is served, the words of its tokens, and the bytes of
    the answers that are being put together."""

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        self.began_s = int(time.time())
        self.joined = Pool("max_joined_bytes", config.max_joined_bytes)
        self._rules: Rules | None = None
        self._until_s = 0.0
        self._words: dict[bool, TokenWords] = {}

    async def rules(self, backend: Backend) -> Rules:
        """Rules for requests, by the model that is served now."""
        now = time.monotonic()
        if self._rules is None or now >= self._until_s:
            model = await backend.model_info()
            if self._rules is None or self._rules.model != model:
                self._rules, self._words = self._made(model), {}
            self._until_s = now + MODEL_S
        return self._rules

    def words(self, by_id: bool) -> TokenWords:
        """The words of the model's tokens."""
        return self._words.setdefault(by_id, TokenWords(by_id))

    def _made(self, model: ModelInfo) -> Rules:
        config = self.config
        return Rules(
            model=model,
            names=tuple(dict.fromkeys((*config.served_model_name, model.name))),
            lenient=config.lenient,
            max_depth=config.max_body_depth,
            max_prompts=config.max_prompts,
        )


class Kind(NamedTuple):
    """A kind of answer: its object when whole and in a stream, the prefix of its ids, and its events."""

    whole: str
    chunk: str
    name: str
    events: Callable[[Told], answers.Events]


CHAT = Kind("chat.completion", "chat.completion.chunk", "chatcmpl", answers.ChatEvents)
TEXT = Kind("text_completion", "text_completion", "cmpl", answers.CompletionEvents)


async def chat(house: House, call: Call) -> None:
    """Answer POST /v1/chat/completions."""
    await _answer(house, call, CHAT, [read_chat(call.body, await house.rules(call.engine))])


async def completions(house: House, call: Call) -> None:
    """Answer POST /v1/completions."""
    await _answer(house, call, TEXT, read_completions(call.body, await house.rules(call.engine)))


async def _answer(house: House, call: Call, kind: Kind, asked: Sequence[Asked]) -> None:
    """Ask the engine, and tell its answers."""
    first = asked[0]
    if first.passed_over:
        call.headers.append((b"x-passed-over", ", ".join(first.passed_over).encode("ascii", "backslashreplace")))
    head = answers.head(kind.chunk if first.stream else kind.whole, kind.name, call.request_id, first.model)
    generations = [call.engine.generate(**_arguments(call, each)) for each in asked]
    words = house.words(first.return_tokens_as_token_ids)
    if first.stream:
        runs = _runs(house, kind, head, asked, generations, words)
        await stream(call, runs, _usage(head, first, runs), house.config.comment_s)
        return
    async with heard(call, generations):
        joining = [Joining(house, call, kind, each, words) for each in asked]
        try:
            told = await _all(
                *(each.join(generation) for each, generation in zip(joining, generations, strict=True))
            )
            choices, finals, thoughts = [], [], 0
            for each, final in zip(joining, told, strict=True):
                choices += each.choices(len(choices), final)
                finals.append(final)
                thoughts += each.thought_tokens
            await call.reply(answers.whole(head, choices, answers.usage_of(finals, thoughts)))
        finally:
            for each in joining:
                each.close()


async def _all(*asked: Any) -> list[Any]:
    """The results of all; the first that fails ends the others."""
    if len(asked) == 1:
        return [await asked[0]]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in asked]
    return [task.result() for task in tasks]


def _arguments(call: Call, asked: Asked) -> dict[str, Any]:
    """The arguments of `generate`, with the names under which the request is known."""
    named = asked.arguments | {"caller_id": call.request_id}
    if traceparent := call.field(b"traceparent"):
        named["traceparent"] = traceparent
    if not asked.stream and asked.logprobs is None and _most_tokens(asked) <= WHOLE_TOKENS:
        named["deltas"] = False
    return named


def _most_tokens(asked: Asked) -> int:
    most = asked.arguments.get("max_tokens", WHOLE_TOKENS + 1) * asked.arguments.get("n", 1)
    return most if isinstance(most, int) else WHOLE_TOKENS + 1


def _num_samples(asked: Asked) -> int:
    return int(asked.arguments.get("n", 1))


def _runs(
    house: House,
    kind: Kind,
    head: Head,
    asked: Sequence[Asked],
    generations: Sequence[Generation],
    words: TokenWords,
) -> list[Run]:
    runs, first_index = [], 0
    for each, generation in zip(asked, generations, strict=True):
        told = Told(
            head=head,
            words=words,
            num_samples=_num_samples(each),
            first_index=first_index,
            reasoning=house.config.reasoning_format,
            logprobs=each.logprobs is not None,
            has_usage=each.include_usage,
            continuous=each.continuous_usage,
        )
        first_index += told.num_samples
        runs.append(Run(generation, kind.events(told), words if told.logprobs else None))
    return runs


def _usage(head: Head, asked: Asked, runs: Sequence[Run]) -> Callable[[list[Final]], bytes]:
    """Make the last event of a stream, with its usage, if that is asked for."""

    def last(finals: list[Final]) -> bytes:
        if not asked.include_usage:
            return b""
        thoughts = sum(run.events.thought_tokens for run in runs)
        return answers.usage_event(head, answers.usage_of(finals, thoughts))

    return last


class Joining:
    """An answer to one prompt, put together as it is made. Its bytes are counted until it is closed."""

    def __init__(self, house: House, call: Call, kind: Kind, asked: Asked, words: TokenWords) -> None:
        self.thought_tokens = 0
        self._house = house
        self._call = call
        self._kind = kind
        self._asked = asked
        self._words = words
        self._num_bytes = 0
        self._generation: Generation | None = None
        n = _num_samples(asked)
        self._entries = [bytearray() for _ in range(n)]
        self._legacy = [answers.Legacy(words) for _ in range(n)]

    async def join(self, generation: Generation) -> Final:
        """Wait for the whole answer. Raises the CierzoError that ended it."""
        self._generation = generation
        while deltas := await generation.next_batch():
            for delta in deltas:
                if delta.logprobs:
                    await self._words.learn(self._call.engine, tokens_of(delta.logprobs))
                self._add(delta)
        final = generation.final
        for end in final.samples:
            if (error := unplanned(end)) is not None:
                raise error
        return final

    def _add(self, delta: Delta) -> None:
        num_bytes = len(delta.text)
        if delta.logprobs and self._kind is CHAT:
            entries = self._entries[delta.sample]
            before = len(entries)
            for entry in delta.logprobs:
                entries += chat_entry(self._words, entry) + b","
            num_bytes += len(entries) - before
        elif delta.logprobs:
            legacy = self._legacy[delta.sample]
            before = legacy.num_bytes
            legacy.add(delta.logprobs)
            num_bytes += legacy.num_bytes - before
        self._house.joined.require(ANYBODY, num_bytes, RETRY_AFTER_S)
        self._house.joined.add(ANYBODY, num_bytes)
        self._num_bytes += num_bytes

    def choices(self, first_index: int, final: Final) -> list[bytes]:
        """The choices that the samples are."""
        assert self._generation is not None
        told = []
        for end in final.samples:
            answer, index = self._generation.answer(end.sample), first_index + end.sample
            if self._kind is CHAT:
                self.thought_tokens += answers.thought_tokens([answer])
                entries = bytes(self._entries[end.sample][:-1])
                told.append(answers.chat_choice(index, answer, end, self._house.config.reasoning_format, entries))
            else:
                has_some = self._asked.logprobs is not None
                logprobs = self._legacy[end.sample].encoded() if has_some else b""
                told.append(answers.completion_choice(index, answers.text_of(answer.parts), end, logprobs))
        return told

    def close(self) -> None:
        """Count it no more."""
        self._house.joined.add(ANYBODY, -self._num_bytes)
        self._num_bytes = 0
