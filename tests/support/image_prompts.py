"""Prompts with small images for tests: few pictures in few sizes, so that requests share them."""

from __future__ import annotations

import random
from hashlib import blake2b

import numpy as np

from cierzo.engine.messages import PromptImage, SamplingParams, Submit

IMAGE, BREAK, END = 8, 9, 10  # token ids
UNIT = 2  # pixels to a side of a token


def picture(number: int, rows: int, columns: int, unit: int = UNIT) -> tuple[bytes, bytes]:
    """Pixels of a picture, and their digest."""
    draw = np.random.default_rng([number, rows, columns])
    pixels = draw.standard_normal((rows * unit, columns * unit, 3), np.float32).tobytes()
    return pixels, blake2b(pixels + bytes([rows, columns]), digest_size=16).digest()


def tokens_of(rows: int, columns: int) -> list[int]:
    row = [*([IMAGE] * columns), BREAK]
    return [*(row * rows)[:-1], END]


def prompt_of(parts: list[int | tuple[int, int, int]], unit: int = UNIT) -> tuple[list[int], list[PromptImage]]:
    """A prompt of token ids, and (picture, rows, columns) where an image stands."""
    tokens: list[int] = []
    images: list[PromptImage] = []
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
            continue
        number, rows, columns = part
        pixels, digest = picture(number, rows, columns, unit)
        images.append(PromptImage(len(tokens), rows, columns, digest, pixels))
        tokens += tokens_of(rows, columns)
    return tokens, images


def random_parts(rng: random.Random, num_images: int, most_text: int = 6) -> list[int | tuple[int, int, int]]:
    """Text between images: some begin with one, and some end with one."""
    parts: list[int | tuple[int, int, int]] = []
    for _ in range(num_images):
        parts += [rng.randrange(8) for _ in range(rng.randrange(most_text))]
        parts.append((rng.randrange(3), *rng.choice([(1, 1), (2, 3), (3, 2), (4, 1)])))
    parts += [rng.randrange(8) for _ in range(rng.randrange(most_text))]
    return parts or [1]


def submit(request_id: int, parts: list[int | tuple[int, int, int]], **sampling: object) -> Submit:
    tokens, images = prompt_of(parts)
    params = SamplingParams(**{"max_tokens": 6, "seed": request_id, **sampling})
    return Submit(request_id=request_id, prompt_token_ids=tokens, sampling=params, images=images)
