"""`python -m cierzo.bench.images CHECKPOINT`: the time to the first token of a prompt with an image, and memory.

A conversation of a system's words and a random image is asked for one token, by `LLM` in this process, decoding of
the file included. Its image is, in turn: new, so that the tower runs; known, behind other words, so that its
embeddings are in the cache and no more; in the same prompt as before, of which the prefix cache has most. As many
tokens of words alone show what the text model takes. The checkpoint has a tokenizer and a tower:

    cierzo make-checkpoint FOLDER --like small4 --scale mini --tokenizer --vision-scale full
"""

from __future__ import annotations

import argparse
import io
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from cierzo.bench.campaign.table import grid_of, text
from cierzo.bench.context import resident_gb
from cierzo.bench.report import Recording, progress, run_benchmark
from cierzo.bench.vision import image_size
from cierzo.engine.errors import ConfigError
from cierzo.engine.llm import LLM
from cierzo.engine.options import add_checkpoint, positive

PROGRAM = "cierzo.bench.images"
SIZES = ("640x480", "1024x1024")
WORD_IDS = (100, 1000)  # tokens that stand for words in every checkpoint
WARM_TOKENS = 500


class FirstTokenRow(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds to the first token of a prompt, each run's: with an image that is new, with one whose embeddings are
    cached, with all of it as before, and with as many tokens of words alone."""

    width: int
    height: int
    tokens: int
    new_s: tuple[float, ...]
    known_s: tuple[float, ...]
    same_s: tuple[float, ...]
    words_s: tuple[float, ...]


class MemoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """Resident memory of this process in GB: before the model, with it, after all images, the most at any time."""

    before_gb: float
    loaded_gb: float
    after_gb: float
    peak_gb: float


def measure(llm: LLM, width: int, height: int, repeats: int) -> FirstTokenRow:
    """Measure prompts with images of one size, after one of each kind that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ("new_s", "known_s", "same_s", "words_s")}

    def timed(name: str, call: Callable[[], Any]) -> int:
        begin = time.perf_counter()
        found = call()
        seconds[name].append(time.perf_counter() - begin)
        return len((found[0] if isinstance(found, list) else found).prompt_token_ids)

    for number in range(repeats + 1):
        file = picture(width, height, seed=number)
        for name, words in (("new_s", "What"), ("known_s", "And what"), ("same_s", "And what")):
            before = {"role": "system", "content": f"{number}: {words} is to be seen here?"}
            turns: list[dict[str, Any]] = [before, {"role": "user", "content": [{"type": "image"}]}]
            tokens = timed(name, partial(llm.chat, turns, images=[file], max_tokens=1))
        ids = np.random.default_rng(number).integers(*WORD_IDS, (1, tokens))
        timed("words_s", partial(llm.generate, ids, max_tokens=1))
    new, known, same, words_alone = (tuple(each[1:]) for each in seconds.values())
    return FirstTokenRow(
        width=width, height=height, tokens=tokens, new_s=new, known_s=known, same_s=same, words_s=words_alone
    )


def picture(width: int, height: int, seed: int) -> bytes:
    """A PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def table(rows: Sequence[FirstTokenRow], memory: MemoryRow) -> str:
    """The rows as text, by medians."""
    grid = [
        {
            "image": f"{row.width}x{row.height}",
            "prompt tokens": f"{row.tokens:,}",
            "new image ms": f"{median(row.new_s) * 1e3:,.0f}",
            "known image ms": f"{median(row.known_s) * 1e3:,.0f}",
            "same prompt ms": f"{median(row.same_s) * 1e3:,.0f}",
            "words alone ms": f"{median(row.words_s) * 1e3:,.0f}",
        }
        for row in rows
    ]
    sizes = [f"{value:.2f}" for value in msgspec.structs.astuple(memory)]
    said = "resident GB: {} before the model, {} with it, {} after the images, {} at most".format(*sizes)
    return f"{text(grid_of('', grid))}\n{said}" if rows else said


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write JSON if asked; exit status 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0], allow_abbrev=False)
    add_checkpoint(parser)
    sizes = [image_size(word) for word in SIZES]
    parser.add_argument("--sizes", type=image_size, nargs="*", default=sizes, metavar="WxH", help="in pixels")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="prompts of each kind")
    parser.add_argument("--text-only", action="store_true", help="leave the tower aside, for its memory: no images")
    return run_benchmark(parser, _run, argv)


def _run(arguments: argparse.Namespace) -> int:
    report = Recording("images", arguments.json, ["python", "-m", PROGRAM, *sys.argv[1:]])
    before_gb = resident_gb()
    with LLM(arguments.checkpoint, text_only=arguments.text_only) as llm:
        if llm.config.model.vision is None and not arguments.text_only:
            raise ConfigError(f"{arguments.checkpoint} has no vision tower", field="checkpoint")
        # Weights are mapped files: in memory once they have been used, by a prompt that meets all experts.
        llm.generate(np.random.default_rng(0).integers(*WORD_IDS, (1, WARM_TOKENS)), max_tokens=1)
        loaded_gb = resident_gb()
        sizes = [] if arguments.text_only else arguments.sizes
        pairs = progress(sizes, desc="images")
        rows = [measure(llm, width, height, arguments.repeats) for width, height in pairs]
        after_gb = resident_gb()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    memory = MemoryRow(before_gb=before_gb, loaded_gb=loaded_gb, after_gb=after_gb, peak_gb=peak_gb)
    print(table(rows, memory))
    report.write(vars(arguments) | {"json": None}, [*rows, memory])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
