"""Command line options: readers of words, options drawn from the structs that hold them, and the groups of options
that several subcommands have. A field's annotation reads its option's word, and describes it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta

from cierzo.engine.checkpoint import DEMO, checkpoint_folder
from cierzo.engine.config import EngineOptions
from cierzo.engine.errors import refusal
from cierzo.engine.frontend.client_options import ConnectOptions
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.messages import SamplingParams
from cierzo.engine.settings import unwrap, word_reader

MAX_SEED = 2**63 - 1  # that a server takes
NOT_OF_THE_ENGINE = {"model", "kernels", "frontend"}
NOT_OF_ONE_ANSWER = {"n", "logprobs", "prompt_logprobs", "logit_bias"}  # a terminal shows one answer, and its text
_METAVARS = {int: "N", float: "X", str: "TEXT"}
Parser = argparse.ArgumentParser | argparse._ArgumentGroup

# --- words -------------------------------------------------------------------------------------------------

positive = word_reader(Annotated[int, Meta(ge=1)])
count = word_reader(Annotated[int, Meta(ge=1, le=1 << 20)])  # of what a list is made, as long as that
whole = word_reader(Annotated[int, Meta(ge=0)])
finite = word_reader(float)
text = word_reader(str)
seed = word_reader(Annotated[int, Meta(ge=0, le=MAX_SEED)])


def token_ids(text: str) -> list[int]:
    """Token ids of a prompt, separated by commas. Which of them there are is up to the model."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be token ids separated by commas, got {text!r}")
    return [int(part) for part in parts]


# --- structs -----------------------------------------------------------------------------------------------


def add_options(
    parser: Parser,
    struct: type[msgspec.Struct],
    *,
    skip: Iterable[str] = (),
    readers: Mapping[str, Callable[[str], Any]] = {},
) -> None:
    """Add an option for each field of `struct`; the option of a field that holds several values may be repeated.

    readers: by field, what reads the option's word, where the annotation does not say all.
    """
    for field in msgspec.structs.fields(struct):
        if field.name in skip:
            continue
        flag = "--" + field.name.replace("_", "-")
        kinds, metas = unwrap(field.type)
        description = next((meta.description for meta in metas if meta.description), "")
        default = None if field.default is msgspec.NODEFAULT else field.default
        if kinds == (bool,):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=description)
        elif isinstance(default, tuple):
            item = kinds[0]
            told = f"{description}; may be repeated"
            parser.add_argument(flag, type=word_reader(item), action="append", metavar=_METAVARS[item], help=told)
        else:
            choices = [choice for choice in kinds if isinstance(choice, str)]
            parser.add_argument(
                flag,
                type=str if choices else readers.get(field.name) or word_reader(field.type),
                choices=choices or None,
                default=default,
                metavar=None if choices else _metavar(description, kinds[0]),
                help=description,
            )


def _metavar(description: str, kind: type) -> str:
    """The word that stands for an option's value in the help: FILE where the description begins with "file"."""
    first = description.partition(" ")[0]
    return first.upper() if first in ("file", "folder") else _METAVARS[kind]


def chosen(
    arguments: argparse.Namespace, struct: type[msgspec.Struct], *, skip: Iterable[str] = ()
) -> dict[str, Any]:
    """Keywords of `struct` that the options which `add_options` made were given; None leaves a field's default."""
    given = {
        name: getattr(arguments, name)
        for name in struct.__struct_fields__
        if name not in skip and getattr(arguments, name) is not None
    }
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


# --- groups of options -------------------------------------------------------------------------------------


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument CHECKPOINT."""
    layouts = f"folder in Hugging Face's or Mistral's layout, or '{DEMO}'"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=layouts)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add CHECKPOINT and the engine's settings."""
    add_checkpoint(parser)
    add_options(parser, EngineOptions, skip=NOT_OF_THE_ENGINE)


def engine_options(arguments: argparse.Namespace, **more: Any) -> EngineOptions:
    """Settings as the arguments of `add_engine` give them."""
    given = chosen(arguments, EngineOptions, skip=NOT_OF_THE_ENGINE)
    return EngineOptions(model=checkpoint_folder(arguments.checkpoint), **given, **more)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the sampling parameters of one answer."""
    group = parser.add_argument_group("sampling")
    add_options(group, SamplingParams, skip=NOT_OF_ONE_ANSWER, readers={"seed": seed})


def sampling(arguments: argparse.Namespace) -> SamplingParams:
    """Sampling parameters as the options of `add_sampling` give them."""
    return SamplingParams(**chosen(arguments, SamplingParams, skip=NOT_OF_ONE_ANSWER))


def add_effort(parser: argparse.ArgumentParser) -> None:
    """Add --reasoning-effort. Which words there are is up to the model, which refuses others with a list."""
    words = "how much a model that can choose thinks before it answers a message: none, high, ..."
    parser.add_argument("--reasoning-effort", type=text, metavar="WORD", help=words)


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Options by which a server lets a client in."""

    key_file: Annotated[str | None, Meta(description="file that holds the server's key for this client")] = None
    tls_ca: Annotated[
        str | None, Meta(description="file of the certificates that vouch for the server, which speaks TLS")
    ] = None
    tls_certificate: Annotated[
        str | None, Meta(description="file of the certificate (PEM) by which this client shows who it is")
    ] = None
    tls_key: Annotated[str | None, Meta(description="file of its private key, if the certificate's has none")] = (
        None
    )


def access(given: Access | argparse.Namespace) -> ConnectOptions:
    """The arguments of a client that the options stand for. Raises ConfigError."""
    key = None if given.key_file is None else _key(given.key_file)
    paths = {"tls": given.tls_ca, "tls_certificate": given.tls_certificate, "tls_key": given.tls_key}
    options = {name: value for name, value in {"key": key, **paths}.items() if value is not None}
    return cast(ConnectOptions, options)


def _key(path: str) -> str:
    """The key in a file. Raises ConfigError, which does not repeat it."""
    try:
        key = Path(path).read_text(encoding="ascii").strip()
        why = "" if key.isprintable() and key else "it has none" if not key else "it has more lines than one"
    except (OSError, UnicodeDecodeError) as error:
        key, why = "", (error.strerror or "") if isinstance(error, OSError) else "it is not ASCII"
    if why:
        raise refusal("key_file", "a file that holds a key", path, why)
    return key


def add_rpc(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add --rpc, the address of a server; `purpose` is its help."""
    parser.add_argument("--rpc", default=FrontendConfig().address, metavar="HOST:PORT|unix:PATH", help=purpose)
