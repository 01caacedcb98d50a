"""Bodies of requests, made into what is asked of the engine."""

from __future__ import annotations

from typing import Any

import msgspec

from cierzo.engine.errors import InvalidRequest, NotFound
from cierzo.engine.messages import ModelInfo


class Rules(msgspec.Struct, frozen=True):
    """What requests may say of this model, here."""

    model: ModelInfo
    names: tuple[str, ...]
    lenient: bool = False
    max_depth: int = 64
    max_prompts: int = 128


class Asked(msgspec.Struct, frozen=True):
    """A request: arguments of `Client.generate`, and how its answer is to be told."""

    arguments: dict[str, Any]
    model: str
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    logprobs: int | None = None
    return_tokens_as_token_ids: bool = False
    passed_over: list[str] = []


_SAMPLING = ("max_tokens", "temperature", "top_p", "seed", "n", "stop")


def _body(body: bytes, rules: Rules) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is no JSON: {error}", field="body") from error
    if not isinstance(found, dict):
        raise InvalidRequest("the body must be an object", field="body", limit="an object")
    if found.get("model") not in rules.names:
        raise NotFound("there is no such model", field="model", limit=", ".join(rules.names))
    return found


def _asked(found: dict[str, Any], arguments: dict[str, Any], logprobs: int | None) -> Asked:
    arguments |= {name: found[name] for name in _SAMPLING if found.get(name) is not None}
    if logprobs is not None:
        arguments["logprobs"] = logprobs
    options = found.get("stream_options") or {}
    return Asked(
        arguments=arguments,
        model=found["model"],
        stream=bool(found.get("stream")),
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
        echo=bool(found.get("echo")),
        logprobs=logprobs,
    )


def read_chat(body: bytes, rules: Rules) -> Asked:
    """A request for a chat completion."""
    found = _body(body, rules)
    arguments = {name: found[name] for name in ("messages", "tools", "reasoning_effort") if found.get(name)}
    logprobs = (found.get("top_logprobs") or 0) if found.get("logprobs") else None
    return _asked(found, arguments, logprobs)


def read_completions(body: bytes, rules: Rules) -> list[Asked]:
    """A request for completions: one for each prompt."""
    found = _body(body, rules)
    prompt = found.get("prompt")
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompts = [prompt]
    else:
        prompts = prompt or []
    return [
        _asked(found, {"text" if isinstance(each, str) else "token_ids": each}, found.get("logprobs"))
        for each in prompts
    ]
