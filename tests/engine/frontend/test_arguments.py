"""Arguments of any kind: taken for the values that they hold, or refused with field and value."""

from __future__ import annotations

import array
import enum
import fractions
import math
from collections import UserDict, deque
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.arguments import generate_message, whole_answer
from cierzo.engine.frontend.frames import pack
from cierzo.engine.messages import (
    ChatMessage,
    Generate,
    Grammar,
    SamplingParams,
    TextChunk,
    ThinkingChunk,
    Tool,
    ToolCall,
)


class Role(enum.StrEnum):
    USER = "user"


class Level(enum.IntEnum):
    THREE = 3


class Index:
    def __index__(self) -> int:
        return 3


HI = ChatMessage(role="user", content="Hi")
HI_DICT = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        (i for i in (1, 2, 3)),
        deque([1, 2, 3]),
        {1: "a", 2: "b", 3: "c"}.keys(),
        array.array("H", [1, 2, 3]),
        np.array([1, 2, 3], np.int32),
        np.array([1, 2, 3], np.uint64),
        np.array([1, 2, 3], object),
        list(np.array([1, 2, 3], np.uint8)),
        [1, np.int64(2), Level.THREE],
        [1, 2, Index()],
        torch.tensor([1, 2, 3], dtype=torch.int16),
        list(torch.tensor([1, 2, 3])),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_token_ids_of_any_kind(ids):
    message = generate_message(token_ids=ids)
    assert message == Generate(stream=0, token_ids=[1, 2, 3])
    assert set(map(type, message.token_ids)) == {int}


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("max_tokens", np.int64(3), 3),
        ("max_tokens", torch.tensor(3), 3),
        ("max_tokens", Level.THREE, 3),
        ("max_tokens", Index(), 3),
        ("max_tokens", 2**64 - 1, 2**64 - 1),
        ("seed", np.uint64(2**63 - 1), 2**63 - 1),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.float64(0.5), 0.5),
        ("temperature", np.longdouble(0.5), 0.5),
        ("temperature", torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        ("temperature", fractions.Fraction(1, 2), 0.5),
        ("temperature", Decimal("0.5"), 0.5),
        ("temperature", 1, 1.0),
        ("ignore_eos", np.bool_(True), True),
        ("logit_bias", {np.int64(5): np.float32(1.0), 6: 2}, {5: 1.0, 6: 2.0}),
        ("logit_bias", MappingProxyType({5: 1}), {5: 1.0}),
        ("stop", "ab", ("ab",)),
        ("stop", np.str_("ab"), ("ab",)),
        ("stop", ["ab", "c"], ("ab", "c")),
        ("stop", {"ab"}, ("ab",)),
        ("stop", (text for text in ("ab", "c")), ("ab", "c")),
        ("stop_token_ids", 3, (3,)),
        ("stop_token_ids", np.int64(3), (3,)),
        ("stop_token_ids", {3}, (3,)),
        ("stop_token_ids", np.array([3, 4]), (3, 4)),
        ("stop_token_ids", torch.tensor([3, 4]), (3, 4)),
    ],
)
def test_sampling_of_any_kind(name, given, taken):
    """As a keyword, in a mapping, and in SamplingParams themselves."""
    ways = [{name: given}, {"sampling": UserDict({name: given})}, {"sampling": SamplingParams(**{name: given})}]
    for way in ways if not hasattr(given, "__next__") else ways[:1]:
        message = generate_message(text="x", **way)
        assert getattr(message.sampling, name) == taken
        assert type(getattr(message.sampling, name)) is type(taken)
        assert msgspec.msgpack.decode(pack([message])[4:], type=Generate) == message


def test_keywords_stand_on_top_of_sampling():
    base = SamplingParams(max_tokens=9, top_k=4, stop=("a", "b"))
    expected = SamplingParams(max_tokens=3, top_k=4, stop=("c",))
    for sampling in (base, msgspec.structs.asdict(base)):
        assert generate_message(text="x", sampling=sampling, max_tokens=3, stop="c").sampling == expected
    assert base.stop == ("a", "b")


@pytest.mark.parametrize(
    "messages",
    [
        HI_DICT,
        HI,
        [HI_DICT],
        (HI,),
        (turn for turn in [HI_DICT]),
        [MappingProxyType(HI_DICT)],
        [UserDict(HI_DICT)],
        [{"role": Role.USER, "content": np.str_("Hi")}],
        [HI_DICT | {"tool_calls": None, "reasoning": None, "refusal": None}],  # as OpenAI's client dumps a message
    ],
)
def test_messages_of_any_kind(messages):
    assert generate_message(messages=messages) == Generate(stream=0, messages=[HI])


def test_content_that_is_none_is_left_out():
    call = {"name": "f", "arguments": "{}"}
    message = generate_message(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message.messages == [ChatMessage(role="assistant", tool_calls=[ToolCall(name="f", arguments="{}")])]


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
TOOL = Tool(name="f", description="d", parameters=PARAMETERS)
FUNCTION = {"name": "f", "description": "d", "parameters": PARAMETERS}


@pytest.mark.parametrize(
    "tool",
    [
        TOOL,
        FUNCTION,
        {"type": "function", "function": FUNCTION},
        {"type": "function", "function": FUNCTION | {"strict": False}, "cache_control": None},
        {"type": "function", **FUNCTION, "strict": None},
        MappingProxyType({"function": UserDict(FUNCTION)}),
    ],
)
def test_tools_of_any_kind(tool):
    for tools in ([tool], (tool,)):
        assert generate_message(messages=HI, tools=tools, tool_choice="none") == Generate(
            stream=0, messages=[HI], tools=[TOOL], tool_choice="none"
        )


def test_choices_and_strict_tools_of_any_kind():
    for choice in ("f", {"type": "function", "function": {"name": "f"}}, {"type": "function", "name": "f"}):
        message = generate_message(messages=HI, tools=[FUNCTION | {"strict": True}], tool_choice=choice)
        assert (message.tool_choice, message.tools) == ("f", [replace(TOOL, strict=True)])
    assert generate_message(messages=HI, tools=[TOOL], tool_choice="any").tool_choice == "required"


@pytest.mark.parametrize(
    "grammar", [Grammar(kind="choice", value=["a", "b"]), {"kind": "choice", "value": ("a", "b")}]
)
def test_grammars_of_any_kind(grammar):
    assert generate_message(text="a", grammar=grammar).grammar == Grammar(kind="choice", value=["a", "b"])


def test_a_schema_may_be_a_map_whose_keys_keep_their_order():
    schema = MappingProxyType({"properties": {"b": {"const": "\u00e9"}, "a": {"minimum": np.float64(1.0)}}})
    text = '{"properties": {"b": {"const": "\u00e9"}, "a": {"minimum": 1.0}}}'
    for kind, value in (("json_schema", schema), ("json_schema", text)):
        grammar = generate_message(text="a", grammar={"kind": kind, "value": value}).grammar
        assert grammar == Grammar(kind="json_schema", value=text)
    with pytest.raises(InvalidRequest, match="cannot be JSON") as caught:
        generate_message(text="a", grammar={"kind": "json_schema", "value": {"minimum": math.nan}})
    assert caught.value.field == "grammar.value"
    with pytest.raises(InvalidRequest, match="expected str"):
        generate_message(text="a", grammar={"kind": "regex", "value": {"a": 1}})


def test_an_unknown_kind_of_grammar_is_told_which_there_are():
    with pytest.raises(
        InvalidRequest, match="'xml', allowed: json_object, json_schema, regex, choice, lark"
    ) as caught:
        generate_message(text="a", grammar={"kind": "xml", "value": "a"})
    assert (caught.value.field, caught.value.value) == ("grammar.kind", "xml")
    assert caught.value.limit == "json_object, json_schema, regex, choice, lark"


def test_turns_as_other_interfaces_write_them():
    """OpenAI's and Mistral's, as their clients dump an answer."""
    function = {"name": "f", "arguments": '{"a":  1}'}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "refusal": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "index": 0, "function": function},
                {"id": None, "type": "function", "function": {"name": "g", "arguments": {"é": [1, None]}}},
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "f"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
                {"type": "thinking", "thinking": "z", "closed": False},
            ],
            "prefix": True,
        },
    ]
    calls = [
        ToolCall(id="c1", name="f", arguments='{"a":  1}'),
        ToolCall(name="g", arguments='{"é": [1, null]}'),
    ]
    thoughts = [ThinkingChunk(thinking="xy"), ThinkingChunk(thinking="z", closed=False)]
    ours = [
        ChatMessage(role="user", content=[TextChunk(text="a"), TextChunk(text="b")]),
        ChatMessage(role="assistant", reasoning="hm", tool_calls=calls),
        ChatMessage(role="tool", content="3", tool_call_id="c1", name="f"),
        ChatMessage(role="assistant", content=thoughts, prefix=True),
    ]
    assert generate_message(messages=turns).messages == ours
    assert generate_message(messages=ours).messages == ours
    assert generate_message(
        messages=[{"role": "assistant", "reasoning": "a", "reasoning_content": "b"}]
    ).messages == [ChatMessage(role="assistant", reasoning="a")]


ASKED = [HI_DICT]
ANSWER = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "required"}}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [{"type": "function", "function": FUNCTION | {"strict": 1}}]}, "tools[0].strict"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [FUNCTION, FUNCTION | {"returns": {}}]}, "tools[1].returns"),
        ({"tools": [FUNCTION | {"parameters": [1]}]}, "tools[0].parameters"),
        ({"tools": [{"type": "function", "function": {"description": "d"}}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": "f"}]}, "tools[0].name"),
        ({"tools": "f"}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        (
            {"messages": [ANSWER | {"tool_calls": [{"type": "custom", "custom": {}}]}]},
            "messages[0].tool_calls[0].type",
        ),
        (
            {"messages": [ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": {"a": math.nan}}}]}]},
            "messages[0].tool_calls[0].arguments",
        ),
        ({"messages": [ANSWER | {"tool_calls": [ANSWER]}]}, "messages[0].tool_calls[0].role"),
        (
            {"messages": [HI_DICT | {"content": [{"type": "input_audio", "input_audio": {"data": "UklG"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [HI_DICT | {"content": [{"text": "a"}]}]}, "messages[0].content[0]"),
        ({"messages": [HI_DICT | {"content": [{"type": "text", "text": 3}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [HI_DICT | {"content": [{"type": "thinking", "thinking": [3]}]}]},
            "messages[0].content[0].thinking",
        ),
    ],
)
def test_what_other_interfaces_have_and_this_one_lacks_is_refused_by_name(arguments, field):
    with pytest.raises(InvalidRequest) as caught:
        generate_message(**{"messages": ASKED, **arguments})
    assert caught.value.field == field
    assert None not in (caught.value.limit, caught.value.value)
    assert field.rpartition(".")[0] in caught.value.message


def test_the_other_fields_of_any_kind():
    message = generate_message(
        text=np.str_("x"),
        priority=np.int8(2),
        deadline_s=np.float32(0.5),
        deltas=np.bool_(False),
        output_token_ids=np.array([1]),
        reasoning_effort=None,
        token_ids=None,
    )
    expected = Generate(stream=0, text="x", priority=2, deadline_s=0.5, deltas=False, output_token_ids=[1])
    assert message == expected
    assert [type(getattr(message, name)) for name in ("text", "priority", "deadline_s", "deltas")] == [
        *(str, int, float, bool)
    ]


deep: list = []
deep.append(deep)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ({"text": "a\ud800b"}, "text", "'\\ud800'"),
        ({"text": "caf\udce9"}, "text", "'\\udce9'"),
        ({"text": 5}, "text", "5"),
        ({"text": b"ab"}, "text", "b'ab'"),
        ({"text": bytearray(b"ab")}, "text", "b'ab'"),
        ({"token_ids": "ab"}, "token_ids", "ab"),
        ({"token_ids": b"ab"}, "token_ids", "b'ab'"),
        ({"token_ids": memoryview(b"ab")}, "token_ids", "b'ab'"),
        ({"token_ids": 5}, "token_ids", "5"),
        ({"token_ids": {1, 2}}, "token_ids", "set"),
        ({"token_ids": {1: 2}}, "token_ids", "{1: 2}"),
        ({"token_ids": [1, 2.0]}, "token_ids[1]", "2.0"),
        ({"token_ids": [1, True]}, "token_ids[1]", "True"),
        ({"token_ids": [1, "2"]}, "token_ids[1]", "2"),
        ({"token_ids": [1, None]}, "token_ids[1]", "null"),
        ({"token_ids": [1, 2**70]}, "token_ids", str(2**70)),
        ({"token_ids": [1, -(2**63) - 1]}, "token_ids", str(-(2**63) - 1)),
        ({"token_ids": [np.int64(1), 2**70]}, "token_ids[1]", str(2**70)),
        ({"token_ids": np.array([[1, 2]])}, "token_ids[0]", "[1, 2]"),
        ({"token_ids": np.array([1.0])}, "token_ids[0]", "1.0"),
        ({"token_ids": torch.empty(2, device="meta")}, "token_ids", "Tensor"),
        ({"token_ids": object()}, "token_ids", "object"),
        ({"token_ids": int}, "token_ids", "type"),
        ({"token_ids": [1, 2j]}, "token_ids[1]", "complex"),
        ({"output_token_ids": {1, 2}}, "output_token_ids", "set"),
        ({"priority": "x"}, "priority", "x"),
        ({"priority": 1.0}, "priority", "1.0"),
        ({"deadline_s": "1"}, "deadline_s", "1"),
        ({"deadline_s": Decimal("sNaN")}, "deadline_s", "Decimal"),
        ({"deltas": 1}, "deltas", "1"),
        ({"reasoning_effort": 3}, "reasoning_effort", "3"),
        ({"messages": "Hi"}, "messages", "Hi"),
        ({"messages": 3}, "messages", "3"),
        ({"messages": ["Hi"]}, "messages[0]", "Hi"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", "left out"),
        ({"messages": [{"role": None}]}, "messages[0].role", "left out"),
        ({"messages": [HI_DICT, HI_DICT | {"nmae": "x"}]}, "messages[1].nmae", "x"),
        ({"messages": [HI_DICT | {"content": ["Hi"]}]}, "messages[0].content[0]", "Hi"),
        ({"messages": [HI_DICT | {"content": "\ud800"}]}, "messages[0].content", "'\\ud800'"),
        ({"messages": [ChatMessage(role="user", content="\ud800")]}, "messages[0].content", "'\\ud800'"),
        (
            {"messages": [HI_DICT, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "\udfff"}]}]},
            *("messages[1].tool_calls[0].arguments", "'\\udfff'"),
        ),
        ({"messages": [HI_DICT | {"\ud800": "x"}]}, "messages[0].\\ud800", "'\\ud800'"),
        ({"messages": [HI_DICT | {"tool_calls": {"name": "f"}}]}, "messages[0].tool_calls", "{'name': 'f'}"),
        ({"messages": [HI_DICT | {(1, 2): "x"}]}, "messages[0][(1, 2)]", "tuple"),
        ({"messages": deep}, "messages", "more levels"),
        ({"sampling": 5}, "sampling", "int"),
        ({"sampling": "greedy"}, "sampling", "str"),
        ({"sampling": [SamplingParams()]}, "sampling", "list"),
        ({"sampling": {"max_token": 5}}, "max_token", "5"),
        ({"sampling": {1: 5}}, "1", "5"),
        ({"max_tokens": 2**64}, "sampling.max_tokens", str(2**64)),
        ({"max_tokens": 10**5000}, "sampling.max_tokens", "an integer of 16610 bits"),
        ({"max_tokens": 3.0}, "sampling.max_tokens", "3.0"),
        ({"max_tokens": True}, "sampling.max_tokens", "True"),
        ({"max_tokens": None}, "sampling.max_tokens", "null"),
        ({"max_tokens": np.array([3])}, "sampling.max_tokens", "[3]"),
        ({"seed": "1"}, "sampling.seed", "1"),
        ({"temperature": True}, "sampling.temperature", "True"),
        ({"temperature": 2**70}, "sampling.temperature", str(2**70)),
        ({"temperature": "0.5"}, "sampling.temperature", "0.5"),
        ({"temperature": 1j}, "sampling.temperature", "complex"),
        ({"ignore_eos": 1}, "sampling.ignore_eos", "1"),
        ({"stop": b"x"}, "sampling.stop", "b'x'"),
        ({"stop": [b"x"]}, "sampling.stop[0]", "b'x'"),
        ({"stop": ["x", "\udc80"]}, "sampling.stop[1]", "'\\udc80'"),
        ({"stop": 3}, "sampling.stop", "3"),
        ({"stop": None}, "sampling.stop", "null"),
        ({"stop_token_ids": True}, "sampling.stop_token_ids[0]", "True"),
        ({"stop_token_ids": "3"}, "sampling.stop_token_ids", "3"),
        ({"stop_token_ids": [1.5]}, "sampling.stop_token_ids[0]", "1.5"),
        ({"logit_bias": {"5": 1.0}}, "sampling.logit_bias", "{'5': 1.0}"),
        ({"logit_bias": {5.0: 1.0}}, "sampling.logit_bias", "{5.0: 1.0}"),
        ({"logit_bias": {5: "x"}}, "sampling.logit_bias[...]", "{5: 'x'}"),
        ({"logit_bias": [(5, 1.0)]}, "sampling.logit_bias", "[[5, 1.0]]"),
        ({"logit_bias": {2**70: 1.0}}, f"sampling.logit_bias[{2**70}]", str(2**70)),
        ({"logit_bias": {5: 2**70}}, "sampling.logit_bias[5]", str(2**70)),
        ({"images": "cat.png"}, "images", "cat.png"),
        ({"images": [b"x", "cat.png"]}, "images[1]", "cat.png"),
        ({"images": (Path(name) for name in "ab")}, "images[0]", "PosixPath"),
        ({"images": 3}, "images", "3"),
        ({"images": {b"x"}}, "images", "set"),
        ({"images": {"url": "x"}}, "images", "{'url': 'x'}"),
    ],
)
def test_what_no_message_can_carry_is_refused_by_name(arguments, field, value):
    with pytest.raises(InvalidRequest) as caught:
        generate_message(**arguments)
    assert (caught.value.field, caught.value.value) == (field, value)
    if field is not None:
        assert field.rpartition(".")[0] in caught.value.message


def test_images_are_bytes_of_files_and_no_paths():
    for images in (b"a", bytearray(b"a"), memoryview(b"a"), [b"a"], iter([memoryview(b"a")])):
        assert generate_message(images=images).images == [b"a"]
    with pytest.raises(InvalidRequest, match=r"expected the bytes of a file, got str; no path .*read_bytes\(\)"):
        generate_message(images="cat.png")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("token_id", "token_ids"),
        ("message", "messages"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, nearest):
    with pytest.raises(InvalidRequest, match=f"unknown argument '{name}'; did you mean {nearest}?") as caught:
        generate_message(**{name: 3})
    assert caught.value.field == name
    with pytest.raises(InvalidRequest, match=r"unknown argument 'zzz'; known: text, messages, .*, logprobs"):
        generate_message(zzz=1)


def test_not_a_number_can_be_carried_for_the_server_to_refuse():
    assert math.isnan(generate_message(temperature=np.float32("nan")).sampling.temperature)


def test_an_error_of_the_caller_s_own_iterable_is_not_renamed():
    def ids():
        yield 1
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        generate_message(token_ids=ids())


def test_an_answer_at_once_has_no_deltas():
    assert (
        whole_answer({"text": "a", "deltas": False})
        == whole_answer({"text": "a"})
        == {"text": "a", "deltas": False}
    )
    with pytest.raises(InvalidRequest) as caught:
        whole_answer({"text": "a", "deltas": True})
    assert (caught.value.field, caught.value.value) == ("deltas", "True")
