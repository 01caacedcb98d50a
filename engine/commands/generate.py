"""`cierzo generate`: one answer, from an engine in this process."""

from __future__ import annotations

import argparse
import sys

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
    parser.add_argument("--suffix", type=text, metavar="TEXT", help="text that comes behind the answer to --prompt")


def run(arguments: argparse.Namespace) -> int:
    """Print the answer, or its token ids where the checkpoint has no tokenizer. Raises CierzoError."""
    params = sampling(arguments)
    _refuse_misplaced(arguments)
    options = msgspec.structs.asdict(engine_options(arguments))
    with LLM(options.pop("model"), **options) as llm:
        if arguments.message is not None:
            user = {"role": "user", "content": arguments.message}
            output = llm.chat([user], params, reasoning_effort=arguments.reasoning_effort, progress=True)
        else:
            prompt = arguments.prompt if arguments.token_ids is None else arguments.token_ids
            output = llm.generate([prompt], params, suffix=arguments.suffix, progress=True)[0]
    screen, parts = Screen(), output.samples[0].parts
    screen.show(
        parts if any(part.text or part.name for part in parts) else [], ",".join(map(str, output.token_ids))
    )
    screen.close()
    print()
    remark(output.finish_reason, parts, output.broken_calls, sys.stderr)
    if output.finish_reason == "failed":
        raise CoreFailed(output.samples[0].message)
    return 0


def _refuse_misplaced(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for an option that says nothing of this kind of prompt."""
    if arguments.reasoning_effort is not None and arguments.message is None:
        raise refusal("reasoning_effort", "with --message", arguments.reasoning_effort)
    if arguments.suffix is not None and arguments.prompt is None:
        raise refusal("suffix", "with --prompt", arguments.suffix)
