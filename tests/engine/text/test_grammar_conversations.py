"""Conversations of required and named calls, in every syntax of calls: what a grammar lets a model write is read as
whole calls of the listed tools, and comes back into the next prompt."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
import word_folders
from grammar_walks import Walker
from structured.judge import fault
from tekken_folders import VERSIONS, write_tekken

from cierzo.engine.frontend.answer import Answer
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoding import RequestEncoder
from cierzo.engine.messages import ChatMessage, Generate, SampleEnd, Tool
from cierzo.engine.testing.words import fake_model
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.token_table import token_table

PARAMETERS = {
    "type": "object",
    "properties": {"at": {"enum": ["sea", 'x "y"', "größe"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["at"],
    "additionalProperties": False,
}
TOOLS = [
    Tool(name="wind", description="d", parameters=PARAMETERS, strict=True),
    Tool(name="wind_2", parameters=PARAMETERS, strict=True),
    Tool(name="free"),
]
CHOICES = ("required", "wind_2", "required", "free", "wind")
FOLDERS = [*VERSIONS, *(f"tags: {tokenizer}" for tokenizer in word_folders.TOKENIZERS)]


class House:
    """A model's words: prompts go in, and what its grammars allow comes out."""

    def __init__(self, prompts: PromptEncoder, num_tokens: int, eos_token_id: int) -> None:
        model = fake_model(
            vocab_size=num_tokens, max_model_len=32_768, eos_token_ids=[eos_token_id], marks_calls=True
        )
        self.prompts = prompts
        self.encoder = RequestEncoder(prompts, FrontendConfig(), model)
        self.walker = Walker(token_table(prompts.tokenizer, num_tokens, (eos_token_id,)))

    def answer(self, message: Generate, random: Random) -> Answer:
        """An answer that the grammar of a message allows."""
        encoded = self.encoder.encode(message, apart=True)
        calls = self.prompts.call_limit(message)
        while True:
            token_ids, is_whole = self.walker.walk_tokens(encoded.submit.grammar, random)
            if is_whole:
                break
        reader = self.prompts.reader(
            message.sampling, apart=True, in_thinking=encoded.in_thinking, calls=calls, num_prompt_tokens=9
        )
        answer = Answer()
        for token_id in token_ids:
            text = reader.push([token_id])
            answer.take(reader.parts, text, 1)
        text = reader.flush()
        end = SampleEnd(
            sample=0, finish_reason="stop", output_tokens=0, text=text, parts=reader.parts,
            broken_calls=reader.broken_calls,
        )  # fmt: skip
        answer.end(end)
        return answer


@pytest.fixture(scope="module", params=FOLDERS)
def house(request, tmp_path_factory):
    name = request.param
    if name in VERSIONS:
        prompts = PromptEncoder.load(write_tekken(tmp_path_factory.mktemp("words"), name))
        return House(prompts, prompts.tokenizer.num_tokens, prompts.special_ids["</s>"])
    prompts = word_folders.ours(name.removeprefix("tags: "), "thinking")
    return House(prompts, 400, prompts.special_ids["</s>"])


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_conversation(house, seed, parallel):
    random, turns = Random(seed), [ChatMessage(role="user", content="How is the wind?")]
    numbers = set()
    for choice in CHOICES:
        message = Generate(stream=0, messages=turns, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel)
        answer = house.answer(message, random)
        calls = answer.tool_calls
        assert not answer.broken_calls
        assert not answer.text.strip()
        assert calls
        for call in calls:
            assert call.name in (("wind", "wind_2", "free") if choice == "required" else (choice,))
            schema = {"type": "object"} if call.name == "free" else PARAMETERS
            assert not fault(schema, call.arguments), call.arguments
        assert len({call.id for call in calls}) == len(calls)
        numbers.add(len(calls))
        results = [
            ChatMessage(role="tool", content="9 knots", tool_call_id=call.id, name=call.name) for call in calls
        ]
        turns = [*turns, answer.turn, *results]
    assert parallel or numbers == {1}


@pytest.mark.parametrize("seed", range(3))
def test_with_the_choice_left_to_the_model_calls_hold_their_schema(house, seed):
    random, user = Random(seed), ChatMessage(role="user", content="How is the wind?")
    for _ in range(4):
        answer = house.answer(Generate(stream=0, messages=[user], tools=TOOLS), random)
        for call in answer.tool_calls:
            assert call.name in ("wind", "wind_2", "free")
            assert call.name == "free" or not fault(PARAMETERS, call.arguments)


def test_thoughts_stand_before_calls(house):
    """Where the prompt ends in a thought, or an effort asks for one, the calls come behind it."""
    efforts = house.prompts.efforts or ()
    message = Generate(
        stream=0, messages=[ChatMessage(role="user", content="x")], tools=TOOLS, tool_choice="required",
        reasoning_effort="high" if "high" in efforts else None,
    )  # fmt: skip
    for seed in range(3):
        answer = house.answer(msgspec.structs.replace(message), Random(seed))
        kinds = [part.kind for part in answer.parts if part.kind != "text"]
        assert kinds == sorted(kinds, key=["thinking", "call"].index)
        assert answer.tool_calls
