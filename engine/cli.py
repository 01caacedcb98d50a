"""The `cierzo` command: one function per subcommand, options derived from the structs that hold them.

Heavy modules are imported inside the subcommand that needs them, so that `--help` and the RPC clients
start at once and without torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cierzo import __version__
from cierzo.engine.config import EngineOptions, check_environment
from cierzo.engine.errors import CierzoError, ConfigError
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.messages import SamplingParams
from cierzo.engine.options import add_options, chosen

DEMO = "demo"
DEFAULT_RPC = "127.0.0.1:7071"
NOT_OF_THE_ENGINE = {"model", "kernels", "frontend"}
NOT_OF_ONE_ANSWER = {"n", "logprobs", "logit_bias"}  # a terminal shows one answer, and its text


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; errors of the tree are printed as one line, and give exit status 2 (1 for a failed run)."""
    arguments = build_parser().parse_args(argv)
    try:
        check_environment()
        return int(arguments.run(arguments))
    except CierzoError as error:
        print(f"cierzo: {error.code}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("cierzo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:  # a path that cannot be read or written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"cierzo: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="cierzo", description="A serving engine for Mistral Small 4.")
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
    add_options(parser.add_argument_group("sampling"), SamplingParams, skip=NOT_OF_ONE_ANSWER)


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
    what.add_argument("--prompt", metavar="TEXT", help="text to continue, as it is")
    what.add_argument("--message", metavar="TEXT", help="a user's message, rendered by the chat template")
    what.add_argument("--token-ids", metavar="IDS", help="prompt as token ids, separated by commas")


def _generate(arguments: argparse.Namespace) -> int:
    from cierzo.engine.llm import LLM

    sampling = _sampling(arguments)
    options = msgspec.structs.asdict(_options(arguments))
    with LLM(options.pop("model"), **options) as llm:
        if arguments.message is not None:
            output = llm.chat([{"role": "user", "content": arguments.message}], sampling, progress=True)
        else:
            prompt = arguments.prompt if arguments.token_ids is None else _token_ids(arguments.token_ids)
            output = llm.generate([prompt], sampling, progress=True)[0]
    print(output.text or ",".join(map(str, output.token_ids)))
    return 0


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--token-ids must be integers separated by commas, got {text!r}", field="token_ids", value=text
        ) from None


def _chat_command(parser: argparse.ArgumentParser) -> None:
    _add_sampling(parser)
    parser.add_argument("--rpc", default=DEFAULT_RPC, metavar="HOST:PORT|unix:PATH", help="server to talk to")
    parser.add_argument("--message", metavar="TEXT", help="one message; default: read them from the terminal")
    parser.add_argument("--system", metavar="TEXT", help="a system message")


def _chat(arguments: argparse.Namespace) -> int:
    from cierzo.engine.terminal import chat

    return chat(arguments.rpc, arguments.message, arguments.system, _sampling(arguments))


def _demo_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default="Why is the sky blue?", metavar="TEXT", help="the question")
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
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def _make(arguments: argparse.Namespace) -> int:
    from cierzo.engine.weights.make import make_checkpoint

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
    return _print_info(arguments.path)


def _info(arguments: argparse.Namespace) -> int:
    return _print_info(_checkpoint(arguments.checkpoint))


def _print_info(path: str) -> int:
    from cierzo.engine.weights.info import describe

    print(describe(Path(path)))
    return 0


def _plan_command(parser: argparse.ArgumentParser) -> None:
    from cierzo.bench import plan

    plan.add_arguments(parser)


def _plan(arguments: argparse.Namespace) -> int:
    from cierzo.bench import plan

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
