"""Endpoints for answers: a body comes in, the engine is asked, its answer is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from cierzo.engine.errors import CierzoError, InvalidRequest
from cierzo.engine.frontend.arguments import tokenize_arguments
from cierzo.engine.frontend.bounds import must_be
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.gateway import answers, words
from cierzo.engine.gateway.answers import Events, Head, Told
from cierzo.engine.gateway.asked import in_body
from cierzo.engine.gateway.backend import Backend
from cierzo.engine.gateway.bodies import Request
from cierzo.engine.gateway.call import Call
from cierzo.engine.gateway.errors import require_planned
from cierzo.engine.gateway.house import House, ask
from cierzo.engine.gateway.joining import Counted, Joining, Prompt
from cierzo.engine.gateway.reading import Endpoint
from cierzo.engine.gateway.responses import ResponseEvents, response_head
from cierzo.engine.gateway.sse import Run, heard, stream, together
from cierzo.engine.messages import Delta, Final

PROMPTS_AT_ONCE = 8  # asked in a turn of the loop
MAX_ENTRIES = 32_768  # of log-probabilities in a response, whose last event tells all of them again


class Kind(NamedTuple):
    """A kind of answer: its object when whole and in a stream, the prefix of its ids, and its events."""

    whole: str
    chunk: str
    name: str
    events: Callable[[Told], Events]


MANY_SAMPLES = 128  # of one prompt
CHAT = Kind("chat.completion", "chat.completion.chunk", "chatcmpl", answers.ChatEvents)
TEXT = Kind("text_completion", "text_completion", "cmpl", answers.CompletionEvents)
KINDS: dict[Endpoint, Kind] = {"chat": CHAT, "completions": TEXT, "fim": CHAT}


def answering(endpoint: Endpoint) -> Callable[[House, Call], Awaitable[None]]:
    """The handler of an endpoint whose answers are completions."""
    kind = KINDS[endpoint]

    async def answer(house: House, call: Call) -> None:
        await _answer(house, call, kind, await house.requests(call, endpoint))

    return answer


async def _answer(house: House, call: Call, kind: Kind, requests: list[Request]) -> None:
    """Ask the engine, and tell its answers."""
    first = requests[0].asked
    head = answers.head(kind.chunk if first.stream else kind.whole, kind.name, call.request_id, first.model)
    prompts = [await _prompt(house, call, request) for request in requests]
    generations = []
    for number, request in enumerate(requests, 1):
        generations.append(ask(call.engine, request))
        if number % PROMPTS_AT_ONCE == 0:
            await asyncio.sleep(0)  # other callers have their turns
    await _not_too_many(requests, generations)
    if first.stream:
        runs = _runs(house, call, kind, head, requests, prompts, generations)
        await stream(call, runs, partial(_last, head, first.include_usage, runs), house.config.comment_s)
        return
    is_chat = kind is CHAT
    pairs = zip(requests, prompts, strict=True)
    counted = Counted(house)
    joining = [Joining(house, call, request, is_chat, prompt, counted) for request, prompt in pairs]
    try:
        async with heard(call, generations):
            ends = zip(joining, generations, strict=True)
            finals = await together(*(each.join(generation) for each, generation in ends))
            choices: list[list[answers.Piece]] = []
            for each, final in zip(joining, finals, strict=True):
                choices += each.choices(len(choices), final)
            thoughts = sum(each.thought_tokens for each in joining)
            scores = joining[0].prompt_logprobs if is_chat else []
            await call.reply(answers.whole(head, choices, answers.usage_of(finals, thoughts), scores))
    finally:
        counted.close()


async def _not_too_many(requests: Sequence[Request], generations: Sequence[Generation]) -> None:
    """Raise the refusal of more samples than the engine makes, before there is room made for each."""
    for request, generation in zip(requests, generations, strict=True):
        if request.num_samples > MANY_SAMPLES:
            try:
                await generation.accepted()
            except CierzoError as error:
                raise in_body(error, request.asked) from None


async def _prompt(house: House, call: Call, request: Request) -> Prompt:
    """The prompt, as far as it comes before the answer."""
    asked, backend = request.asked, call.engine
    if asked.stream and asked.prompt_logprobs is not None and not asked.echo:
        raise must_be("prompt_logprobs", "left out, unless echo is true or stream is false", True)
    if not asked.echo:
        return Prompt()
    token_ids = request.arguments.get("token_ids")
    text = request.prompt_text if token_ids is None else await backend.detokenize(token_ids)
    if asked.prompt_logprobs is None:
        return Prompt(text)
    tokens = await backend.tokenize(text=text) if token_ids is None else token_ids
    if not tokens:
        return Prompt(text)  # the engine refuses it
    await house.words(asked.as_token_ids).learn(backend, tokens[:1])
    return Prompt(text, tokens[0])


def _runs(
    house: House,
    call: Call,
    kind: Kind,
    head: Head,
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
    generations: Sequence[Generation],
) -> list[Run]:
    """Streams of all prompts; their choices are numbered in the order of these."""
    runs, first_index = [], 0
    for request, prompt, generation in zip(requests, prompts, generations, strict=True):
        asked = request.asked
        spelled = house.words(asked.as_token_ids)
        told = Told(
            head=head,
            words=spelled,
            num_samples=request.num_samples,
            first_index=first_index,
            reasoning=house.config.reasoning_format,
            logprobs=asked.logprobs is not None,
            has_usage=asked.include_usage,
            continuous=asked.continuous_usage,
            prompt_text=prompt.text,
            first_token=prompt.first_token,
            drops_output=asked.drops_output,
        )
        first_index += told.num_samples
        needs_words = told.logprobs or asked.prompt_logprobs is not None
        count = partial(_count, call.engine, request) if told.continuous else None
        place = partial(in_body, asked=asked)
        runs.append(Run(generation, kind.events(told), place, count, spelled if needs_words else None))
    return runs


async def _count(backend: Backend, request: Request) -> int:
    """Count the tokens of a prompt."""
    given = request.arguments
    if "token_ids" in given:
        return len(given["token_ids"])
    if "suffix" in given or request.images:
        what = "the usage so far of a text with a suffix, or of fetched images, is not told by a gateway of its own"
        raise InvalidRequest(what, field="stream_options.continuous_usage_stats", limit="left out")
    return len(await backend.tokenize(**tokenize_arguments(given)))


def _last(head: Head, has_usage: bool, runs: Sequence[Run], finals: list[Final]) -> bytes:
    """The last events of a stream: its usage, if that is asked for, and that it is done."""
    if not has_usage:
        return answers.DONE
    thoughts = sum(run.events.thought_tokens for run in runs)
    return answers.usage_event(head, answers.usage_of(finals, thoughts)) + answers.DONE


class Bounded(ResponseEvents):
    """Events of a response, whose log-probabilities are not too many to be told as a whole."""

    num_entries = 0

    def take(self, deltas: Sequence[Delta]) -> bytes:
        """Events that tell of new output. Raises InvalidRequest past `MAX_ENTRIES`."""
        entries = [entry for delta in deltas for entry in delta.logprobs or ()]
        self.num_entries += sum([1 + len(entry.top_token_ids) for entry in entries])
        if self.num_entries > MAX_ENTRIES:
            what = f"a response has at most {MAX_ENTRIES} log-probabilities, alternatives included"
            raise InvalidRequest(what, field="top_logprobs", limit=MAX_ENTRIES, value=self.num_entries)
        return super().take(deltas)


async def responses(house: House, call: Call) -> None:
    """Answer POST /v1/responses."""
    (request,) = await house.requests(call, "responses")
    asked, place = request.asked, partial(in_body, asked=request.asked)
    told = response_head(f"resp_{call.request_id}", int(time.time()), asked.model, asked.given)
    spelled = house.words(asked.as_token_ids) if asked.logprobs is not None else None
    events = Bounded(told, spelled)
    run = Run(ask(call.engine, request), events, place, words=spelled)
    if asked.stream:
        await stream(call, [run], lambda finals: b"", house.config.comment_s)
        return
    counted = Counted(house)
    try:
        async with heard(call, [run.generation]):
            while deltas := await run.generation.next_batch():
                if spelled is not None:
                    await spelled.learn_all(call.engine, deltas)
                counted.add(len(events.take(deltas)))
            require_planned(run.generation.final)
            events.end(run.generation.final)
            await call.reply(msgspec.json.encode(events.response))
    except CierzoError as error:
        raise place(error) from None
    finally:
        counted.close()


async def tokenize(house: House, call: Call) -> None:
    """Answer POST /tokenize."""
    rules = await house.rules(call.engine)
    await _tell(call, await words.tokenize(call.body, rules, call.engine, house.words()))


async def detokenize(house: House, call: Call) -> None:
    """Answer POST /detokenize."""
    await _tell(call, await words.detokenize(call.body, await house.rules(call.engine), call.engine))


async def tokenizer_info(house: House, call: Call) -> None:
    """Answer GET /tokenizer_info."""
    await _tell(call, await words.tokenizer_info(call.engine))


async def _tell(call: Call, told: words.Told) -> None:
    call.pass_over(told.passed_over)
    await call.reply(msgspec.json.encode(told.answer))
