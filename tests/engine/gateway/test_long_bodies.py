"""Bodies that are too long to be read on the event loop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from http_house import CHAT, die

from cierzo.engine.errors import InvalidRequest, Overloaded
from cierzo.engine.gateway import bodies as long_bodies
from cierzo.engine.gateway.asked import Rules
from cierzo.engine.gateway.bodies import INLINE_BYTES, Bodies, packed_requests_of, requests_of
from cierzo.engine.messages import Generate
from cierzo.engine.testing.words import fake_model

CHATS = "/v1/chat/completions"
LONG = "x" * 100_000
RULES = Rules(model=fake_model(max_model_len=1_000_000))
TOOL = {"type": "function", "function": {"name": "wind", "parameters": {"type": "object"}}}
BODIES = [
    ("chat", {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], "stop": "x", "stream": True}),
    ("chat", {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "seed": 3}),
    ("completions", {"prompt": ["a", "b"], "echo": True, "n": 2}),
    ("completions", {"prompt": [[1, 2], [3]], "max_tokens": 5}),
    ("fim", {"prompt": "a", "suffix": "b"}),
    ("responses", {"input": "Hi", "instructions": "Be brief.", "max_output_tokens": 3}),
]


def _long(text=LONG):
    return CHAT | {"messages": [{"role": "user", "content": text}]}


@pytest.fixture
def roomy(either):
    return either("Hello", max_model_len=1_000_000)


def test_a_long_conversation(roomy):
    answer = roomy.post(CHATS, _long(), timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert answer["usage"]["prompt_tokens"] == len(f"[user]{LONG}")
    (asked,) = roomy.requests
    assert asked.messages[0].content == LONG
    assert asked.caller_id


def test_a_long_conversation_in_a_stream(roomy):
    told = roomy.post(CHATS, _long() | {"stream": True, "stream_options": {"include_usage": True}}, timeout=60)
    assert told.text.endswith("data: [DONE]\n\n")
    assert f'"prompt_tokens":{len(LONG) + 6}' in told.text


def test_many_long_prompts(roomy):
    prompts = [f"{number}{LONG}" for number in range(3)]
    body = {"model": "fake", "prompt": prompts, "echo": True, "max_tokens": 3}
    choices = roomy.post("/v1/completions", body, timeout=60).json()["choices"]
    assert [choice["text"] for choice in choices] == [f"{prompt}Hel" for prompt in prompts]
    tokens = [*LONG.encode()]
    choices = roomy.post("/v1/completions", body | {"prompt": tokens}, timeout=60).json()["choices"]
    assert choices[0]["text"] == f"{LONG}Hel"


def test_errors_name_the_fields_of_a_long_body(roomy):
    for wrong, field in (({"temperature": -1}, "temperature"), ({"quux": 1}, "quux"), ({"top_p": "x"}, "top_p")):
        refused = roomy.post(CHATS, _long() | wrong, timeout=60)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    assert roomy.post(CHATS, _long() | {"model": "gpt"}, timeout=60).status_code == 404


def test_a_prompt_beyond_the_context(either):
    refused = either("Hello").post(CHATS, _long(), timeout=60)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(("endpoint", "body"), BODIES)
def test_packed_requests_say_the_same(endpoint, body):
    data = json.dumps(body).encode()
    plain = requests_of(endpoint, data, RULES, {"caller_id": "me"})
    packed = packed_requests_of(endpoint, data, RULES, {"caller_id": "me"})
    assert len(plain) == len(packed)
    for number, (one, other) in enumerate(zip(plain, packed, strict=True), 1):
        message = msgspec.msgpack.decode(other.packed, type=Generate)
        assert message.stream == number
        assert message.caller_id == "me"
        assert message.deltas == one.arguments["deltas"]
        for name in ("text", "messages", "token_ids", "suffix"):
            assert (getattr(message, name) is None) == (name not in one.arguments)
        assert other.num_samples == one.num_samples
        assert other.prompt_text == one.prompt_text
        for name in ("stream", "include_usage", "echo", "logprobs", "model", "places"):
            assert getattr(other.asked, name) == getattr(one.asked, name)


async def _read(bodies, text=LONG):
    body = json.dumps(_long(text)).encode()
    assert len(body) > INLINE_BYTES
    return await bodies.read("chat", body, RULES, {}, packs=True, tenant="t")


def test_the_process_is_another_one_and_is_replaced_when_it_dies(run):
    async def body():
        bodies = Bodies()
        try:
            assert (await _read(bodies))[0].packed
            (process,) = bodies._pool._processes.values()
            assert process.pid != os.getpid()
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert (await _read(bodies))[0].packed
            with pytest.raises(InvalidRequest):
                await bodies.read("chat", b"[" * INLINE_BYTES * 2, RULES, {}, packs=True, tenant="t")
        finally:
            bodies.close()

    run(body(), 60.0)


def test_a_process_that_dies_of_every_body(run, monkeypatch):
    monkeypatch.setattr("cierzo.engine.gateway.bodies.packed_requests_of", die)

    async def body():
        bodies = Bodies()
        try:
            with pytest.raises(Overloaded, match="has died"):
                await bodies.read("chat", b"x" * INLINE_BYTES * 2, RULES, {}, packs=True, tenant="t")
        finally:
            bodies.close()

    run(body(), 60.0)


def test_long_bodies_that_come_are_bounded_together(opening):
    house = opening("Hello", max_model_len=1_000_000, http={"max_arriving_bytes": 150_000})
    full = house.post(CHATS, _long("x" * 200_000), timeout=60)
    assert (full.status_code, full.json()["error"]["param"]) == (429, "max_arriving_bytes")
    for _ in range(3):  # and what was counted is given back
        assert house.post(CHATS, _long(), timeout=60).status_code == 200


def test_tenants_take_turns_with_long_bodies(monkeypatch, run):
    order, gate = [], threading.Event()

    def read(endpoint, body, rules, named):
        gate.wait()
        order.append(body[:1])
        return []

    monkeypatch.setattr(long_bodies, "requests_of", read)

    async def body():
        reader = Bodies()
        reader._pool = ThreadPoolExecutor(1)

        def asked(letter, tenant, num_bytes=2 * INLINE_BYTES):
            data = letter * num_bytes
            return asyncio.ensure_future(reader.read("chat", data, None, {}, packs=False, tenant=tenant))

        tasks = [asked(b"a", "many") for _ in range(4)]
        await asyncio.sleep(0)
        gone, last = asked(b"x", "many", INLINE_BYTES + 1), asked(b"b", "one")
        await asyncio.sleep(0)
        gone.cancel()
        gate.set()
        await asyncio.gather(*tasks, last)
        assert order == [b"a", b"b", b"a", b"a", b"a"]
        reader.close()

    run(body())
