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


def ask(llm: LLM, one: Instance, **more: Any) -> Output:
    """Ask a question, as a conversation's only turn."""
    images = [] if one.image is None else [file_of(one)]
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": one.question}]
    arguments = {"tools": one.tools or None, "reasoning_effort": one.effort, "images": images or None, **ANSWERED}
    return llm.chat({"role": "user", "content": parts}, **(arguments | more))


def is_right(one: Instance, output: Output, sample: int = 0) -> bool:
    """Whether text, thoughts and call are all as they should be."""
    said = output.samples[sample]
    calls = [(call.name, json.loads(call.arguments)) for call in said.tool_calls]
    return (said.thinking, said.text, calls) == (one.thinking, one.answer, [one.call] if one.call else [])
