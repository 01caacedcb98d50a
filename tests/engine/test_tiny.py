"""The tiny model through the engine: right answers about held-out instances, whatever the scheduler does to them.

A fault that changes few numbers shows in no comparison of shapes, and rarely in random weights' tokens; here a
wrong word is a wrong answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tiny_model import ANSWERED, FOLDER, SETTINGS, ask, file_of, held_out, is_right, of_all_tasks

from cierzo.bench.tiny.tasks import CITIES, COLOURS, NAMES, TASKS, TOOLS, Instance, tool
from cierzo.bench.tiny.words import IMAGE, Writer
from cierzo.cache.layout import GIB
from cierzo.engine.llm import LLM

LEAST = 0.95  # share of right answers
INSTANCES = 60  # of each task
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": [*NAMES]}, "age": {"type": "integer"}, "city": {"enum": [*CITIES]}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(FOLDER, **SETTINGS) as made:
        yield made


def together(llm: LLM, instances: list[Instance]) -> list[list[int]]:
    """The tokens of all answers, whose prompts are computed at the same time."""
    writer = Writer(FOLDER)
    files = [[] if one.image is None else [file_of(one)] for one in instances]
    prompts = [writer.prompt(one) for one in instances]
    return [output.token_ids for output in llm.generate(prompts, images=files, **ANSWERED)]


def shares(instances: list[Instance], answers: list[list[int]]) -> dict[str, float]:
    """Share of right answers, by task."""
    writer, found = Writer(FOLDER), {task: list[bool]() for task in TASKS}
    for one, tokens in zip(instances, answers, strict=True):
        found[one.task].append(tokens == writer.answer(one))
    return {task: sum(each) / len(each) for task, each in found.items()}


def test_what_it_never_saw_is_answered_rightly(llm: LLM) -> None:
    instances = of_all_tasks(INSTANCES)
    assert all(one.is_held_out for one in instances)
    found = shares(instances, together(llm, instances))
    assert all(found[task] >= LEAST for task in TASKS), found


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_conversation_is_answered_rightly(llm: LLM, task: str) -> None:
    instances, writer = held_out(task, 10, seed=5), Writer(FOLDER)
    outputs = [ask(llm, one) for one in instances]
    for one, output in zip(instances, outputs, strict=True):
        assert output.prompt_token_ids == writer.prompt(one)
        assert output.finish_reason == ("tool_calls" if one.call else "stop")
    assert sum(is_right(one, output) for one, output in zip(instances, outputs, strict=True)) >= 9


@pytest.mark.parametrize(
    "settings",
    [
        {"budget_tokens": 8, "max_running": 4, "max_chunk_tokens": 5, "block_tokens": 4},
        {"budget_tokens": 64, "block_tokens": 16, "max_running": 48},
        {"prefix_caching": False, "instruction_set": "reference"},
    ],
    ids=["short chunks", "many at once", "plain torch"],
)
def test_answers_are_right_however_prompts_are_cut(llm: LLM, settings: dict[str, Any]) -> None:
    """Cuts change nothing; plain torch, which adds up in other orders, may change an answer in twenty."""
    instances = of_all_tasks(20)
    with LLM(FOLDER, **SETTINGS | settings) as other:
        answers = together(other, instances)
    found = shares(instances, answers)
    assert all(found[task] >= LEAST for task in TASKS), found
    assert "instruction_set" in settings or answers == together(llm, instances)


def test_preempted_answers_are_right(llm: LLM) -> None:
    instances = [one for one in of_all_tasks(30) if one.task != "tools"]  # where much is asked and little answered
    block_bytes = llm.config.layout.bytes_per_block * 4 // llm.config.layout.block_tokens
    with LLM(FOLDER, **SETTINGS | {"block_tokens": 4, "kv_cache_gib": 64.5 * block_bytes / GIB}) as small:
        answers = together(small, instances)
        assert small._open_core().stats().preemptions > 0
    assert answers == together(llm, instances)


def test_a_prompt_is_found_again(llm: LLM) -> None:
    one = held_out("tools", 1, seed=6)[0]
    first, again = ask(llm, one), ask(llm, one)
    assert again.usage.cached_tokens >= len(again.prompt_token_ids) // 32 * 32 - 32 > 0
    assert is_right(one, first)
    assert again.token_ids == first.token_ids


def test_a_prefix_may_end_inside_an_image() -> None:
    one = next(each for each in held_out("images", 50) if each.image and each.image.size == (84, 84))
    digit, colour = (replace(one, question=question) for question in ("Which digit?", "Which colour?"))
    with LLM(FOLDER, **SETTINGS, block_tokens=16) as llm:
        first, second = ask(llm, digit), ask(llm, colour)
    with LLM(FOLDER, **SETTINGS, prefix_caching=False) as plain:
        alone = [ask(plain, one) for one in (digit, colour)]
    places = [at for at, token in enumerate(second.prompt_token_ids) if token == IMAGE]
    assert places[0] < second.usage.cached_tokens <= places[-1]
    assert first.text.isdigit()
    assert second.text in COLOURS
    assert [first.token_ids, second.token_ids] == [one.token_ids for one in alone]


def test_tools_are_called_as_the_request_says(llm: LLM) -> None:
    one = held_out("tools", 1, seed=7)[0]
    assert one.call is not None
    assert is_right(one, ask(llm, one, tool_choice="required"))
    assert not ask(llm, one, tool_choice="none").tool_calls
    other = next(each["name"] for each in map(tool, sorted(TOOLS)) if each["name"] != one.call[0])
    forced = ask(llm, one, tools=[*one.tools, tool(other)], tool_choice=other)
    assert [call.name for call in forced.tool_calls] == [other]


def test_a_schema_is_followed_and_the_answer_stays_right(llm: LLM) -> None:
    instances, grammar = held_out("json", 20), {"kind": "json_schema", "value": json.dumps(PERSON)}
    outputs = [ask(llm, one, grammar=grammar) for one in instances]
    assert all(sorted(json.loads(output.text)) == ["age", "city", "name"] for output in outputs)
    right = [
        json.loads(output.text) == json.loads(one.answer) for one, output in zip(instances, outputs, strict=True)
    ]
    assert sum(right) >= 19


def test_several_samples_are_all_right(llm: LLM) -> None:
    one = next(each for each in held_out("arithmetic", 20) if each.effort == "high")
    output = ask(llm, one, n=3, temperature=0.2, seed=1)
    assert [is_right(one, output.samples[sample]) for sample in range(3)] == [True] * 3


def test_it_thinks_when_it_should(llm: LLM) -> None:
    """It is right more often then."""
    instances = [one for one in held_out("arithmetic", 90, seed=8) if one.effort == "none"]
    for effort, kinds, least in (("high", ["thinking", "text"], LEAST), ("none", ["text"], 0.8)):
        outputs = [ask(llm, one, reasoning_effort=effort) for one in instances]
        assert [[part.kind for part in output.parts] for output in outputs] == [kinds] * len(instances)
        right = [output.text == one.answer for one, output in zip(instances, outputs, strict=True)]
        assert sum(right) >= least * len(instances)


# Settings of fewer bits, and the share of answers that may be lost by each.
FEWER_BITS: dict[str, tuple[dict[str, str], float]] = {
    "int8 weights": ({"weights": "int8"}, 0.02),
    "int4 weights": ({"weights": "int4"}, 0.04),
    "nvfp4 weights": ({"weights": "nvfp4"}, 0.04),
    "int8 cache": ({"kv_dtype": "int8"}, 0.02),
}


@pytest.mark.parametrize("name", sorted(FEWER_BITS))
def test_fewer_bits_lose_little(llm: LLM, name: str) -> None:
    instances = of_all_tasks(INSTANCES)
    settings, lost = FEWER_BITS[name]
    with LLM(FOLDER, **SETTINGS, **settings) as fewer:
        assert {fewer.config.weights, fewer.config.layout.dtype} >= {*settings.values()}
        found = shares(instances, together(fewer, instances))
    whole = shares(instances, together(llm, instances))
    assert all(found[task] >= whole[task] - lost for task in TASKS), (found, whole)
