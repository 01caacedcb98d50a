"""Bodies of /v1/completions and /v1/fim/completions."""

from __future__ import annotations

from typing import Any

import msgspec

from cierzo.engine.frontend.bounds import count, must_be
from cierzo.engine.gateway.asked_grammar import read_grammar
from cierzo.engine.gateway.field_rows import COMPLETIONS, FIM
from cierzo.engine.gateway.reading import Asked, Body, Rules, text

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def read_completions(body: bytes, rules: Rules) -> list[Asked]:
    """Read what is asked for, prompt by prompt. Raises InvalidRequest with the field's place, and NotFound for
    another model."""
    read = Body("completions", body, COMPLETIONS, rules)
    prompts = _prompts(read.need("prompt"), rules)
    arguments = read.arguments
    arguments.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    echo = read.flag("echo")
    drops_output = echo and type(arguments["max_tokens"]) is int and arguments["max_tokens"] == 0
    if drops_output:
        arguments["max_tokens"] = 1
    if echo and "suffix" in arguments:
        raise must_be("echo", "false, with suffix", echo)
    if echo and "logprobs" in arguments and "prompt_logprobs" not in arguments:
        arguments["prompt_logprobs"] = arguments["logprobs"]
        read.places["sampling.prompt_logprobs"] = "logprobs"
    read_grammar(read)
    asked = read.asked(echo=echo, drops_output=drops_output)
    return [
        msgspec.structs.replace(
            asked, arguments={**asked.arguments, argument: prompt}, places={**asked.places, argument: place}
        )
        for place, argument, prompt in prompts
    ]


def read_fim(body: bytes, rules: Rules) -> Asked:
    """Read what is asked for. Raises InvalidRequest with the field's place, and NotFound for another model."""
    read = Body("fim", body, FIM, rules)
    read.arguments["text"] = text("", read.given, "prompt")
    read.arguments.setdefault("max_tokens", rules.model.max_model_len)
    read.places["text"] = "prompt"
    read_grammar(read)
    return read.asked()


def _prompts(prompt: Any, rules: Rules) -> list[tuple[str, str, Any]]:
    """Prompts as (place in the body, argument of a generation, value)."""
    if isinstance(prompt, str):
        return [("prompt", "text", prompt)]
    kinds = set(map(type, prompt)) if isinstance(prompt, list) else set()
    if kinds == {int}:
        return [("prompt", "token_ids", prompt)]
    if kinds != {str} and kinds != {list}:
        raise must_be("prompt", "a text, token ids, or a list of texts or of lists of token ids", prompt)
    count("prompt", prompt, rules.max_prompts)
    for number, one in enumerate(prompt if kinds == {list} else ()):
        if set(map(type, one)) != {int}:
            raise must_be(f"prompt[{number}]", "token ids", one)
    argument = "text" if kinds == {str} else "token_ids"
    return [(f"prompt[{number}]", argument, one) for number, one in enumerate(prompt)]
