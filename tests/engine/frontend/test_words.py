"""Messages about words: what they answer, what they refuse, and what those cost who ask and do not read."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import msgspec
import pytest
from mistral_speakers import speaker
from streams import until
from tekken_folders import write_tekken

from cierzo.engine.errors import FrameTooLarge, InvalidRequest, Overloaded
from cierzo.engine.frontend import wording as wording_module
from cierzo.engine.frontend import words as words_module
from cierzo.engine.frontend.client import Client, SyncClient
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoders import Encoders, Late
from cierzo.engine.frontend.encoding import Job, Setup
from cierzo.engine.frontend.tenants import Access, Tenant
from cierzo.engine.frontend.wire_checks import MAX_PIECES
from cierzo.engine.frontend.wording import Wording
from cierzo.engine.messages import (
    ChatMessage,
    Detokenize,
    Detokenized,
    Failure,
    Generate,
    GetTokenizer,
    Hello,
    Tokenize,
    Tokenized,
    TokenizerInfo,
)
from cierzo.engine.testing.words import EOS, ID_OF, fake_model, marked_prompts
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.testing import FakeServer

WANTS = Hello(features=["tokenize", "parts"])
USER = [{"role": "user", "content": "hi"}]
LONG = "x" * 3000  # longer than what is answered at once
encode = msgspec.msgpack.encode


@pytest.fixture
def asking(serving):
    """A client of a front end whose model marks its thoughts and calls."""

    @asynccontextmanager
    async def start(**given):
        async with serving(words=marked_prompts(), **given) as house:
            async with await Client.connect(house.address) as client:
                yield client
            await until(lambda: not house.frontend.streams.num_sinks)  # the server has heard of the end
            assert not house.frontend.words._asked
            assert not house.frontend.words._ready
            assert house.frontend.budget.num_bytes == 0
            assert all(not book.num_requests for book in house.frontend.tenancy.books())

    return start


# --- answers -------------------------------------------------------------------------------------------------


def test_the_tokens_are_those_of_the_prompt(run, serving, cores, prompts):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            for prompt in ({"text": "hi"}, {"text": "<s>hi</s>"}, {"messages": USER}, {"text": LONG}):
                final = await client.complete(**prompt, max_tokens=1)
                token_ids = await client.tokenize(**prompt)
                assert token_ids == cores.now.submits[-1].prompt_token_ids
                assert len(token_ids) == final.usage.prompt_tokens

    run(body())


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, [256, *b"</s>a"]),
        ({"special_tokens": False}, [*b"</s>a"]),
        ({"control_tokens": True}, [256, 257, *b"a"]),
        ({"special_tokens": False, "control_tokens": True}, [257, *b"a"]),
    ],
    ids=str,
)
def test_control_tokens_of_a_text_are_tokens_where_that_is_asked_for(run, serving, options, tokens):
    async def body():
        async with serving() as house, await Client.connect(house.address) as client:
            assert await client.tokenize(text="</s>a", **options) == tokens
            begun = await client.tokenize(text="<s>a", **options)
            assert begun.count(256) <= 1, "a text that begins as a prompt does gets no second token"

    run(body())


def test_tekken_has_the_same_four_ways():
    ours = speaker("v15").vocabulary
    text = "[INST]a</s>b"
    inst, end = ours.special_ids["[INST]"], ours.special_ids["</s>"]
    a, b = ours.encode_piece("a"), ours.encode_piece("b")
    assert ours.encode_spelled(text, alone=True) == [inst, *a, end, *b]
    assert ours.encode_spelled(text, alone=False) == [1, inst, *a, end, *b]
    assert ours.encode_spelled("<s>a", alone=False) == [1, *a]
    assert ours.encode_spelled("", alone=True) == []
    assert ours.encode_spelled("a b <c>", alone=False) == ours.encode("a b <c>")
    prompts = PromptEncoder(ours)
    model = fake_model(vocab_size=ours.num_tokens)
    info = Wording(prompts, FrontendConfig(), model).info(1)
    assert (info.kind, info.bos_token, info.eos_token, info.pad_token) == ("tekken v15", "<s>", "</s>", "<pad>")
    assert info.chat_template == ""


def test_text_and_bytes_of_tokens(run, asking):
    async def body():
        async with asking() as client:
            think = ID_OF["[THINK]"]
            token_ids = [256, *"né".encode(), think, *b"!", EOS]
            assert await client.detokenize(token_ids) == "né!"
            assert await client.detokenize(token_ids, control_tokens=True) == "<s>né[THINK]!</s>"
            assert await client.detokenize([0xC3]) == "\ufffd"
            assert await client.detokenize([]) == ""
            assert await client.detokenize([299]) == "", "an id of the model that its tokenizer has no text for"
            pieces = await client.token_bytes(token_ids)
            assert pieces == [b"<s>", b"n", b"\xc3", b"\xa9", b"[THINK]", b"!", b"</s>"]
            assert await client.token_bytes([]) == []

    run(body())


def test_long_ones_are_answered_by_an_encoder(run, asking, monkeypatch):
    seen = []
    word = words_module.Words._aside

    def tell(self, job, *rest):
        seen.append(job.method)
        return word(self, job, *rest)

    monkeypatch.setattr(words_module.Words, "_aside", tell)

    async def body():
        async with asking() as client:
            await client.tokenize(text="x" * 2048)
            assert seen == []
            assert await client.tokenize(text=LONG) == [*LONG.encode()]
            assert await client.detokenize([*LONG.encode()]) == LONG
            assert seen == ["tokenize", "detokenize"]

    run(body())


def test_a_message_that_is_too_long_for_the_loop_to_decode(run, serving):
    """It is cut out and handed over undecoded; its answer is longer than what a connection holds."""

    async def body():
        model = {"max_model_len": 300_000}
        async with serving(words=marked_prompts()) as house:
            house.frontend.words._wording._model = fake_model(**model)
            house.frontend.words._encoders.encoder._wording._model = fake_model(**model)
            async with await Client.connect(house.address) as client:
                text = "y" * 250_000
                token_ids = await client.tokenize(text=text)
                assert token_ids == [*text.encode()]
                assert await client.detokenize(token_ids) == text
                assert await client.token_bytes(token_ids) == [b"y"] * len(text)
                several = await asyncio.gather(*(client.tokenize(text=text[:-n]) for n in range(1, 9)))
                assert [len(each) for each in several] == [len(text) - n for n in range(1, 9)]
            assert house.frontend.budget.num_bytes == 0

    run(body())


def test_processes_answer_as_the_front_end_does(run, tmp_path):
    ours = speaker("v15").vocabulary
    model = fake_model(vocab_size=ours.num_tokens)
    setup = Setup(checkpoint=str(write_tekken(tmp_path)), frontend=FrontendConfig(), model=model)

    async def body():
        encoders = Encoders(FrontendConfig(), setup)
        encoders.start()

        def ask(message, method, stream=5):
            job = Job(stream=stream, features=["parts"], has_attached=False, method=method)
            return encoders.word(job, encode(message), 1e12)

        try:
            tokenize = Tokenize(stream=5, text="</s>a", control_tokens=True)
            tokens = [1, ours.special_ids["</s>"], *ours.encode_piece("a")]
            assert await ask(tokenize, "tokenize") == Tokenized(stream=5, token_ids=tokens)
            told = await ask(Detokenize(stream=5, token_ids=tokens, pieces=True), "detokenize")
            assert told == Detokenized(stream=5, text="a", pieces=[b"<s>", b"</s>", b"a"])
            for message, method, stream in (
                (Detokenize(stream=5, token_ids=[10**6]), "detokenize", 5),
                (Generate(stream=5, text="a"), "tokenize", 5),
                (tokenize, "tokenize", 6),
            ):
                with pytest.raises(InvalidRequest):
                    await ask(message, method, stream)
        finally:
            await encoders.close()

    run(body())


def test_clients_that_block_and_a_fake_server():
    with FakeServer("Hello.") as server, SyncClient(server.address) as client:
        assert client.tokenize(text="hi", special_tokens=False) == [*b"hi"]
        assert client.tokenize(messages=USER, tools=[{"name": "f", "parameters": {"type": "object"}}])
        assert client.detokenize(iter([104, 105])) == "hi"
        assert client.token_bytes([104]) == [b"h"]
        info = client.tokenizer_info()
        assert (info.kind, info.eos_token) == ("tokenizers", "</s>")
        assert "messages" in info.chat_template
        assert server.requests == [], "nothing of it is a request to the model"


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Tokenize(stream=1), "text"),
        (Tokenize(stream=1, text="a", messages=[ChatMessage(role="user", content="a")]), "text"),
        (Tokenize(stream=1, messages=[ChatMessage(role="user")], control_tokens=True), "control_tokens"),
        (Tokenize(stream=1, messages=[ChatMessage(role="user")], special_tokens=False), "special_tokens"),
        (Tokenize(stream=1, messages=[ChatMessage(role="nobody", content="a")]), "messages[0].role"),
        (Tokenize(stream=1, text="a", reasoning_effort="high"), "reasoning_effort"),
        (Tokenize(stream=1, text="a" * 4097, special_tokens=False), "text"),
        (Tokenize(stream=1, text="a" * 20_000), "text"),
        (Detokenize(stream=1, token_ids=[300]), "token_ids"),
        (Detokenize(stream=1, token_ids=[-1]), "token_ids"),
        (Detokenize(stream=1, token_ids=[1] * 4097), "token_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_answered_is_refused_by_name(run, serving, peering, message, field):
    async def body():
        async with serving(words=marked_prompts()) as house, peering(house, WANTS) as peer:
            peer.say(message)
            refused = await peer.hear_until(Failure)
            assert (refused.stream, refused.code, refused.field) == (1, "invalid_request", field)
            peer.say(Tokenize(stream=1, text="a" * 4096, special_tokens=False))
            assert len((await peer.hear_until(Tokenized)).token_ids) == 4096

    run(body())


def test_a_context_of_tokens_is_answered_and_one_more_is_not():
    wording = Wording(marked_prompts(), FrontendConfig(), fake_model(max_model_len=8))
    assert len(wording.answer(Tokenize(stream=1, text="abcdefgh")).token_ids) == 8
    with pytest.raises(InvalidRequest, match="9 tokens, the context 8") as caught:
        wording.answer(Tokenize(stream=1, text="<s></s>abcdefg", control_tokens=True))
    assert (caught.value.limit, caught.value.value) == ("8", "9")
    most = fake_model(max_model_len=10**6)
    with pytest.raises(InvalidRequest, match=f"allowed: {MAX_PIECES}"):
        Wording(marked_prompts(), FrontendConfig(), most).answer(
            Detokenize(stream=1, token_ids=[1] * (MAX_PIECES + 1), pieces=True)
        )


def test_a_text_of_tokens_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(wording_module, "MAX_TEXT_BYTES", 10)
    asked = Wording(marked_prompts(), FrontendConfig(), fake_model())
    assert asked.answer(Detokenize(stream=1, token_ids=[65] * 10)).text == "A" * 10
    with pytest.raises(InvalidRequest, match="14 bytes"):
        asked.answer(Detokenize(stream=1, token_ids=[ID_OF["[THINK]"]] * 2))


def test_without_a_tokenizer_there_are_no_words(run, serving):
    async def body():
        async with serving(text=False) as house, await Client.connect(house.address) as client:
            for ask in (client.tokenize(text="a"), client.tokenize(messages=USER), client.detokenize([1])):
                with pytest.raises(InvalidRequest, match="no tokenizer"):
                    await ask
            assert await client.tokenizer_info() == TokenizerInfo(stream=4)

    run(body())


@pytest.mark.parametrize("size", [10, 70_000])
def test_without_the_feature_the_messages_are_refused(run, serving, peering, size):
    async def body():
        async with serving() as house, peering(house, Hello(features=[])) as peer:
            for message in (Tokenize(stream=1, text="a" * size), Detokenize(stream=1, token_ids=[1] * size)):
                peer.say(message)
                refused = await peer.hear()
                assert (refused.code, refused.limit) == ("invalid_request", "with the feature tokenize")
            peer.say(GetTokenizer(stream=1))
            assert (await peer.hear()).limit == "with the feature tokenize"
            async with await Client.connect(house.address, features=["resume"]) as client:
                for ask in (client.tokenize(text="a"), client.detokenize([1]), client.tokenizer_info()):
                    with pytest.raises(InvalidRequest) as caught:
                        await ask
                    assert (caught.value.field, caught.value.limit) == ("features", "tokenize")

    run(body())


def test_tools_need_the_feature_parts_here_too(run, serving, peering):
    tools = [{"name": "f", "parameters": {"type": "object"}}]

    async def body():
        async with serving(words=marked_prompts()) as house, peering(house, Hello(features=["tokenize"])) as peer:
            for content in ("a", "a" * 3000, "a" * 70_000):
                turns = [{"role": "user", "content": content}]
                peer.say({"type": "tokenize", "stream": 1, "messages": turns, "tools": tools})
                refused = await peer.hear()
                assert (refused.field, refused.limit) == ("tools", "with the feature parts")

    run(body())


@pytest.mark.parametrize(
    ("given", "field"),
    [({"text": "a", "max_tokens": 3}, "max_tokens"), ({"text": "a", "control_tokens": 1}, "control_tokens")],
)
def test_arguments_that_are_none_are_refused_where_they_are_given(given, field):
    with FakeServer("") as server, SyncClient(server.address) as client:
        with pytest.raises(InvalidRequest) as caught:
            client.tokenize(**given)
        assert caught.value.field == field
        with pytest.raises(InvalidRequest):
            client.detokenize(["a"])
        with pytest.raises(FrameTooLarge):
            client.tokenize(text="x" * (5 << 20))


def test_the_tokenizer_is_told_to_who_may_see_the_server(run, serving, peering):
    async def body():
        async with serving() as house, peering(house, WANTS) as peer:
            (sink,) = house.server._connections
            sink.access = Access(rights=frozenset())
            peer.say(GetTokenizer(stream=1))
            assert (await peer.hear()).code == "forbidden"
            peer.say(Tokenize(stream=1, text="a"))
            assert isinstance(await peer.hear(), Tokenized)

    run(body())


# --- bounds --------------------------------------------------------------------------------------------------


class Held:
    """Encoders that answer when they are told."""

    def __init__(self, encoders):
        self.budget = encoders.budget
        self.submit = encoders.submit
        self.asked = []

    def word(self, job, body, deadline_at_s, tenant="default"):
        self.asked.append((job, asyncio.get_running_loop().create_future()))
        return self.asked[-1][1]


@pytest.fixture
def holding(serving, peering):
    @asynccontextmanager
    async def start(**limits):
        async with serving(words=marked_prompts(), **limits) as house, peering(house, WANTS) as peer:
            words = house.frontend.words
            held = words._encoders = Held(words._encoders)
            yield house, peer, held

    return start


def test_what_waits_for_a_process_counts_as_a_request_of_the_tenant(run, holding):
    async def body():
        async with holding() as (house, peer, held):
            (sink,) = house.server._connections
            sink.access = Access(tenant=Tenant(max_requests=1))
            house.frontend.tenancy.arrange([sink.access.tenant])
            peer.say(Tokenize(stream=1, text=LONG))
            peer.say(Tokenize(stream=2, text=LONG))
            refused = await peer.hear()
            assert (refused.stream, refused.code, refused.field) == (2, "overloaded", "max_requests")
            peer.say(Tokenize(stream=3, text="short"))
            assert (await peer.hear()).stream == 3
            held.asked[0][1].set_result(Tokenized(stream=1, token_ids=[5]))
            assert (await peer.hear()).token_ids == [5]
            peer.say(Tokenize(stream=1, text=LONG))
            assert not await peer.hear_so_far()
            assert len(held.asked) == 2

    run(body())


def test_a_stream_is_asked_once_at_a_time_and_not_too_many_are(run, holding):
    async def body():
        async with holding(max_streams_per_connection=2) as (_, peer, held):
            peer.say(Tokenize(stream=1, text=LONG))
            peer.say(Detokenize(stream=1, token_ids=[1]))
            assert (await peer.hear()).field == "stream"
            peer.say(Detokenize(stream=2, token_ids=[1] * 3000))
            peer.say(Tokenize(stream=3, text=LONG))
            assert (await peer.hear()).field == "max_streams_per_connection"
            held.asked[1][1].set_exception(Overloaded("full", field="max_unencoded_bytes"))
            held.asked[0][1].set_exception(Late())
            heard = [await peer.hear(), await peer.hear()]
            assert {(each.stream, each.code, each.field) for each in heard} == {
                (2, "overloaded", "max_unencoded_bytes"),
                (1, "overloaded", "encoders"),
            }

    run(body())


def test_a_connection_that_ends_takes_its_questions_with_it(run, holding):
    async def body():
        async with holding() as (house, peer, held):
            peer.say(Tokenize(stream=1, text=LONG))
            peer.say(Tokenize(stream=2, text=LONG))
            await peer.hear_so_far()
            held.asked[1][1].set_exception(InvalidRequest("no"))
            await peer.close()
            while house.frontend.streams.num_sinks:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert held.asked[0][1].cancelled()
            assert not house.frontend.words._asked
            assert all(not book.num_requests for book in house.frontend.tenancy.books())

    run(body())


def test_who_does_not_read_answers_pays_for_them_and_is_dropped(run, holding, clock):
    """Answers are kept one behind the other, charged as unencoded prompts are, until their reader takes none."""
    answer = Detokenized(stream=0, text="z" * 3_000_000)

    async def body():
        limits = {"slow_reader_s": 0.2, "max_unencoded_bytes": 7_000_000}
        async with holding(**limits) as (house, peer, held):
            transport = peer.writer.transport
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            transport.pause_reading()
            for stream in range(1, 5):
                peer.say(Tokenize(stream=stream, text=LONG))
            while len(held.asked) < 4:
                await asyncio.sleep(0)
            for stream, (_, future) in enumerate(held.asked, start=1):
                future.set_result(msgspec.structs.replace(answer, stream=stream))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            (sink,) = house.server._connections
            waiting = house.frontend.words._ready[sink]
            assert [len(frame) // 10**6 for frame in waiting] == [3, 3], "the others find no room"
            assert 6_000_000 < house.frontend.budget.num_bytes < 7_000_000
            while house.server._connections:
                await asyncio.sleep(0.01)
            assert house.frontend.budget.num_bytes == 0
            assert not house.frontend.words._ready

    run(body())


def test_a_steady_reader_gets_long_answers_one_after_the_other(run, holding):
    async def body():
        async with holding() as (house, peer, held):
            for stream in (1, 2, 3):
                peer.say(Tokenize(stream=stream, text=LONG))
            while len(held.asked) < 3:
                await asyncio.sleep(0)
            for stream, (_, future) in enumerate(held.asked, start=1):
                future.set_result(Detokenized(stream=stream, text=str(stream) * 2_000_000))
            peer.say(Tokenize(stream=9, text="a"))
            heard = [await peer.hear() for _ in range(4)]
            long = [each for each in heard if each.stream < 9]
            assert [each.text for each in long] == [str(stream) * 2_000_000 for stream in (1, 2, 3)]
            assert [each.token_ids for each in heard if each.stream == 9] == [[97]]
            assert house.frontend.budget.num_bytes == 0
            assert not house.frontend.words._stuck

    run(body())
