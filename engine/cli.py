"""The `cierzo` command: one function per subcommand, options derived from the structs that hold them.

Heavy modules are imported inside the subcommand that needs them, so that `--help` and the RPC clients
start at once and without torch. Whatever goes wrong is told in one line, and by the exit status (EPILOG).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from cierzo import __version__
from cierzo.bench.arguments import seed, text, token_ids
from cierzo.engine.config import EngineOptions, check_environment, checkpoint_path
from cierzo.engine.errors import CierzoError, ConfigError, CoreFailed, InvalidRequest, ProtocolError, refusal
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.messages import SamplingParams
from cierzo.engine.options import add_options, chosen

DEMO = "demo"
DEFAULT_RPC = "127.0.0.1:7071"
NOT_OF_THE_ENGINE = {"model", "kernels", "frontend"}
NOT_OF_ONE_ANSWER = {"n", "logprobs", "logit_bias"}  # a terminal shows one answer, and its text
EPILOG = (
    "Exit status: 0 done; 1 the run failed; 2 something was given wrongly: an argument, a setting, a request that "
    "is refused as it stands; 130 interrupted; 141 nobody reads the output any more."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run. Every error is one line on stderr; EPILOG says what the exit status means."""
    try:
        try:
            _print_anything()
            try:
                arguments = build_parser().parse_args(argv)
            except SystemExit as end:  # of --help, too
                return int(end.code or 0)
            check_environment()
            return int(arguments.run(arguments))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here a reader that is gone, or a full disk, still has a name
    except CierzoError as error:
        print(f"cierzo: {error.code}: {error}", file=sys.stderr)
        given_wrongly = isinstance(error, ConfigError | InvalidRequest) and not isinstance(error, ProtocolError)
        return 2 if given_wrongly else 1
    except KeyboardInterrupt:
        print("cierzo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except UnicodeEncodeError as error:  # a path that is no text, where text is sent or kept
        print(f"cierzo: {error.object[:200]!r} must be text in UTF-8", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"cierzo: out of memory: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a path that cannot be read or written, a full disk
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        print(f"cierzo: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def _print_anything() -> None:
    """A character that the terminal's encoding lacks is written as an escape, and ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Forget printed text that cannot be written: the interpreter would fail on it at its end."""
    with suppress(ValueError, AttributeError):  # there is no stdout, or no file behind it
        try:
            sys.stdout.flush()
        except OSError:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument; the usage, which may be fifty lines, is --help's."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="cierzo", description="A serving engine for Mistral Small 4.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"cierzo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _serve_command(_command(commands, "serve", _serve, "serve a checkpoint over the RPC"))
    _generate_command(_command(commands, "generate", _generate, "generate in this process, without a server"))
    _chat_command(_command(commands, "chat", _chat, "talk to a running server"))
    _demo_command(_command(commands, "demo", _demo, "serve the demo model and ask it one question"))
    _make_command(_command(commands, "make-checkpoint", _make, "write a random checkpoint"))
    info = _command(commands, "info", _info, "describe a checkpoint")
    info.add_argument(
        "checkpoint", metavar="CHECKPOINT", help=f"folder in Hugging Face's or Mistral's layout, or '{DEMO}'"
    )
    _plan_command(_command(commands, "plan", _plan, "plan a workload on devices that need not be here"))
    _bench_commands(_command(commands, "bench", None, "measure"))
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or isinstance(action.default, bool)
        return action.help if hidden else super()._get_help_string(action)


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int] | None, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


# --- options -----------------------------------------------------------------------------------------------


def _options(arguments: argparse.Namespace, **more: Any) -> EngineOptions:
    given = chosen(arguments, EngineOptions, skip=NOT_OF_THE_ENGINE)
    return EngineOptions(model=_checkpoint(arguments.checkpoint), **given, **more)


def _checkpoint(name: str) -> str:
    from cierzo.engine.launch import checkpoint_folder

    return checkpoint_folder(name)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    add_options(group, SamplingParams, skip=NOT_OF_ONE_ANSWER, readers={"seed": seed})


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(**chosen(arguments, SamplingParams, skip=NOT_OF_ONE_ANSWER))


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help=f"folder in Hugging Face's or Mistral's layout, or '{DEMO}'"
    )
    add_options(parser, EngineOptions, skip=NOT_OF_THE_ENGINE)


# --- commands ----------------------------------------------------------------------------------------------


def _serve_command(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    parser.add_argument("--rpc", default=DEFAULT_RPC, metavar="HOST:PORT|unix:PATH", help="where to listen")
    add_options(parser.add_argument_group("limits of the front end"), FrontendConfig, skip={"address"})


def _serve(arguments: argparse.Namespace) -> int:
    from cierzo.engine.launch import serve

    limits = chosen(arguments, FrontendConfig, skip={"address"})
    return serve(_options(arguments, frontend=FrontendConfig(address=arguments.rpc, **limits)))


def _generate_command(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    _add_sampling(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", type=text, metavar="TEXT", help="text to continue, as it is")
    what.add_argument(
        "--message", type=text, metavar="TEXT", help="a user's message, rendered by the chat template"
    )
    what.add_argument("--token-ids", type=token_ids, metavar="IDS", help="prompt as token ids, separated by commas")


def _generate(arguments: argparse.Namespace) -> int:
    from cierzo.engine.llm import LLM

    sampling = _sampling(arguments)
    options = msgspec.structs.asdict(_options(arguments))
    with LLM(options.pop("model"), **options) as llm:
        if arguments.message is not None:
            output = llm.chat([{"role": "user", "content": arguments.message}], sampling, progress=True)
        else:
            prompt = arguments.prompt if arguments.token_ids is None else arguments.token_ids
            output = llm.generate([prompt], sampling, progress=True)[0]
    print(output.text or ",".join(map(str, output.token_ids)))
    if output.finish_reason == "failed":
        raise CoreFailed(output.samples[0].message)
    return 0


def _chat_command(parser: argparse.ArgumentParser) -> None:
    _add_sampling(parser)
    parser.add_argument("--rpc", default=DEFAULT_RPC, metavar="HOST:PORT|unix:PATH", help="server to talk to")
    parser.add_argument(
        "--message", type=text, metavar="TEXT", help="one message; default: read them from the terminal"
    )
    parser.add_argument("--system", type=text, metavar="TEXT", help="a system message")


def _chat(arguments: argparse.Namespace) -> int:
    from cierzo.engine.terminal import chat

    return chat(arguments.rpc, arguments.message, arguments.system, _sampling(arguments))


def _demo_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", type=text, default="Why is the sky blue?", metavar="TEXT", help="the question")
    _add_sampling(parser)
    # what SmolLM2's makers recommend for chatting; at higher temperatures a model this small loses the thread
    parser.set_defaults(temperature=0.2, top_p=0.9)


def _demo(arguments: argparse.Namespace) -> int:
    from cierzo.engine.terminal import demo

    return demo(_checkpoint(DEMO), arguments.prompt, _sampling(arguments))


def _make_command(parser: argparse.ArgumentParser) -> None:
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
        choices=("hf", "hf-fp8", "native", "native-fp8", "native-nvfp4"),
        default="hf",
        help="Hugging Face's or Mistral's own layout, and what is quantised",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the random weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def _make(arguments: argparse.Namespace) -> int:
    from cierzo.engine.weights.make import make_checkpoint

    if not arguments.path:
        raise refusal("FOLDER", "the path of a folder that does not exist", arguments.path)
    make_checkpoint(
        Path(arguments.path),
        like=arguments.like,
        scale=arguments.scale,
        dtype=arguments.dtype,
        checkpoint_format=arguments.checkpoint_format,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
        progress=True,
    )
    return _print_info(Path(arguments.path))


def _info(arguments: argparse.Namespace) -> int:
    return _print_info(checkpoint_path(_checkpoint(arguments.checkpoint)))


def _print_info(folder: Path) -> int:
    from cierzo.engine.weights.info import describe

    print(describe(folder))
    return 0


def _plan_command(parser: argparse.ArgumentParser) -> None:
    from cierzo.bench.plan import command as plan

    plan.add_arguments(parser)


def _plan(arguments: argparse.Namespace) -> int:
    from cierzo.bench.plan import command as plan

    arguments.checkpoint = _checkpoint(arguments.checkpoint)
    return plan.main(arguments)


def _bench_commands(parser: argparse.ArgumentParser) -> None:
    from cierzo.bench import experts, load, step

    def run_step(arguments: argparse.Namespace) -> int:
        return step.run(arguments, sys.argv[3:])

    benches = parser.add_subparsers(required=True, metavar="BENCH")
    load.add_arguments(_command(benches, "load", load.main, "load a running server: closed or open loop"))
    experts.add_arguments(_command(benches, "experts", experts.main, "count which experts real traffic chooses"))
    step.add_arguments(_command(benches, "step", run_step, "time the step loop, or a model's step by operation"))


if __name__ == "__main__":
    raise SystemExit(main())
