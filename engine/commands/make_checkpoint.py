"""`cierzo make-checkpoint`: random weights in the proportions of a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from cierzo.engine.checkpoint_format import PUBLISHED_FORMATS
from cierzo.engine.errors import refusal
from cierzo.engine.options import seed
from cierzo.engine.weights.info import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the architecture, its size, its number formats and its tokenizer."""
    parser.add_argument("path", metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--like", choices=("small4", "small3"), required=True, help="whose architecture")
    parser.add_argument(
        "--scale",
        default="tiny",
        metavar="tiny|mini|full|X",
        help="tiny: a few MB; mini: the benchmark checkpoint in proportion; full: true size; X: a factor in (0, 1]",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="stored number format")
    parser.add_argument(
        "--checkpoint-format",
        choices=tuple(PUBLISHED_FORMATS),
        default="hf",
        help="Hugging Face's or Mistral's own layout, and what is quantised",
    )
    parser.add_argument(
        "--tokenizer", action="store_true", help="with a tekken.json that fits, so that it takes words and chats"
    )
    parser.add_argument("--vision", action="store_true", help="with a vision tower, so that it takes images")
    parser.add_argument(
        "--vision-scale", metavar="tiny|mini|full|X", help="with a tower of this scale, not of the text's"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the random weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def run(arguments: argparse.Namespace) -> int:
    """Write the checkpoint, then print what it holds."""
    from cierzo.engine.text.short_tekken import short_tekken  # imports mistral-common
    from cierzo.engine.weights.make import make_checkpoint  # imports torch, which --help can do without

    if not arguments.path:
        raise refusal("FOLDER", "the path of a folder that does not exist", arguments.path)
    folder = make_checkpoint(
        Path(arguments.path),
        like=arguments.like,
        scale=arguments.scale,
        dtype=arguments.dtype,
        checkpoint_format=arguments.checkpoint_format,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
        progress=True,
        tokenizer=short_tekken if arguments.tokenizer else None,
        vision=arguments.vision or arguments.vision_scale is not None,
        vision_scale=arguments.vision_scale,
    )
    print(describe(folder))
    return 0
