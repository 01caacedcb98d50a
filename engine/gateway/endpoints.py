"""Endpoints for completions: a body comes in, the engine is asked, its answer is told."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from cierzo.engine.errors import CierzoError, InvalidRequest
from cierzo.engine.frontend.client_options import TokenizeArguments
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.frontend.pool import Pool
from cierzo.engine.gateway import answers
from cierzo.engine.gateway.answers import Head, Told
from cierzo.engine.gateway.asked import Asked, Rules, in_body, read_chat, read_completions
from cierzo.engine.gateway.backend import Backend
from cierzo.engine.gateway.call import Call
from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.gateway.errors import unplanned
from cierzo.engine.gateway.sse import Run, heard, stream, together
from cierzo.engine.gateway.token_words import TokenWords, chat_entry, tokens_of
from cierzo.engine.messages import Delta, Final, ModelInfo

MODEL_S = 10.0  # for which a description of the model is taken to be true
WHOLE_TOKENS = 256 * 1024  # an answer of more is gathered as it is made
RETRY_AFTER_S = 1.0
ANYBODY = "default"
TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class House:
    """Things that all requests share: settings, the model that is served, the words of its tokens, and the bytes of
    the answers that are being put together."""

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        self.began_s = int(time.time())
        self.max_model_len = 0
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
                self.max_model_len = model.max_model_len
            self._until_s = now + MODEL_S
        return self._rules

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model: the first is the one that is told."""
        assert self._rules is not None
        return tuple(dict.fromkeys((*self._rules.names, self._rules.model.name)))

    def words(self, by_id: bool) -> TokenWords:
        """The words of the model's tokens."""
        return self._words.setdefault(by_id, TokenWords(by_id))

    def _made(self, model: ModelInfo) -> Rules:
        config = self.config
        return Rules(
            model=model,
            names=config.served_model_name,
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
    words = house.words(first.as_token_ids)
    prompts = [await _prompt_text(call.engine, each) for each in asked]
    generations = [_asked_of(house, call, each) for each in asked]
    if first.stream:
        runs = _runs(house, call, kind, head, asked, prompts, generations, words)
        await stream(call, runs, _usage(head, first, runs), house.config.comment_s)
        return
    joining = [Joining(house, call, kind, *each, words) for each in zip(asked, prompts, strict=True)]
    try:
        async with heard(call, generations):
            pairs = zip(joining, generations, strict=True)
            finals = await together(*(each.join(generation) for each, generation in pairs))
            choices: list[bytes] = []
            for each, final in zip(joining, finals, strict=True):
                choices += each.choices(len(choices), final)
            thoughts = sum(each.thought_tokens for each in joining)
            await call.reply(answers.whole(head, choices, answers.usage_of(finals, thoughts)))
    finally:
        for each in joining:
            each.close()


def _asked_of(house: House, call: Call, asked: Asked) -> Generation:
    """Ask the engine. Raises what it refuses at once, in the words of the body."""
    try:
        return call.engine.generate(**_arguments(house, call, asked))
    except CierzoError as error:
        raise in_body(error, asked) from error


async def _prompt_text(backend: Backend, asked: Asked) -> str:
    """The prompt, where it comes before the answer."""
    if not asked.echo:
        return ""
    text = asked.arguments.get("text")
    return text if text is not None else await backend.detokenize(asked.arguments["token_ids"])


def _arguments(house: House, call: Call, asked: Asked) -> dict[str, Any]:
    """The arguments of `generate`, with the names under which the request is known."""
    named = asked.arguments | {"caller_id": call.request_id}
    if TRACEPARENT.fullmatch(traceparent := call.field(b"traceparent")):
        named["traceparent"] = traceparent
    if asked.logprobs is not None or asked.prompt_logprobs is not None or _most_tokens(house, asked) > WHOLE_TOKENS:
        named["deltas"] = True
    return named


def _most_tokens(house: House, asked: Asked) -> int:
    """Output tokens that an answer may have, as far as its numbers are some."""
    most, n = asked.arguments.get("max_tokens"), asked.arguments.get("n", 1)
    if type(most) is not int or type(n) is not int:
        return 0  # it will be refused
    return min(most, house.max_model_len) * n


def _num_samples(asked: Asked) -> int:
    n = asked.arguments.get("n", 1)
    return n if type(n) is int and n > 0 else 1


def _runs(
    house: House,
    call: Call,
    kind: Kind,
    head: Head,
    asked: Sequence[Asked],
    prompts: Sequence[str],
    generations: Sequence[Generation],
    words: TokenWords,
) -> list[Run]:
    runs, first_index = [], 0
    for each, prompt, generation in zip(asked, prompts, generations, strict=True):
        told = Told(
            head=head,
            words=words,
            num_samples=_num_samples(each),
            first_index=first_index,
            reasoning=house.config.reasoning_format,
            logprobs=each.logprobs is not None,
            has_usage=each.include_usage,
            continuous=each.continuous_usage,
            prompt_text=prompt,
            drops_output=each.drops_output,
        )
        first_index += told.num_samples
        needs_words = told.logprobs or each.prompt_logprobs is not None
        count = partial(_count, call.engine, each) if told.continuous else None
        events, place = kind.events(told), partial(in_body, asked=each)
        runs.append(Run(generation, events, place, count, words if needs_words else None))
    return runs


async def _count(backend: Backend, asked: Asked) -> int:
    """Count the tokens of a prompt."""
    given = asked.arguments
    if "token_ids" in given:
        return len(given["token_ids"])
    if "suffix" in given:
        what = "the usage so far of a text with a suffix is not told by a gateway of its own"
        raise InvalidRequest(what, field="stream_options.continuous_usage_stats", limit="left out")
    names = ("text", "messages", "tools", "reasoning_effort")
    return len(await backend.tokenize(**cast(TokenizeArguments, {n: given[n] for n in names if n in given})))


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

    def __init__(self, house: House, call: Call, kind: Kind, asked: Asked, prompt: str, words: TokenWords) -> None:
        self.thought_tokens = 0
        self._prompt = prompt
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
        try:
            while deltas := await generation.next_batch():
                for delta in deltas:
                    if delta.logprobs:
                        await self._words.learn(self._call.engine, tokens_of(delta.logprobs))
                    self._add(delta)
            final = generation.final
        except CierzoError as error:
            raise in_body(error, self._asked) from error
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
        most = self._house.config.max_answer_bytes
        if self._num_bytes + num_bytes > most:
            what = (
                f"the answer is longer than max_answer_bytes, {most}: ask for a stream, or for fewer alternatives"
            )
            raise InvalidRequest(what, field="max_answer_bytes", limit=most, value=self._num_bytes + num_bytes)
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
                text = self._prompt + ("" if self._asked.drops_output else answers.text_of(answer.parts))
                told.append(answers.completion_choice(index, text, end, logprobs))
        return told

    def close(self) -> None:
        """Count it no more."""
        self._house.joined.add(ANYBODY, -self._num_bytes)
        self._num_bytes = 0
