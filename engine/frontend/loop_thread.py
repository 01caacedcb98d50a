"""An event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

from cierzo.engine.errors import ConnectionLost

T = TypeVar("T")


class LoopThread:
    """A loop in which any thread may `run` coroutines, until one calls `close`.

    `exits` holds contexts that are left, within the loop, when it ends.
    """

    def __init__(self, name: str) -> None:
        self.exits = AsyncExitStack()
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._ending = asyncio.Event()
        self._is_closed = False
        self._lock = threading.Lock()  # nothing reaches the loop behind `_ending`, where nobody would run it
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def run(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the coroutine that `ask` makes. Raises ConnectionLost once `close` is called."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        try:
            with self._lock:
                if self._is_closed:
                    raise ConnectionLost("this client is closed")
                self._loop.call_soon_threadsafe(self._start, ask, answer)
            return answer.result()
        except concurrent.futures.CancelledError:  # the loop has ended meanwhile
            raise ConnectionLost("this client is closed") from None
        except BaseException:
            answer.cancel()  # an interrupt here must not leave it running there
            raise

    def _start(self, ask: Callable[[], Coroutine[Any, Any, T]], answer: concurrent.futures.Future[T]) -> None:
        """Ask in the loop's thread. In the caller's, an interrupt could come between a coroutine's making and its
        start."""
        task = self._loop.create_task(_asked(ask))
        task.add_done_callback(lambda _: _settle(answer, task))
        answer.add_done_callback(lambda _: self._stop(answer, task))

    def _stop(self, answer: concurrent.futures.Future[T], task: asyncio.Task[T]) -> None:
        """Cancel the task if nobody waits for it any more."""
        if answer.cancelled():
            with suppress(RuntimeError):  # the loop has ended, and the task with it
                self._loop.call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        """Leave the contexts in `exits`, cancel what still runs, end the thread. It may be called again."""
        with self._lock:
            self._is_closed = True
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()

    def _live(self) -> None:
        with self._runner:  # which cancels, at its end, what still runs
            self._runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        async with self.exits:
            await self._ending.wait()


async def _asked(ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """As the coroutine that `ask` makes; what `ask` itself raises is the task's error too."""
    return await ask()


def _settle(answer: concurrent.futures.Future[T], task: asyncio.Task[T]) -> None:
    """Hand a task's end to who waits for it."""
    error = None if task.cancelled() else task.exception()
    if task.cancelled():
        answer.cancel()
    elif not answer.set_running_or_notify_cancel():
        return  # nobody waits for it any more
    elif error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(task.result())
