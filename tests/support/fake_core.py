"""A core process that is not one: it speaks the pipe's protocol in the front end's own event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import msgspec

from cierzo.engine.frontend.frames import FrameSplitter, pack
from cierzo.engine.messages import (
    Abort,
    CoreCommand,
    CoreError,
    Message,
    Pixels,
    Ready,
    Shutdown,
    Submit,
    Vocabulary,
)
from cierzo.engine.testing import fake_core
from cierzo.engine.testing.fake_core import Answer, plain_answer


class FakeEngineConfig(msgspec.Struct, frozen=True):
    """Stands for the EngineConfig that a core is sent."""

    name: str = "fake"


def as_sent(command: CoreCommand) -> CoreCommand:
    """A command as a core reads it: a prompt that is packed is a list again."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=CoreCommand)


class FakeCore(asyncio.Protocol, fake_core.FakeCore):
    """One life of a core process: speaks the pipe's protocol, one token per running sequence and step.

    Runs freely while `gate` is set; with the gate closed, `step()` runs one step. `error` instead of Ready, if set.
    """

    def __init__(self, owner: FakeCores) -> None:
        fake_core.FakeCore.__init__(self, lambda submit, sample: owner.answer(submit, sample))
        self.owner = owner
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.hello: bytes | None = None
        self.vocabulary: Vocabulary | None = None
        self.heard: list[CoreCommand] = []  # all but the vocabulary
        self.splitter = FrameSplitter(1 << 30)
        self.transport: asyncio.Transport | None = None
        self.scheduled = False
        self.deaf = False  # hears nothing, and says nothing unless told to: as if stopped

    pid = 0  # it gives no signs of life: nobody looks for its process

    async def wait(self) -> int:
        return await asyncio.shield(self.exited)

    def kill(self) -> None:
        """What the link calls, and what a test calls to see the core die."""
        if self.exited.done():
            raise ProcessLookupError
        if self.transport is not None:
            self.transport.abort()
        self.exited.set_result(-9)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.exited.done():
            self.exited.set_result(0)

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        for body in self.splitter.feed(data):
            if self.hello is None:
                self.hello = bytes(body)
                if self.owner.silent:
                    self.owner.news.set()
                    return
                error = self.owner.error
                self.say(Ready(startup="fake core") if error is None else error)
                if error is not None:
                    self.kill()
                continue
            command = msgspec.msgpack.decode(body, type=CoreCommand)
            if isinstance(command, Pixels | Submit | Abort):
                self.heard.append(command)
            if isinstance(command, Submit):
                self.take(command)
            elif isinstance(command, Vocabulary):
                assert not self.submits, "it takes half a second, in which nothing else goes on"
                self.vocabulary = command
            elif isinstance(command, Abort):
                self.abort(command)
            elif isinstance(command, Shutdown) and self.transport is not None:
                self.transport.close()
        self.owner.news.set()
        self.go_on()

    def abort(self, abort: Abort) -> None:
        """End a request, and say so."""
        self.say(self.drop(abort))

    def step(self) -> None:
        """One token for every running sequence."""
        self.say(self.make())

    def go_on(self) -> None:
        if not self.scheduled and self.running and self.owner.free and self.transport is not None:
            self.scheduled = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self.scheduled = False
        if self.running and self.owner.free and not self.deaf and not self.exited.done():
            self.step()
            self.go_on()

    def say(self, message: Message) -> None:
        assert self.transport is not None
        self.transport.write(pack([message]))


@dataclass
class FakeCores:
    """The `Spawn` of the tests: every core that was started, and how they behave."""

    answer: Answer = plain_answer
    free: bool = True
    error: CoreError | None = None
    silent: bool = False
    lives: list[FakeCore] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, path: str) -> FakeCore:
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
        core = FakeCore(self)
        self.lives.append(core)
        await asyncio.get_running_loop().create_unix_connection(lambda: core, path)
        return core

    @property
    def now(self) -> FakeCore:
        """The one that lives."""
        return self.lives[-1]

    def go_on(self) -> None:
        """Have this core and all after it run freely."""
        self.free = True
        self.now.go_on()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until `condition` holds; it is looked at whenever a command has come."""
        while not condition():
            self.news.clear()
            await self.news.wait()
