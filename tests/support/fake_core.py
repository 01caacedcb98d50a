"""A core process that is not one: it speaks the pipe's protocol in the front end's own event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from cierzo.engine.frontend.frames import FrameSplitter, pack
from cierzo.engine.messages import (
    Abort,
    CoreCommand,
    CoreError,
    CoreStats,
    Finish,
    Message,
    ModelInfo,
    Ready,
    Shutdown,
    StepOutput,
    Submit,
    TokenDelta,
    TokenLogprobs,
)

BOS, EOS, VOCAB = 256, 257, 300
Answer = Callable[[Submit, int], list[int]]  # (request, sample) -> all its output tokens


class FakeEngineConfig(msgspec.Struct, frozen=True):
    """Stands for the EngineConfig that a core is sent."""

    name: str = "fake"


def fake_model(**changed: Any) -> ModelInfo:
    """What a fake core serves, but for some fields."""
    model = ModelInfo(
        stream=0,
        name="fake",
        architecture="none",
        dtype="float32",
        device="cpu",
        vocab_size=VOCAB,
        max_model_len=4096,
        block_tokens=16,
        num_blocks=64,
        eos_token_ids=[EOS],
        has_tokenizer=True,
        has_chat_template=True,
    )
    return msgspec.structs.replace(model, **changed)


def as_sent(command: CoreCommand) -> CoreCommand:
    """A command as a core reads it: a prompt that is packed is a list again."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=CoreCommand)


def plain_answer(submit: Submit, sample: int) -> list[int]:
    """`max_tokens` tokens that depend on prompt, seed, sample and position."""
    start = sum(submit.prompt_token_ids) + (submit.sampling.seed or 0) + 17 * sample
    return [(start + 7 * position) % 256 for position in range(submit.sampling.max_tokens)]


@dataclass
class Sequence:
    submit: Submit
    answer: list[int]
    done: int


class FakeCore(asyncio.Protocol):
    """One life of a core process: speaks the pipe's protocol, one token per running sequence and step.

    Runs freely while `gate` is set; with the gate closed, `step()` runs one step. `error` instead of Ready, if set.
    """

    def __init__(self, owner: FakeCores) -> None:
        self.owner = owner
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.hello: bytes | None = None
        self.submits: list[Submit] = []
        self.aborts: list[Abort] = []
        self.running: dict[tuple[int, int], Sequence] = {}
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
            if isinstance(command, Submit):
                self.submit(command)
            elif isinstance(command, Abort):
                self.abort(command)
            elif isinstance(command, Shutdown) and self.transport is not None:
                self.transport.close()
        self.owner.news.set()
        self.go_on()

    def submit(self, submit: Submit) -> None:
        self.submits.append(submit)
        for sample in range(submit.first_sample, submit.first_sample + submit.sampling.n):
            key = (submit.request_id, sample)
            assert key not in self.running
            answer = self.owner.answer(submit, sample)
            assert answer[: len(submit.output_token_ids)] == submit.output_token_ids
            self.running[key] = Sequence(submit, answer, len(submit.output_token_ids))

    def abort(self, abort: Abort) -> None:
        self.aborts.append(abort)
        keys = [k for k in self.running if k[0] == abort.request_id and abort.sample in (None, k[1])]
        self.say(StepOutput(deltas=[self.end(key, abort.reason) for key in keys]))

    def end(self, key: tuple[int, int], reason: str, token_ids: tuple[int, ...] = ()) -> TokenDelta:
        sequence = self.running.pop(key)
        stop = token_ids[-1] if reason == "stop" and token_ids else None
        finish = Finish(
            cast(Any, reason), "", stop, len(sequence.submit.prompt_token_ids), sequence.done, 3, 1, 0.1, 0.2, 0.3
        )
        return TokenDelta(*key, list(token_ids), self.logprobs(sequence, token_ids), finish)

    def logprobs(self, sequence: Sequence, token_ids: tuple[int, ...]) -> list[TokenLogprobs] | None:
        if sequence.submit.sampling.logprobs is None:
            return None
        return [TokenLogprobs(token, -1.0, [token, 0], [-1.0, -2.0]) for token in token_ids]

    def step(self) -> None:
        """One token for every running sequence."""
        deltas = []
        for key, sequence in list(self.running.items()):
            token = sequence.answer[sequence.done]
            sequence.done += 1
            sampling = sequence.submit.sampling
            stops = (*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS]))
            if token in stops and sequence.done >= sampling.min_tokens:
                deltas.append(self.end(key, "stop", (token,)))
            elif sequence.done == len(sequence.answer):
                deltas.append(self.end(key, "length", (token,)))
            else:
                deltas.append(TokenDelta(*key, [token], self.logprobs(sequence, (token,)), None))
        self.say(StepOutput(deltas=deltas, stats=CoreStats(running=len(self.running), total_blocks=9)))

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
