"""Images of a simulation: small files, a few of which come again and again, and their tokens in prompts."""

from __future__ import annotations

import random
from functools import lru_cache

from support.image_files import picture

from cierzo.engine.messages import PromptImage, VisionInfo
from cierzo.engine.text.image_tokens import Images, grid_of, tokens_of
from cierzo.engine.text.images import ImageLimits, prepare

SIZES = ((1, 1), (3, 1), (1, 4), (2, 3), (5, 2), (4, 4))  # columns and rows
LIMITS = ImageLimits(max_images=16, max_image_bytes=1 << 20, max_image_pixels=1 << 20, max_image_tokens=1 << 20)
NUM_TOKENS = 3  # of the vocabulary, its last, stand for images


def vision(vocab_size: int) -> VisionInfo:
    """Images as a simulated model takes them: a pixel is a token."""
    return VisionInfo(1, 1, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), vocab_size - 3, vocab_size - 2, vocab_size - 1)


def illustrated(rng: random.Random, prompt: list[int], most: int, vocab_size: int) -> tuple[list[int], list[bytes]]:
    """A prompt behind images, as many as are drawn and fit `most` tokens; and their files. So prompts begin alike,
    and some of those that do have other images."""
    files: list[bytes] = []
    before: list[int] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        size, seed = rng.choice(SIZES), rng.randrange(2)
        tokens = tokens_of(grid_of(*size, vision(vocab_size)), vision(vocab_size))
        if len(before) + len(tokens) + len(prompt) <= most:
            before += tokens
            files.append(_file(*size, seed))
    return before + prompt, files


def placed(files: list[bytes], prompt: list[int], vocab_size: int) -> list[PromptImage]:
    """The images as a core is told of them."""
    fields = [f"images[{number}]" for number in range(len(files))]
    return Images(prepare(files, fields, vision(vocab_size), LIMITS), vision(vocab_size)).placed(prompt)


@lru_cache
def _file(width: int, height: int, seed: int) -> bytes:
    return picture(width, height, seed=seed)
