"""Errors as OpenAI's own clients raise them, and what these clients send again: as the answers' headers say."""

from __future__ import annotations

import asyncio
import socket
import time

import openai
import pytest
from http_house import MESSAGES

from cierzo.engine.errors import (
    CoreFailed,
    DeadlineUnreachable,
    Draining,
    Forbidden,
    Interrupted,
    InvalidRequest,
    KeyReused,
    NotFound,
    Overloaded,
    Unauthorized,
)

RAISED = [
    (InvalidRequest("no", field="top_k"), openai.BadRequestError, 400, False),
    (Unauthorized("no"), openai.AuthenticationError, 401, False),
    (Forbidden("no"), openai.PermissionDeniedError, 403, False),
    (NotFound("no"), openai.NotFoundError, 404, False),
    (KeyReused("no"), openai.UnprocessableEntityError, 422, False),
    (Overloaded("no"), openai.RateLimitError, 429, True),
    (DeadlineUnreachable("no"), openai.RateLimitError, 429, False),
    (CoreFailed("no"), openai.InternalServerError, 500, None),
    (Draining("no"), openai.InternalServerError, 503, True),
    (Interrupted("no"), openai.InternalServerError, 503, True),
]


def _ways(client):
    """A call of each endpoint that has answers, whole and in a stream."""
    chat, text, responses = client.chat.completions.create, client.completions.create, client.responses.create
    for stream in (False, True):
        yield lambda stream=stream: chat(model="fake", messages=MESSAGES, stream=stream)
        yield lambda stream=stream: text(model="fake", prompt="Hi", stream=stream)
        yield lambda stream=stream: responses(model="fake", input="Hi", stream=stream)


@pytest.mark.parametrize(("error", "kind", "status", "again"), RAISED, ids=lambda one: getattr(one, "code", ""))
def test_what_the_client_raises(either, error, kind, status, again):
    house = either("Hello")
    house.refuse(error, times=None)
    with house.openai() as client:
        for call in _ways(client):
            with pytest.raises(openai.APIStatusError) as raised:
                call()
            assert type(raised.value) is kind
            assert (raised.value.status_code, raised.value.code) == (status, error.code)
            told = (
                "stopped before the answer" if isinstance(error, Interrupted) else "no"
            )  # which names no way on that HTTP lacks
            assert told in raised.value.message
            assert raised.value.request_id == raised.value.response.headers["x-request-id"]
            if again is not None:
                assert raised.value.response.headers["x-should-retry"] == ("true" if again else "false")


def test_it_tries_again_as_often_as_it_may_and_no_more(either):
    house = either("Hello")
    house.refuse(Overloaded("full"), times=None, retry_after_s=0.01)
    with house.openai(max_retries=3) as client, pytest.raises(openai.RateLimitError):
        client.responses.create(model="fake", input="Hi")
    assert len(house.requests) == 4


@pytest.mark.parametrize("error", [error for error, *_, again in RAISED if again is False])
def test_it_does_not_try_again_what_is_bound_to_fail(either, error):
    house = either("Hello")
    house.refuse(error, times=None)
    with house.openai(max_retries=3) as client, pytest.raises(openai.APIStatusError):
        client.completions.create(model="fake", prompt="Hi", stream=True)
    assert len(house.requests) == 1


def test_it_waits_as_long_as_it_is_told(either):
    house = either("Hello")
    house.refuse(Overloaded("full"), retry_after_s=0.7)
    began = time.monotonic()
    with house.openai(max_retries=1) as client:
        client.chat.completions.create(model="fake", messages=MESSAGES)
    assert time.monotonic() - began >= 0.7  # by itself it waits for half a second at most
    assert len(house.requests) == 2


def test_an_async_client_raises_and_tries_again(either):
    async def body() -> None:
        async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=2) as client:
            house.refuse(Draining("soon"), times=2, retry_after_s=0.01)
            answer = await client.completions.create(model="fake", prompt="Hi")
            assert answer.choices[0].text == "Hello"
            with pytest.raises(openai.BadRequestError) as raised:
                await client.responses.create(model="fake", input="Hi", top_p=2.0)
            assert raised.value.param == "top_p"

    house = either("Hello")
    asyncio.run(body())
    assert len(house.requests) == 3


def test_an_answer_that_fails_in_the_middle(either):
    house = either("x" * 100, token_s=60.0)
    with house.openai() as client:
        chat, text = client.chat.completions.create, client.completions.create
        streams = [
            chat(model="fake", messages=MESSAGES, stream=True),
            text(model="fake", prompt="Hi", stream=True),
        ]
        responses = client.responses.create(model="fake", input="Hi", stream=True)
        for stream in streams:
            next(stream)
        while next(responses).type != "response.output_text.delta":
            pass
        house.health = "failed"
        for stream in streams:
            with pytest.raises(openai.APIError) as failed:
                list(stream)
            assert failed.value.code == "core_failed"
        last = [*responses][-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.message


def test_a_door_that_is_not_there():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"  # bound, and nobody listens
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        with client, pytest.raises(openai.APIConnectionError):
            client.models.list()
