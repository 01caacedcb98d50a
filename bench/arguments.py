"""Types of command line arguments; argparse tells what they refuse."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Annotated

from msgspec import Meta

from cierzo.engine.settings import word_reader

MAX_SEED = 2**63 - 1  # that a server takes
positive = word_reader(Annotated[int, Meta(ge=1)])
count = word_reader(Annotated[int, Meta(ge=1, le=1 << 20)])  # of what a list is made, as long as that
whole = word_reader(Annotated[int, Meta(ge=0)])
finite = word_reader(float)
positive_float = word_reader(Annotated[float, Meta(gt=0)])
text = word_reader(str)
seed = word_reader(Annotated[int, Meta(ge=0, le=MAX_SEED)])


def token_ids(text: str) -> list[int]:
    """A prompt: token ids, separated by commas. Which of them there are is up to the model."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ArgumentTypeError(f"must be token ids separated by commas, got {text!r}")
    return [int(part) for part in parts]
