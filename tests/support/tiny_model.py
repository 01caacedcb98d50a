"""The tiny model of tests/data/tiny, which answers rightly: asked about instances that it was never trained on."""

from __future__ import annotations

import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

from cierzo.bench.tiny.tasks import TASKS, Instance, drawn
from cierzo.engine.llm import LLM
from cierzo.engine.outputs import Output

FOLDER = Path(__file__).parents[1] / "data" / "tiny"
SETTINGS: dict[str, Any] = {"threads": 1, "max_model_len": 256, "kv_cache_gib": 0.02}
ANSWERED: dict[str, Any] = {"temperature": 0.0, "max_tokens": 64}


def held_out(task: str, count: int, seed: int = 3) -> list[Instance]:
    draw = random.Random(seed)
    return [drawn(task, draw, held_out=True) for _ in range(count)]


def of_all_tasks(count: int, seed: int = 3) -> list[Instance]:
    """So many of each task, in turns."""
    listed = [held_out(task, count, seed) for task in TASKS]
    return [one for row in zip(*listed, strict=True) for one in row]


def file_of(one: Instance) -> bytes:
    """The PNG file of an image."""
    assert one.image is not None
    file = BytesIO()
    one.image.save(file, "PNG")
    return file.getvalue()


def arguments(one: Instance) -> dict[str, Any]:
    """A question as a conversation's only turn, and what it is asked with."""
    images = [] if one.image is None else [file_of(one)]
    turn = {
        "role": "user",
        "content": [*({"type": "image"} for _ in images), {"type": "text", "text": one.question}],
    }
    chosen = {"images": images, "tools": one.tools, "reasoning_effort": one.effort}
    return {"messages": turn, **ANSWERED, **{name: value for name, value in chosen.items() if value}}


def ask(llm: LLM, one: Instance, **more: Any) -> Output:
    """Ask a question."""
    return llm.chat(**arguments(one) | more)


def is_right(one: Instance, said: Any) -> bool:
    """Whether text, thoughts and call are all as they should be, of an answer or a sample."""
    calls = [(call.name, json.loads(call.arguments)) for call in said.tool_calls]
    return (said.thinking, said.text, calls) == (one.thinking, one.answer, [one.call] if one.call else [])
