"""OpenAI's async client on every endpoint of the door that it knows: whole, streams, helpers, raw answers."""

from __future__ import annotations

import asyncio
import json

import openai
import pydantic
import pytest
from http_house import MESSAGES

from cierzo.testing import FakeAnswer

CHAT_TOOL = {"type": "function", "function": {"name": "wind", "parameters": {"type": "object"}}}
TOOL = {"type": "function", "name": "wind", "parameters": {"type": "object"}, "strict": False}
SAYS = FakeAnswer(thinking="Hm.", text="So", calls=[("wind", {"at": "sea"})])


class Wind(pydantic.BaseModel):
    """A form that an answer would have to have."""

    knots: int


@pytest.fixture
def using(either):
    """Run a coroutine with a client of a house that answers so."""

    def use(answer, body):
        house = either(answer)

        async def run() -> None:
            async with (
                asyncio.timeout(20),
                openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0) as client,
            ):
                await body(client)

        asyncio.run(run())

    return use


def test_chats(using):
    async def body(client):
        chat = client.chat.completions
        whole = await chat.create(model="fake", messages=MESSAGES, tools=[CHAT_TOOL])
        assert whole.choices[0].message.content == "So"
        assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments) == {"at": "sea"}
        async with chat.stream(model="fake", messages=MESSAGES, tools=[CHAT_TOOL]) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.name == "wind"
        assert {"content.delta", "content.done", "tool_calls.function.arguments.done"} <= {*kinds}

    using(SAYS, body)


def test_log_probabilities_in_a_stream(using):
    async def body(client):
        options = {"model": "fake", "messages": MESSAGES, "logprobs": True, "top_logprobs": 3}
        async with client.chat.completions.stream(**options) as stream:
            final = await stream.get_final_completion()
        told = final.choices[0].logprobs.content
        whole = await client.chat.completions.create(**options)
        assert told == whole.choices[0].logprobs.content
        assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in told)
        assert bytes(byte for entry in told[:-1] for byte in entry.bytes).decode() == "añb"

    using("añb", body)


def test_completions(using):
    async def body(client):
        create = client.completions.create
        both = await create(model="fake", prompt=["one", "two"], logprobs=1, echo=True)
        assert [choice.text for choice in both.choices] == ["oneab", "twoab"]
        stream = await create(model="fake", prompt=[[1, 2], [3]], n=2, stream=True)
        told: dict[int, str] = {}
        async for chunk in stream:
            for choice in chunk.choices:
                told[choice.index] = told.get(choice.index, "") + choice.text
        assert told == dict.fromkeys(range(4), "ab")

    using("ab", body)


def test_models_and_raw_answers(using):
    async def body(client):
        assert [model.id async for model in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("fake")).object == "model"
        raw = await client.chat.completions.with_raw_response.create(
            model="fake", messages=MESSAGES, extra_headers={"x-request-id": "mine"}
        )
        assert raw.headers["x-request-id"] == "mine"
        assert raw.parse()._request_id == "mine"
        asked = {"model": "fake", "prompt": "Hi", "stream": True}
        async with client.completions.with_streaming_response.create(**asked) as streamed:
            lines = [line async for line in streamed.iter_lines()]
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert [line for line in lines if line][-1] == "data: [DONE]"

    using("ab", body)


def test_responses(using):
    async def body(client):
        responses = client.responses
        whole = await responses.create(model="fake", input=MESSAGES, tools=[TOOL], store=False)
        assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
        async with responses.stream(model="fake", input="Hi", tools=[TOOL], store=False) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        calls = "response.function_call_arguments"
        deltas = "".join(event.delta for event in events if event.type == f"{calls}.delta")
        (done,) = [event for event in events if event.type == f"{calls}.done"]
        assert json.loads(deltas) == json.loads(done.arguments) == {"at": "sea"}
        thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(thoughts) == "Hm."
        assert final.output_text == "So"
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]

    using(SAYS, body)


def test_a_response_with_a_tool_goes_on(using):
    async def body(client):
        first = await client.responses.create(model="fake", input="Wind?", tools=[TOOL], store=False)
        call = first.output[-1]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "0 kn"}
        turns = [{"role": "user", "content": "Wind?"}, *(item.model_dump() for item in first.output), result]
        second = await client.responses.create(model="fake", input=turns, tools=[TOOL], store=False)
        assert second.output_text == "Calm."

    using([SAYS, "Calm."], body)


def test_forms_of_answers(using):
    async def body(client):
        asked = {"model": "fake", "messages": MESSAGES}
        whole = await client.chat.completions.parse(**asked, response_format=Wind)
        assert whole.choices[0].message.parsed == Wind(knots=3)
        parsed = await client.responses.parse(model="fake", input="Hi", store=False, text_format=Wind)
        assert parsed.output_parsed == Wind(knots=3)
        assert parsed.text.format.name == "Wind"
        assert parsed.text.format.schema_["properties"] == Wind.model_json_schema()["properties"]
        whole = await client.chat.completions.parse(**asked)  # no form: as create
        assert whole.choices[0].message.content == '{"knots": 3}'
        parsed = await client.responses.parse(model="fake", input="Hi", store=False)
        assert parsed.output_text == '{"knots": 3}'

    using('{"knots": 3}', body)


def test_calls_that_hold_their_schema(using):
    async def body(client):
        tools = [openai.pydantic_function_tool(Wind)]
        named = {"type": "function", "function": {"name": "Wind"}}
        whole = await client.chat.completions.parse(model="fake", messages=MESSAGES, tools=tools, tool_choice=named)
        assert whole.choices[0].finish_reason == "tool_calls"
        assert whole.choices[0].message.tool_calls[0].function.parsed_arguments == Wind(knots=3)

    using(FakeAnswer(calls=[("Wind", {"knots": 3})]), body)


def test_what_clients_of_vllm_send_beside(using):
    async def body(client):
        extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "return_tokens_as_token_ids": True}
        answer = await client.chat.completions.create(
            model="fake", messages=MESSAGES, logprobs=True, max_tokens=1, extra_body=extra
        )
        assert answer.choices[0].logprobs.content[0].token == f"token_id:{ord('a')}"

    using("ab", body)
