"""Encoder processes: their answers, which job is next, and what happens when one dies, hangs or is not wanted."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from types import SimpleNamespace

import msgspec
import pytest
from byte_words import byte_level

from cierzo.engine.errors import CierzoError, InvalidRequest, Overloaded
from cierzo.engine.frontend import encoders as pool
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoders import SHORT_BYTES, Encoders, Late, spawn_encoder
from cierzo.engine.frontend.encoding import Encoded, Job, RequestEncoder, Setup
from cierzo.engine.messages import ChatMessage, Failure, Generate, ModelInfo, SamplingParams, Tool
from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.template_chat import TemplateChat

FAR = 1e12
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = f"{{{{ messages[0].content }}}}{{% if messages[0].content[0] == '!' %}}{LOOPS}{{% endif %}}"


@pytest.fixture
def checkpoint(tmp_path):
    """A folder whose chat template runs in circles for a message that begins with "!"."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


@pytest.fixture
def setup(checkpoint, model_info):
    return Setup(checkpoint=str(checkpoint), frontend=FrontendConfig(), model=model_info)


class Spawned:
    """Real processes, kept to be looked at."""

    def __init__(self):
        self.processes = []
        self.asked = asyncio.Queue()

    async def __call__(self, path):
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
        process = await spawn_encoder(path)
        self.processes.append(process)
        return process

    def all_gone(self):
        return all(process.returncode is not None for process in self.processes)


@pytest.fixture
def spawned(monkeypatch):
    """Hears of every job that a process gets."""
    spawned, ask = Spawned(), pool._Pipe.ask

    async def tell(self, frames):
        spawned.asked.put_nowait(self)
        return await ask(self, frames)

    monkeypatch.setattr(pool._Pipe, "ask", tell)
    return spawned


@asynccontextmanager
async def running(setup, spawned, **limits):
    encoders = Encoders(msgspec.structs.replace(setup.frontend, **limits), setup, spawned)
    encoders.start()
    try:
        yield encoders
    finally:
        await encoders.close()
        assert spawned.all_gone()
        assert encoders.budget.num_bytes == 0


def submit(encoders, message, deadline_at_s=FAR, attached=None, features=("attach",)):
    job = Job(stream=message.stream, features=[*features], has_attached=attached is not None)
    pieces = [] if attached is None else attached
    return encoders.submit(job, msgspec.msgpack.encode(message), pieces, deadline_at_s)


def said(text, stream=1):
    return Generate(stream=stream, messages=[ChatMessage(role="user", content=text)])


def ids_of(encoded):
    return msgspec.msgpack.decode(encoded.submit.prompt_token_ids)


def test_a_process_answers_as_the_front_end_would(run, setup, spawned, prompts):
    async def body():
        async with running(setup, spawned) as encoders:
            text = await submit(
                encoders, Generate(stream=3, text="hi", sampling=SamplingParams(seed=7), priority=2)
            )
            assert ids_of(text) == prompts.encode(Generate(stream=3, text="hi")).token_ids
            assert (text.num_prompt_tokens, text.submit.priority, text.submit.sampling.seed) == (3, 2, 7)
            assert (text.message.stream, text.message.text) == (3, None)
            chat = await submit(encoders, said("yes"))
            assert bytes(ids_of(chat)) == b"yes"
            ids = await submit(encoders, Generate(stream=1, token_ids=[5, 6]))
            assert (ids_of(ids), ids.submit.sampling.seed) == ([5, 6], None)
            data = msgspec.msgpack.encode([7, 8])
            pieces = [data[:1], memoryview(data)[1:]]
            attached = await submit(encoders, Generate(stream=1, attached="token_ids"), attached=pieces)
            assert ids_of(attached) == [7, 8]

    run(body())


def test_a_request_with_a_key_has_a_digest_of_all_that_is_asked(run, setup, spawned):
    async def body():
        features = ("attach", "resume")
        async with running(setup, spawned) as encoders:

            async def content(message, attached=None):
                answer = submit(encoders, message, attached=attached, features=features)
                return (await answer).content

            first = Generate(stream=1, text="hi", idempotency_key="a", deadline_s=5.0)
            same = Generate(stream=2, attached="text", idempotency_key="b")
            assert await content(first) == await content(same, [b"\xa2hi"]) != b""
            assert await content(first) != await content(same, [b"\xa2ho"])
            biases = [
                SamplingParams(logit_bias=dict(pairs)) for pairs in (((1, 1.0), (2, 2.0)), ((2, 2.0), (1, 1.0)))
            ]
            one, other = [await content(msgspec.structs.replace(first, sampling=bias)) for bias in biases]
            assert one == other
            assert await content(Generate(stream=1, text="hi")) == b""

    run(body())


REFUSED = {
    "outside the vocabulary": (Generate(stream=1, token_ids=[5000]), None, "token_ids", "300"),
    "too long": (Generate(stream=1, token_ids=[1] * 5000), None, "token_ids", "no room"),
    "cannot fit": (Generate(stream=1, text="x" * 50_000), None, "text", "cannot fit"),
    "a parameter": (Generate(stream=1, text="x", sampling=SamplingParams(top_k=-1)), None, "sampling.top_k", "-1"),
    "nothing attached": (Generate(stream=1, attached="text"), None, "attached", "nothing"),
    "not said what": (Generate(stream=1, text="x"), b"\xa1x", "attached", "does not say"),
    "attached and given": (Generate(stream=1, text="x", attached="text"), b"\xa1x", "attached", "exactly one"),
    "attached garbage": (Generate(stream=1, attached="text"), b"\xc1", "text", "attached text"),
    "attached too many": (
        Generate(stream=1, attached="token_ids"),
        b"\xdd\x00\xff\xff\xff",
        "token_ids",
        "16777215",
    ),
    "attached turns": (Generate(stream=1, attached="messages"), b"\xdc\x10\x01", "messages", "4097"),
    "attached field": (Generate(stream=1, attached="stream"), b"\x01", "attached", "allowed"),
    "a stream of another name": (b"\x82\xa4type\xa8generate\xa6stream\x02", None, "stream", "twice"),
    "an unknown field": (b"\x83\xa4type\xa8generate\xa6stream\x01\xa1x\x02", None, "x", "unknown"),
}


def test_what_is_refused_is_refused_by_name(run, setup, spawned):
    async def body():
        async with running(setup, spawned) as encoders:
            for case, (message, attached, field, words) in REFUSED.items():
                data = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
                job = Job(stream=1, features=["attach"], has_attached=attached is not None)
                with pytest.raises(InvalidRequest) as caught:
                    await encoders.submit(job, data, [] if attached is None else [attached], FAR)
                assert caught.value.field == field, case
                assert words in caught.value.message, case
            with pytest.raises(InvalidRequest, match="needs the feature attach"):
                await submit(encoders, Generate(stream=1, attached="text"), attached=[b"\xa1x"], features=())
            assert (await submit(encoders, Generate(stream=1, text="x"))).num_prompt_tokens == 2
            assert len(spawned.processes) == 2

    run(body())


def test_a_job_whose_process_dies_is_tried_again_and_then_given_up(run, setup, spawned):
    async def body():
        async with running(setup, spawned) as encoders:
            hangs = submit(encoders, said("!"))
            for _ in range(pool.MAX_TRIES):
                pipe = await spawned.asked.get()
                pipe.transport.abort()
            with pytest.raises(CierzoError, match="died") as caught:
                await hangs
            assert caught.value.code == "internal"
            assert bytes(ids_of(await submit(encoders, said("fine")))) == b"fine"

    run(body())


def test_a_process_that_is_killed_in_the_middle_is_replaced_and_its_job_done(run, setup, spawned):
    async def body():
        async with running(setup, spawned) as encoders:
            await submit(encoders, Generate(stream=1, text="x"))  # both have begun
            await spawned.asked.get()
            for process in spawned.processes:
                process.send_signal(signal.SIGSTOP)
            answer = submit(encoders, Generate(stream=1, text="word " * 600))
            await spawned.asked.get()
            for process in spawned.processes:
                process.kill()
            assert (await answer).num_prompt_tokens == 3001
            assert len(spawned.processes) >= 3

    run(body())


def _impatient(monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE_S", 0.3)
    monkeypatch.setattr(pool, "SLOWEST", 0.0)
    monkeypatch.setattr(pool, "LOOK_AGAIN_S", 0.05)


def test_processes_that_are_stopped_are_replaced_and_their_job_is_done(run, setup, spawned, monkeypatch):
    """However many of them are stopped: the job is not to blame."""
    _impatient(monkeypatch)

    async def body():
        async with running(setup, spawned) as encoders:
            await submit(encoders, Generate(stream=1, text="x"))
            while len(spawned.processes) < 2 or any(seat.pipe is None for seat in encoders._seats):
                await asyncio.sleep(0.01)
            await asyncio.gather(*(seat.pipe.loaded for seat in encoders._seats))
            for process in spawned.processes[:]:
                process.send_signal(signal.SIGSTOP)
            answer = submit(encoders, Generate(stream=1, text="word " * 600))
            assert (await answer).num_prompt_tokens == 3001
            assert len(spawned.processes) > 2

    run(body())


def test_a_job_at_which_processes_do_nothing_is_given_up(run, setup, spawned, monkeypatch):
    _impatient(monkeypatch)
    monkeypatch.setattr(pool, "process_state", lambda pid: "S")

    async def body():
        async with running(setup, spawned) as encoders:
            with pytest.raises(CierzoError, match="hung") as caught:
                await submit(encoders, said("!"))
            assert caught.value.code == "internal"
            assert spawned.asked.qsize() == pool.MAX_TRIES

    run(body())


def test_a_job_that_takes_long_is_let_be_while_its_process_works(run, setup, spawned, monkeypatch):
    _impatient(monkeypatch)
    looks, found = [], pool.process_state

    def look(pid):
        looks.append(found(pid))
        return looks[-1]

    monkeypatch.setattr(pool, "process_state", look)

    async def body():
        async with running(setup, spawned) as encoders:
            answer = submit(encoders, said("!"))
            while len(looks) < 10:
                await asyncio.sleep(0.01)
            assert not answer.done()
            assert spawned.asked.qsize() == 1
            answer.cancel()

    run(body())


def test_a_deadline_ends_a_job_that_waits_and_one_that_runs(run, setup, spawned, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 0.1)

    async def body():
        async with running(setup, spawned) as encoders:
            with pytest.raises(InvalidRequest):  # by the one process that takes long ones, which has started then
                await submit(encoders, said("x" * SHORT_BYTES))
            spawned.asked.get_nowait()
            late_s, long = encoders._clock() + 1.5, said("!" + "x" * SHORT_BYTES)
            first, second = submit(encoders, long, late_s), submit(encoders, long, late_s + 1e-3)
            await spawned.asked.get()
            for answer in (first, second):
                with pytest.raises(Late):
                    await answer
            assert (await submit(encoders, Generate(stream=1, token_ids=[1] * 300))).num_prompt_tokens == 300
            assert bytes(ids_of(await submit(encoders, said("short")))) == b"short"

    run(body())


def test_jobs_that_nobody_waits_for_are_dropped_and_their_bytes_let_go(run, setup, spawned):
    async def body():
        async with running(setup, spawned, max_unencoded_bytes=3000) as encoders:
            waiting = [submit(encoders, Generate(stream=1, text="x" * 900)) for _ in range(3)]
            with pytest.raises(Overloaded) as caught:
                submit(encoders, Generate(stream=1, text="x" * 900))
            assert caught.value.field == "max_unencoded_bytes"
            for answer in waiting[:2]:
                answer.cancel()
            await asyncio.sleep(0)
            submit(encoders, Generate(stream=1, text="x" * 900)).cancel()
            assert (await waiting[2]).num_prompt_tokens == 901
            assert spawned.asked.qsize() == 1

    run(body())


def test_the_shortest_goes_first_but_none_waits_for_ever(run, setup):
    async def body():
        now = 1000.0
        encoders = Encoders(setup.frontend, setup, clock=lambda: now)
        long_seat, short_seat = encoders._seats
        lengths = (2_000_000, 900_000, 1_000, 300_000)
        answers = [submit(encoders, Generate(stream=n, text="x" * n)) for n in lengths]
        now += 1.5
        answers.append(submit(encoders, Generate(stream=1_600, text="x" * 1_600_000)))
        answers.append(submit(encoders, Generate(stream=2_000, text="x" * 2_000)))
        order = []
        for seat in (short_seat, short_seat, short_seat, *[long_seat] * 4):
            if (ticket := encoders._next(seat)) is not None:
                order.append(round(ticket.length_bytes, -3))
                encoders._over(ticket)
        assert order == [1_000, 2_000, 300_000, 900_000, 2_000_000, 1_600_000]
        assert encoders.budget.num_bytes == 0
        for answer in answers:
            answer.cancel()

    run(body())


def test_an_image_takes_the_turn_the_patience_and_the_rate_of_a_long_text(run, setup):
    """A file of 90 bytes may hold a picture that takes long: its process is not taken for one that hangs."""

    async def ask(frames):
        assert frames[2] == [b"x" * 90]
        nonlocal now
        now += 10
        return "done"

    async def body():
        nonlocal now
        encoders = Encoders(setup.frontend, setup, clock=lambda: now)
        long_seat, _ = encoders._seats
        job, body = Job(stream=1, features=[], has_attached=False), msgspec.msgpack.encode(said("hi"))
        within = [said([{"type": "image", "url": "DATA:image/png;base64,AAAA"}])]
        within.append(Generate(stream=1, token_ids=[5], images=[b"x" * 90]))
        answers = [submit(encoders, message) for message in within]
        answers.append(encoders.submit(job, body, [], FAR, images=[[b"x" * 90]]))
        assert encoders._next(encoders._seats[1]) is None
        *others, seen = (encoders._next(long_seat) for _ in answers)
        assert all(SHORT_BYTES < pool.IMAGE_BYTES < one.length_bytes for one in others)
        assert (seen.length_bytes, seen.kept_bytes) == (pool.IMAGE_BYTES + len(body) + 90, len(body) + 90)
        long_seat.process, encoders._bytes_per_s = SimpleNamespace(pid=os.getpid()), seen.length_bytes / 10
        await encoders._ask(long_seat, SimpleNamespace(ask=ask), seen)
        assert encoders._bytes_per_s == pytest.approx(seen.length_bytes / 10)
        for ticket, answer in zip((*others, seen), answers, strict=True):
            encoders._over(ticket)
            answer.cancel()
        assert encoders.budget.num_bytes == 0

    now = 1000.0
    run(body())


def test_a_checkpoint_that_cannot_be_read_does_not_end_the_pool(run, setup, spawned, checkpoint, caplog):
    (checkpoint / "tokenizer.json").write_text("{")

    async def body():
        async with running(setup, spawned) as encoders:
            answer = submit(encoders, Generate(stream=1, token_ids=[1]))
            while "could not be started" not in caplog.text:
                await asyncio.sleep(0.01)
            assert not answer.done()

    run(body())


def test_closing_ends_a_process_in_the_middle_of_a_job(run, setup, spawned):
    async def body():
        async with running(setup, spawned) as encoders:
            running_job, waiting = submit(encoders, said("!")), submit(encoders, said("!" + "x" * SHORT_BYTES))
            await spawned.asked.get()
        assert running_job.cancelled()
        assert waiting.cancelled() or waiting.done()

    run(body())


def test_a_long_prompt_through_real_processes(run, serving, setup, spawned, cores):
    async def body():
        config = FrontendConfig(inline_chars=4)
        encoders = Encoders(config, msgspec.structs.replace(setup, frontend=config), spawned)
        async with (
            serving(cores=cores, encoders=encoders, inline_chars=4) as house,
            await Client.connect(house.address) as client,
        ):
            final = await client.complete(text="hello, world", max_tokens=2)
            assert (final.usage.prompt_tokens, final.usage.output_tokens) == (13, 2)
            assert cores.now.submits[-1].prompt_token_ids == [256, *b"hello, world"]
            with pytest.raises(InvalidRequest, match="cannot fit"):
                await client.complete(text="x" * 60_000)
            assert len(house.frontend.streams) == 0
        assert spawned.all_gone()

    run(body())


def test_a_deadline_passes_while_a_prompt_is_encoded(run, serving, setup, spawned):
    async def body():
        config = FrontendConfig(inline_chars=0)
        encoders = Encoders(config, msgspec.structs.replace(setup, frontend=config), spawned)
        async with (
            serving(encoders=encoders, inline_chars=0) as house,
            await Client.connect(house.address) as client,
        ):
            final = await client.complete(messages=[{"role": "user", "content": "!"}], deadline_s=0.2)
            assert final.samples[0].finish_reason == "deadline"

    run(body())


def test_the_model_of_a_set_up_crosses_the_socket(model_info):
    packed = msgspec.msgpack.encode(Setup(checkpoint="", frontend=FrontendConfig(), model=model_info))
    assert isinstance(msgspec.msgpack.decode(packed, type=Setup).model, ModelInfo)


def test_closing_while_they_start_leaves_nothing(run, setup, spawned):
    async def body():
        for turns in (0, 1, 5, 50):
            async with running(setup, spawned):
                for _ in range(turns):
                    await asyncio.sleep(0)

    run(body())


def test_the_server_lives_on_after_what_cannot_be_encoded(run, serving, prompts):
    template = ChatTemplate("{{ messages[0].content | replace('!', '\\ud800') }}")
    object.__setattr__(prompts, "template", TemplateChat(template, prompts.tokenizer))

    async def body():
        async with serving() as house, await Client.connect(house.address) as client:
            with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
                await client.complete(messages=[{"role": "user", "content": "hi!"}])
            assert caught.value.field == "messages"
            with pytest.raises(InvalidRequest, match="lone surrogate"):  # so long that a process encodes it
                await client.complete(messages=[{"role": "user", "content": "hi!" * 2_000}])
            assert (await client.complete(messages=[{"role": "user", "content": "hi"}], max_tokens=2)).samples

    run(body())


def _answer(prompts, model_info, message, attached=None, features=("attach", "parts")):
    """The answer of the one encoder that processes and front end share."""
    encoder = RequestEncoder(prompts, FrontendConfig(), model_info)
    job = Job(stream=message.stream, features=list(features), has_attached=attached is not None)
    frames = encoder.answer(job, msgspec.msgpack.encode(message), attached)
    answer = msgspec.msgpack.decode(frames[0], type=Encoded | Failure)
    if isinstance(answer, Failure):
        return answer
    return msgspec.msgpack.decode(frames[1])


USER = ChatMessage(role="user", content="hi")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Generate(stream=1, token_ids=[1, 7]), "token_ids"),
        (Generate(stream=1, messages=[USER], reasoning_effort="xhigh"), "reasoning_effort"),
        (Generate(stream=1, messages=[USER], tools=[Tool(name="")]), "tools[0].name"),
        (Generate(stream=1, messages=[USER], tool_choice="required"), "tool_choice"),
        (Generate(stream=1, text="a", suffix="b"), "suffix"),
        (Generate(stream=1, messages=[ChatMessage(role="tool", content="3")]), "messages"),
    ],
)
def test_what_the_served_model_cannot_do_is_refused_by_name(prompts, model_info, message, field):
    object.__setattr__(prompts, "image_token_ids", frozenset({7}))
    answer = _answer(prompts, model_info, message)
    assert (answer.code, answer.field) == ("invalid_request", field)


def test_a_conversation_that_was_attached_is_checked_like_any_other(prompts, model_info):
    goes_on = [USER, ChatMessage(role="assistant", content="yes", prefix=True)]
    message, data = Generate(stream=1, attached="messages"), msgspec.msgpack.encode(goes_on)
    ids = _answer(prompts, model_info, message, data)
    assert bytes(ids[1:]).decode() == "[user]hi[assistant]yes"
    assert _answer(prompts, model_info, message, data, features=["attach"]).field == "messages[1].prefix"
    misplaced = msgspec.msgpack.encode([goes_on[1], USER])
    assert _answer(prompts, model_info, message, misplaced).field == "messages[0].prefix"
    for stray in ({"tools": [Tool(name="")]}, {"tool_choice": "f"}, {"reasoning_effort": "x"}):
        asked = Generate(stream=1, attached="messages", **stray)
        assert _answer(prompts, model_info, asked, data).field.partition("[")[0] == next(iter(stray))
