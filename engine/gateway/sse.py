"""Streams of events: an answer is told as it is made, and cancelled as soon as nobody hears it any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

from cierzo.engine.errors import CierzoError, ProtocolError
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.gateway.answers import Events
from cierzo.engine.gateway.call import Call
from cierzo.engine.gateway.errors import Headers, require_planned, stopped
from cierzo.engine.gateway.token_words import TokenWords
from cierzo.engine.messages import Delta, Final

KIND = b"text/event-stream; charset=utf-8"
HEADERS: Headers = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
COMMENT = b": \n\n"
T = TypeVar("T")
WRITE_BYTES = 16 * 1024  # of events, written at a time


class Run(NamedTuple):
    """An answer under way, and how its events are told. in_body: the error as it is told to who wrote the body.
    counting: counts the tokens of the prompt, if they are to be told as it goes; an engine elsewhere does not say.
    words: of its log-probabilities, if it has any."""

    generation: Generation
    events: Events
    in_body: Callable[[CierzoError], CierzoError]
    counting: Callable[[], Awaitable[int]] | None = None
    words: TokenWords | None = None


@asynccontextmanager
async def heard(call: Call, generations: Sequence[Generation]) -> AsyncIterator[None]:
    """Cancel what runs when the caller goes away."""
    gone = asyncio.ensure_future(call.gone())

    def cancel(done: asyncio.Future[None]) -> None:
        if not done.cancelled():
            for generation in generations:
                generation.cancel()

    gone.add_done_callback(cancel)
    try:
        yield
    finally:
        gone.cancel()


async def stream(
    call: Call, runs: Sequence[Run], last: Callable[[list[Final]], bytes], comment_s: float = 0.0
) -> None:
    """Answer by the events of all `runs`, and after a good end by those of `last`.

    What is refused before it begins is raised. What goes wrong later is told by events with the error, which are
    the last. comment_s: seconds of silence after which there is a comment; 0: none.
    """
    async with heard(call, [run.generation for run in runs]):
        counts = [await _accepted(run) for run in runs]
        await call.begin(200, KIND, HEADERS)
        for run, prompt_tokens in zip(runs, counts, strict=True):
            if events := run.events.begin(prompt_tokens):
                await call.write(events)
        try:
            finals = await together(*(_told(call, run, comment_s) for run in runs))
            await call.end(last(finals))
        except CierzoError as error:
            await call.end(runs[0].events.fail(error))
        except asyncio.CancelledError:  # as `HttpServer.close` does to what is still open
            await call.end(runs[0].events.fail(stopped()))


async def _accepted(run: Run) -> int:
    """Wait until an answer is certain to come: the number of its prompt's tokens, 0 if nobody needs it. Raises the
    refusal, and the end of a request that came to nothing before, as when its deadline passes."""
    try:
        accepted = await run.generation.accepted()
        return accepted.prompt_tokens or (0 if run.counting is None else await run.counting())
    except ProtocolError:
        require_planned(run.generation.final)
        raise
    except CierzoError as error:
        raise run.in_body(error) from None


async def together(*asked: Coroutine[Any, Any, T]) -> list[T]:
    """The results of all; the first that fails ends the others."""
    if len(asked) == 1:
        return [await asked[0]]
    tasks = [asyncio.ensure_future(each) for each in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _told(call: Call, run: Run, comment_s: float) -> Final:
    """Tell an answer to its end. Raises the CierzoError that its end is."""
    try:
        await _tell(call, run, comment_s or None)
        await call.write(run.events.end(run.generation.final))
        return run.generation.final
    except CierzoError as error:
        raise run.in_body(error) from None


async def _tell(call: Call, run: Run, timeout_s: float | None) -> None:
    """Tell what comes until nothing more does. What is told is used, and not before: the engine makes no more than
    a reader takes."""
    generation, events = run.generation, run.events
    while True:
        try:
            deltas, cost = await generation.take_batch(timeout_s)
        except TimeoutError:
            await call.write(COMMENT)
            continue
        if not deltas:
            return
        if run.words is not None:
            await run.words.learn_all(call.engine, deltas)
        if len(deltas) > 1:
            cost -= await _write(call, run, deltas)
        elif told := events.take(deltas):
            await call.write(told)
        generation.used(cost)


async def _write(call: Call, run: Run, deltas: Sequence[Delta]) -> int:
    """Write the events of many deltas, a bounded part at a time; the cost of those that are known to be used."""
    waiting, cost, used = bytearray(), 0, 0
    for delta in deltas:
        waiting += run.events.take([delta])
        cost += delta_cost(delta)
        if len(waiting) >= WRITE_BYTES:
            await call.write(bytes(waiting))
            waiting.clear()
            run.generation.used(cost)
            used, cost = used + cost, 0
    if waiting:
        await call.write(bytes(waiting))
    return used
