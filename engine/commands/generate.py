"""`cierzo generate`: one answer, from an engine in this process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from cierzo.engine.commands.screen import Screen, remark
from cierzo.engine.errors import CoreFailed, refusal
from cierzo.engine.llm import LLM
from cierzo.engine.options import add_effort, add_engine, add_sampling, engine_options, sampling, text, token_ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the engine's settings, the sampling parameters and the prompt."""
    add_engine(parser)
    add_sampling(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", type=text, metavar="TEXT", help="text to continue, as it is")
    what.add_argument(
        "--message", type=text, metavar="TEXT", help="a user's message, rendered by the chat template"
    )
    what.add_argument("--token-ids", type=token_ids, metavar="IDS", help="prompt as token ids, separated by commas")
    add_effort(parser)
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image before the message: PNG, JPEG, WebP or GIF; may be given again",
    )
    parser.add_argument("--suffix", type=text, metavar="TEXT", help="text that comes behind the answer to --prompt")


def run(arguments: argparse.Namespace) -> int:
    """Print the answer, or its token ids where the checkpoint has no tokenizer. Raises CierzoError."""
    params = sampling(arguments)
    _refuse_misplaced(arguments)
    images = [_read(path) for path in arguments.image]
    options = msgspec.structs.asdict(engine_options(arguments))
    with LLM(options.pop("model"), **options) as llm:
        if arguments.message is not None:
            parts = [*({"type": "image"} for _ in images), {"type": "text", "text": arguments.message}]
            user = {"role": "user", "content": parts if images else arguments.message}
            effort = arguments.reasoning_effort
            output = llm.chat([user], params, reasoning_effort=effort, images=images, progress=True)
        else:
            prompt = arguments.prompt if arguments.token_ids is None else arguments.token_ids
            output = llm.generate([prompt], params, suffix=arguments.suffix, progress=True)[0]
    screen, said = Screen(), output.samples[0].parts
    screen.show(said if any(part.text or part.name for part in said) else [], ",".join(map(str, output.token_ids)))
    screen.close()
    print()
    remark(output.finish_reason, said, output.broken_calls, sys.stderr)
    if output.finish_reason == "failed":
        raise CoreFailed(output.samples[0].message)
    return 0


def _read(path: str) -> bytes:
    """The bytes of an image's file. Raises ConfigError where there is none."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise refusal("image", "a file that can be read", path, error.strerror or str(error)) from error


def _refuse_misplaced(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for an option that says nothing of this kind of prompt."""
    if arguments.image and arguments.message is None:
        raise refusal("image", "with --message", arguments.image[0])
    if arguments.reasoning_effort is not None and arguments.message is None:
        raise refusal("reasoning_effort", "with --message", arguments.reasoning_effort)
    if arguments.suffix is not None and arguments.prompt is None:
        raise refusal("suffix", "with --prompt", arguments.suffix)
