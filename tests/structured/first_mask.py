"""`PYTHONPATH=tests python -m structured.first_mask`: how long a grammar takes from a request to its first mask.

Three times are taken of each, on the vocabulary of Mistral's tokenizers (131,072 tokens): writing the grammar of
the answer, compiling it in the front end's own process for that, from the asking to the answer, and compiling it
again with its first mask, as the core does. Every grammar is a new one, so that none is known. Exit status 1 if an
ordinary one takes more than LIMIT_MS by the median of all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "support"))

from llguidance import LLMatcher
from tekken_folders import write_tekken

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoders import Encoders
from cierzo.engine.frontend.encoding import Setup
from cierzo.engine.messages import ChatMessage, Generate, Grammar, Tool
from cierzo.engine.testing.words import fake_model
from cierzo.engine.text.grammar import OPTIONS, grammar_of, vocabulary_of, writer_of
from cierzo.engine.text.grammar_limits import parser_limits
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.token_table import grammar_tokenizer

LIMIT_MS = 5.0
FAR = 1e12
USER = ChatMessage(role="user", content="?")


def person(number: int) -> dict[str, Any]:
    """An ordinary schema."""
    text = {"type": "string", "maxLength": 40}
    return {
        "type": "object",
        "properties": {
            f"name_{number}": text,
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "mail": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 5},
            "address": {"type": "object", "properties": {"street": text, "city": text}, "required": ["city"]},
        },
        "required": [f"name_{number}", "age"],
        "additionalProperties": False,
    }


def asks(kind: str, value: Callable[[int], Any]) -> Callable[[int], Generate]:
    """A request with a grammar of its own, by a number."""
    return lambda number: Generate(stream=0, messages=[USER], grammar=Grammar(kind=kind, value=value(number)))  # type: ignore[arg-type]


def calls(number: int) -> Generate:
    """A request for calls of five tools."""
    tools = [Tool(name=f"tool_{place}", parameters=person(number), strict=True) for place in range(5)]
    return Generate(stream=0, messages=[USER], tools=tools, tool_choice="required")


ORDINARY = {
    "schema": asks("json_schema", lambda number: json.dumps(person(number))),
    "pattern": asks("regex", lambda number: rf"{number}-[0-9]{{3}}-[a-z]{{2,8}}(@[a-z]+\.[a-z]{{2,3}})?"),
    "choice of 20": asks("choice", lambda number: [f"choice {number} {place}" for place in range(20)]),
}
OTHERS = {
    "five strict tools": calls,
    "40,000 choices": asks("choice", lambda number: [f"{number:x}{place:x}" for place in range(40_000)]),
    "x{100000}": asks("regex", lambda number: f"{number}x{{100000}}"),
    "1,000 properties": asks(
        "json_schema", lambda number: json.dumps({"properties": {f"p{number}_{n}": {} for n in range(1000)}})
    ),
    "depth 90": asks("json_schema", lambda number: '{"items":' * 90 + f'{{"const":{number}}}' + "}" * 90),
}


async def measure(rounds: int) -> bool:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_tekken(Path(name), "v15", full=True)
        prompts = PromptEncoder.load(folder)
        assert prompts.tokenizer is not None
        model = fake_model(vocab_size=prompts.tokenizer.num_tokens, eos_token_ids=[2])  # type: ignore[union-attr]
        writer, table = writer_of(prompts, model), vocabulary_of(prompts, model)
        assert table is not None
        tokenizer, limits, config = grammar_tokenizer(table), parser_limits(), FrontendConfig()
        encoders = Encoders(config, Setup(checkpoint=str(folder), frontend=config, model=model))
        encoders.start()
        print(f"{len(table.tokens):,} tokens; medians of {rounds} rounds in ms (worst)")
        is_quick = True
        try:
            await encoders.compile(f"{OPTIONS}\nstart: /a/".encode(), FAR)  # once it is there
            for what, message in (ORDINARY | OTHERS).items():
                times: list[list[float]] = []
                refused = ""
                for number in range(rounds):
                    at = [time.perf_counter()]
                    how = {"in_thinking": False, "one_call": False, "apart": True}
                    grammar = grammar_of(writer, message(number), **how)
                    at.append(time.perf_counter())
                    try:
                        await encoders.compile(grammar.encode(), FAR)
                    except CierzoError as error:
                        refused = error.message
                    at.append(time.perf_counter())
                    if not refused:
                        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
                        matcher.compute_bitmask()
                        assert not matcher.is_error()
                    at.append(time.perf_counter())
                    times.append([1e3 * (after - before) for before, after in pairwise(at)])
                columns = [*zip(*times, strict=True), [sum(row) for row in times]]
                told = "  ".join(f"{median(column):7.2f} ({max(column):7.2f})" for column in columns)
                print(f"{what:20} written, compiled, made, all: {told}  {refused}", flush=True)
                is_quick &= what not in ORDINARY or median(columns[-1]) <= LIMIT_MS
        finally:
            await encoders.close()
    return is_quick


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(prog="structured.first_mask", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, metavar="N", help="of each grammar")
    return 0 if asyncio.run(measure(parser.parse_args().rounds)) else 1


if __name__ == "__main__":
    sys.exit(main())
