"""Bodies of /v1/chat/completions, as clients of OpenAI, Mistral and vLLM write them."""

from __future__ import annotations

from typing import Any

from cierzo.engine.frontend.bounds import count, missing, must_be
from cierzo.engine.gateway.asked_grammar import read_choice, read_grammar
from cierzo.engine.gateway.asked_images import read_image
from cierzo.engine.gateway.field_rows import CALL, CALLS, CHAT, MESSAGE, PART_ROWS, PARTS, TOOL, TOOLS
from cierzo.engine.gateway.fields import Sieve
from cierzo.engine.gateway.reading import Asked, Body, Rules, entries, sequence


def read_chat(body: bytes, rules: Rules) -> Asked:
    """Read what is asked for. Raises InvalidRequest with the field's place, and NotFound for another model."""
    read = Body("chat", body, CHAT, rules)
    turns = sequence(read.need("messages"), "messages")
    count("messages", turns, rules.max_turns)
    arguments = read.arguments
    arguments["messages"] = [_turn(turn, place, read) for place, turn in entries(turns, "messages")]
    arguments.setdefault("max_tokens", rules.model.max_model_len)
    if "tools" in read.given:
        tools = entries(read.given["tools"], "tools")
        arguments["tools"] = [_tool(tool, place, read.sieve) for place, tool in tools]
    read_choice(read)
    read_grammar(read)
    _logprobs(read, "logprobs", "top_logprobs")
    if type(number := read.given.get("prompt_logprobs")) is int and "top_prompt_logprobs" not in read.given:
        arguments["prompt_logprobs"] = number  # as clients of vLLM say it
    else:
        _logprobs(read, "prompt_logprobs", "top_prompt_logprobs")
    _continued(read)
    return read.asked()


def _turn(turn: Any, place: str, read: Body) -> dict[str, Any]:
    sieve = read.sieve
    fields = sieve.served(turn, MESSAGE, place)
    if fields.get("role") == "developer":
        fields["role"] = "system"
    if "content" not in turn and fields.get("role") != "assistant":
        raise missing(f"{place}.content")
    if isinstance(content := fields.get("content"), list):
        fields["content"] = [_part(part, at, read) for at, part in entries(content, f"{place}.content")]
    if "tool_calls" in fields:
        calls = entries(fields["tool_calls"], f"{place}.tool_calls")
        fields["tool_calls"] = [_call(call, at, sieve) for at, call in calls]
    return fields


def _part(part: Any, place: str, read: Body) -> dict[str, Any]:
    kind = read.sieve.kind(part, PARTS, place)
    fields = read.sieve.served(part, PART_ROWS[kind], place)
    if kind == "image_url":
        return read_image(read, fields.get("image_url"), f"{place}.image_url", place)
    return fields


def _call(call: Any, place: str, sieve: Sieve) -> dict[str, Any]:
    sieve.kind(call, CALLS, place, default="function")
    return sieve.served(call, CALL, place)


def _tool(tool: Any, place: str, sieve: Sieve) -> dict[str, Any]:
    sieve.kind(tool, TOOLS, place, default="function")
    return sieve.served(tool, TOOL, place)


def _logprobs(read: Body, name: str, top: str) -> None:
    """Make a flag, and the number of alternatives, the engine's one number."""
    wanted, number = read.flag(name), read.integer(top)
    if not wanted and number:
        raise must_be(top, f"left out, unless {name} is true", number)
    if wanted:
        read.arguments[name] = number or 0
        read.places[f"sampling.{name}"] = read.places[name] = top


def _continued(read: Body) -> None:
    """Have the answer go on with the last turn, if vLLM's way of saying so is used."""
    goes_on = read.flag("continue_final_message")
    if read.flag("add_generation_prompt", default=not goes_on) == goes_on:
        raise must_be("add_generation_prompt", "the opposite of continue_final_message", goes_on)
    if goes_on and read.arguments["messages"]:
        read.arguments["messages"][-1]["prefix"] = True
