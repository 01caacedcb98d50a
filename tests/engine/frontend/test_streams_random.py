"""Random lives of streams: generate, cancel, resume, keys, credit, lost connections, dying cores.

In one thread, without sockets, in a loop whose time is a number: every run repeats. What must hold is in `World`.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from typing import Any, cast

import pytest
from fake_core import as_sent
from msgspec.msgpack import decode, encode

from cierzo.engine.errors import CierzoError, InvalidRequest, NotFound, Overloaded
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.outlet import BOUND_TOKENS
from cierzo.engine.frontend.tenants import EVERYBODY
from cierzo.engine.messages import (
    Abort,
    Accepted,
    Credit,
    Delta,
    Failure,
    Final,
    Finish,
    Generate,
    Resume,
    SamplingParams,
    ServerMessage,
    StepOutput,
    TokenDelta,
    TokenLogprobs,
)
from cierzo.engine.testing.local_encoders import local_encoders
from cierzo.scheduler.plan import packed_entry

CONFIG = FrontendConfig(
    stream_credit_bytes=1024,
    max_pending_bytes=120,
    max_answer_bytes=3000,
    max_kept_bytes=40_000,
    orphan_s=5.0,
    idempotency_s=60.0,
    slow_reader_s=10.0,
    max_streams_per_connection=6,
    max_open_samples=12,
)
STOP = "Q"


def answer(prompt, sample, count):
    """Every token of a sample."""
    return [(sum(prompt) * 31 + 17 * sample + 7 * position * position) % 128 for position in range(count)]


def entry(token):
    return TokenLogprobs(token, -float(token), [token], [-1.0])


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop in which time passes when told."""

    now = 1000.0

    def time(self):
        return self.now


class ScriptedCore:
    """What a core does, when told: one token for every sequence it has."""

    def __init__(self):
        self.sequences = {}

    def forgive(self):
        pass

    def send(self, command):
        command = as_sent(command)
        if isinstance(command, Abort):
            for key in [k for k in self.sequences if k[0] == command.request_id and command.sample in (None, k[1])]:
                self.ended.append(self._end(key, command.reason, []))
            return
        for sample in range(command.first_sample, command.first_sample + command.sampling.n):
            whole = answer(command.prompt_token_ids, sample, command.sampling.max_tokens)
            done = len(command.output_token_ids)
            assert command.output_token_ids == whole[:done]
            is_scored = command.sampling.prompt_logprobs is not None and sample == command.first_sample
            left = command.prompt_token_ids[1 + command.num_scored :] if is_scored else []
            self.sequences[command.request_id, sample] = [command, whole, done, left]

    @property
    def ended(self):
        return self.__dict__.setdefault("_ended", [])

    def step(self):
        deltas, self._ended = self.ended, []
        for key, sequence in [*self.sequences.items()]:
            command, whole, done, left = sequence
            if left:
                sequence[3] = left[7:]
                deltas.append(TokenDelta(*key, [], None, None, [packed_entry(entry(token)) for token in left[:7]]))
                continue
            token_ids, sequence[2] = whole[done : done + 1], done + 1
            if done + 1 == len(whole):
                deltas.append(self._end(key, "length", token_ids))
            else:
                deltas.append(TokenDelta(*key, token_ids, self._logprobs(command, token_ids), None))
        return StepOutput(deltas=deltas)

    def _end(self, key, reason, token_ids):
        command, _, done, _ = self.sequences.pop(key)
        end = Finish(reason, "", None, len(command.prompt_token_ids), done, 0, 0, 0.0, 0.0, 0.0)
        return TokenDelta(*key, token_ids, self._logprobs(command, token_ids), end)

    def _logprobs(self, command, token_ids):
        return None if command.sampling.logprobs is None else [entry(token) for token in token_ids]


class Copy:
    """A client's copy of one request."""

    def __init__(self, message):
        self.message = message
        self.name = ""
        self.cancelled = False  # by a client: then what was not sent is dropped
        self.token_ids = defaultdict(list)
        self.texts = defaultdict(str)
        self.logprobs = defaultdict(list)
        self.scores = []
        self.tails = defaultdict(str)


class FakeSink:
    """A connection and its client; `reads` false: it takes nothing."""

    def __init__(self, features):
        self.features = frozenset(features)
        self.access, self.peer = EVERYBODY, "a test"
        self.is_paused = False
        self.num_taken = 0
        self.open = {}  # stream id -> Copy
        self.ended = []
        self.spent = defaultdict(int)  # cost of deltas that were not given back
        self.max_spent = 0

    def put(self, message):
        assert not (self.is_paused and isinstance(message, Delta | Final)), "sent into a full connection"
        message = decode(encode(message), type=ServerMessage)
        copy = self.open[message.stream]
        if isinstance(message, Accepted):
            assert not copy.name or copy.name == message.request_id
            copy.name = message.request_id
        elif isinstance(message, Delta):
            if "resume" in self.features:
                assert copy.name, "accepted comes first"
            self.spent[message.stream] += delta_cost(message)
            self._take(copy, message)
        elif isinstance(message, Final | Failure):
            del self.open[message.stream]
            self.spent.pop(message.stream, None)
            self.ended.append((copy, message))

    def _take(self, copy, delta):
        copy.token_ids[delta.sample] += delta.token_ids
        copy.logprobs[delta.sample] += delta.logprobs or []
        copy.scores += delta.prompt_logprobs
        (copy.texts if delta.token_ids else copy.tails)[delta.sample] += delta.text


class World:
    """Everything, and the moves that a run draws from."""

    def __init__(self, prompts, model, seed):
        self.draw = random.Random(seed)
        self.loop = cast(VirtualLoop, asyncio.get_running_loop())
        self.core = ScriptedCore()
        self.frontend = Frontend(
            CONFIG, model, prompts, self.core, local_encoders(prompts, CONFIG, model), self.loop.time
        )
        self.frontend.core.ready()
        self.sinks = []
        self.lost = []  # copies whose connection is gone
        self.kept = []  # copies of what has ended
        self.begun = defaultdict(set)  # key -> request ids under it
        self.next_stream = 0
        self.num_forgotten = 0
        self.too_long = []

    def move(self):
        moves = [self.generate] * 4 + [self.step] * 8 + [self.give] * 4 + [self.connect, self.disconnect]
        moves += [self.resume, self.resume, self.cancel, self.pause, self.write, self.wait, self.die, self.repeat]
        moves += [self.cancel_request]
        self.draw.choice(moves)()

    def connect(self):
        if len(self.sinks) < 4:
            features = self.draw.choice([(), ("resume",), ("credit",), ("resume", "credit")])
            sink = FakeSink((*features, "prompt_logprobs"))
            self.sinks.append(sink)
            self.frontend.connect(sink)

    def disconnect(self):
        if self.sinks:
            sink = self.sinks.pop(self.draw.randrange(len(self.sinks)))
            self.frontend.disconnect(sink)
            self.lost += [copy for copy in sink.open.values() if copy.name]
            self.collect(sink)
            sink.open.clear()

    def generate(self):
        if self.sinks:
            draw, sink = self.draw, self.draw.choice(self.sinks)
            keyed = "resume" in sink.features and draw.random() < 0.4
            sampling = SamplingParams(
                n=draw.randint(1, 3),
                max_tokens=draw.randint(1, 60),
                logprobs=draw.choice([None, 1]),
                prompt_logprobs=draw.choice([None, None, 1]),
                stop=draw.choice([(), (STOP,), ("zzz",)]),
                seed=5,
            )
            prompt = [draw.randint(0, 99) for _ in range(draw.choice([1, 1, 70]))]
            key = f"key {draw.randint(0, 9)}" if keyed else None
            self.ask(sink, Generate(stream=0, token_ids=prompt, sampling=sampling, idempotency_key=key))

    def repeat(self):
        """A client that has lost its answer asks for it again."""
        copies = [copy for copy in self.lost if copy.message.idempotency_key]
        sinks = [sink for sink in self.sinks if "resume" in sink.features]
        if copies and sinks:
            self.ask(self.draw.choice(sinks), self.draw.choice(copies).message)

    def ask(self, sink, message):
        self.next_stream += 1
        message = cast(Any, message).__class__(**{**_fields(message), "stream": self.next_stream})
        sink.open[message.stream] = copy = Copy(message)
        try:
            self.frontend.generate(sink, message)
        except CierzoError as error:
            sink.put(failure(message.stream, error))
        key = message.idempotency_key
        if key is not None and copy.name:
            self.begun[key, self.frontend.keeper._keys["default", key].digest].add(copy.name)

    def resume(self):
        """Go on with a lost answer, or take one over, from a token that the client has."""
        sinks = [sink for sink in self.sinks if "resume" in sink.features]
        taken = [copy for sink in self.sinks for copy in sink.open.values() if copy.name]
        copies = self.lost + self.kept + taken
        if not sinks or not copies:
            return
        copy, sink = self.draw.choice(copies), self.draw.choice(sinks)
        self.next_stream += 1
        received = [self.draw.randint(0, len(copy.token_ids[i])) for i in range(copy.message.sampling.n)]
        num_scores = self.draw.choice([0, self.draw.randint(0, len(copy.scores)), len(copy.scores)])
        sink.open[self.next_stream] = again = Copy(copy.message)
        again.scores = copy.scores[:num_scores]
        again.name = copy.name
        for index, offset in enumerate(received):
            again.token_ids[index] = copy.token_ids[index][:offset]
            again.logprobs[index] = copy.logprobs[index][:offset]
            again.texts[index] = None if offset < len(copy.token_ids[index]) else copy.texts[index]
        for index in range(copy.message.sampling.n):
            if again.texts[index] is None:
                again.texts[index] = self.text_of(again, index)
        try:
            places = {"received": received, "prompt_received": num_scores}
            self.frontend.resume(sink, Resume(stream=self.next_stream, request_id=copy.name, **places))
        except (NotFound, Overloaded, InvalidRequest) as error:
            self.num_forgotten += 1
            sink.put(failure(self.next_stream, error))
            if isinstance(error, InvalidRequest):
                self.too_long.append(error.message)

    def text_of(self, copy, index):
        detokenizer = self.frontend._arrivals._prompts.reader(copy.message.sampling)
        return detokenizer.push(copy.token_ids[index])

    def give(self):
        for sink in self.sinks:
            for stream, spent in [*sink.spent.items()]:
                sink.max_spent = max(sink.max_spent, spent)
                if spent and "credit" in sink.features and self.draw.random() < 0.5:
                    sink.spent[stream] = 0
                    self.frontend.credit(sink, Credit(stream=stream, bytes=spent))

    def cancel(self):
        if self.sinks and (sink := self.draw.choice(self.sinks)).open:
            stream = self.draw.choice([*sink.open])
            sink.open[stream].cancelled = True
            self.frontend.cancel(sink, stream)

    def cancel_request(self):
        if self.lost:
            copy = self.draw.choice(self.lost)
            for reader in (reader for sink in self.sinks for reader in sink.open.values()):
                reader.cancelled |= reader.name == copy.name
            try:
                self.frontend.cancel_request(FakeSink(()), copy.name)
            except NotFound:
                self.num_forgotten += 1

    def pause(self):
        if self.sinks:
            self.draw.choice(self.sinks).is_paused = True

    def write(self):
        for sink in self.sinks:
            if sink.is_paused:
                sink.is_paused = False
                self.frontend.writable(sink)

    def wait(self):
        self.loop.now += self.draw.choice([0.1, 1.0, 4.0])

    def step(self):
        self.frontend.core.step(self.core.step())

    def die(self):
        if self.draw.random() < 0.2:
            self.core.sequences.clear()
            self.core._ended = []
            self.frontend.core.lost(committed=True)
            self.frontend.core.ready()

    def collect(self, sink):
        for copy, last in sink.ended:
            self.check(copy, last)
            if copy.name:
                self.kept.append(copy)
        sink.ended.clear()

    def check(self, copy, last):
        """What one reader has got is a beginning of the reference, and all of it if the answer is complete."""
        params = copy.message.sampling
        scores = (
            [entry(token) for token in copy.message.token_ids[1:]] if params.prompt_logprobs is not None else []
        )
        assert copy.scores == scores[: len(copy.scores)]
        ends = [end.finish_reason for end in last.samples] if isinstance(last, Final) else ["none"]
        if not copy.cancelled and {*ends} <= {"length", "stop"}:
            assert copy.scores == scores
        for index in range(params.n):
            whole = answer(copy.message.token_ids, index, params.max_tokens)
            got = copy.token_ids[index]
            assert got == whole[: len(got)]
            detokenizer = self.frontend._arrivals._prompts.reader(params)
            text = detokenizer.push(got)
            if isinstance(last, Final) and last.samples[index].output_tokens == len(got):
                text += detokenizer.flush()
            assert copy.texts[index] + copy.tails[index] in (text, self.text_of(copy, index))
            if params.logprobs is not None:
                assert [e.token_id for e in copy.logprobs[index]] == got
            if isinstance(last, Final) and not copy.cancelled:
                assert len(got) == last.samples[index].output_tokens

    def invariants(self):
        streams = [*self.frontend.streams]
        registry = self.frontend.streams
        assert registry.num_samples == sum(stream.num_samples for stream in streams)
        assert registry.num_tokens == sum(stream.num_tokens for stream in streams)
        (book,) = self.frontend.tenancy.books()
        assert book.num_tokenless == sum(stream.first_token_s is None for stream in streams)
        assert (book.num_requests, book.num_tokens) == (len(streams), registry.num_tokens)
        assert registry.num_read == sum(len(registry.of(sink)) for sink in self.sinks)
        for sink in self.sinks:
            assert set(registry.of(sink)) == set(sink.open)
        for stream in streams:
            flushed = stream.sink is not None and stream.flows
            assert not (flushed and stream.unsent)
            assert not (stream.paused and stream.sent_s is not None)
            assert stream.num_bytes <= CONFIG.max_answer_bytes + CONFIG.max_pending_bytes + 3 * BOUND_TOKENS * 40
        assert all("max_answer_bytes" in message for message in self.too_long)
        for names in self.begun.values():
            assert len(names) == 1
        assert self.frontend.keeper.kept_bytes <= CONFIG.max_kept_bytes
        kept = [num_bytes for each in self.frontend.keeper._kept.values() for num_bytes in each.values()]
        assert self.frontend.keeper.kept_bytes == sum(kept)


def _fields(message):
    return {name: getattr(message, name) for name in message.__struct_fields__}


async def _live(prompts, model, seed):
    world = World(prompts, model, seed)
    world.connect()
    for _ in range(150):
        world.move()
        await _turns()
        for sink in world.sinks:
            world.collect(sink)
        world.invariants()
    await _finish(world)


async def _turns():
    for _ in range(4):
        await asyncio.sleep(0)


async def _finish(world):
    """All readers read, the core runs, time passes: then nothing is left."""
    for _ in range(70):
        world.write()
        world.give()
        world.step()
        world.loop.now += 0.2
        await _turns()
    for sink in [*world.sinks]:
        world.collect(sink)
        assert not sink.open
    while world.sinks:
        world.disconnect()
    world.loop.now += CONFIG.orphan_s + 1
    await _turns()
    world.step()
    world.loop.now += CONFIG.idempotency_s + CONFIG.orphan_s + 1
    await _turns()
    frontend = world.frontend
    registry, keeper, outlets = frontend.streams, frontend.keeper, frontend.outlets
    (book,) = frontend.tenancy.books()
    sums = (registry.num_samples, registry.num_tokens, book.num_tokenless, registry.num_read, len(registry))
    assert sums == (0, 0, 0, 0, 0)
    assert all(
        not pool.num
        for pool in frontend.tenancy.pools.values()
        if pool is not frontend.tenancy.pools["max_connections"]
    )
    assert (len(keeper), keeper.kept_bytes, keeper._keys, keeper._kept) == (0, 0, {}, {})
    assert not frontend.core._runs
    assert not world.core.sequences
    expiries = (keeper._orphans, keeper._ended, keeper._ended_keys, outlets._slow)
    assert [expiry._timer for expiry in expiries] == [None] * 4
    assert (outlets._ready, outlets._waiting, outlets._turn) == ({}, {}, None)
    counters = frontend.counters
    assert counters.accepted >= counters.finished
    await frontend.close()


@pytest.mark.parametrize("seed", range(150))
def test_random_lives(prompts, model_info, seed):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(_live(prompts, model_info, seed))
