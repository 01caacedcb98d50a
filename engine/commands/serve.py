"""`cierzo serve`."""

from __future__ import annotations

import argparse

from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.launch import serve
from cierzo.engine.options import add_engine, add_options, add_rpc, chosen, engine_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the engine's settings, the address and the limits of the front end."""
    add_engine(parser)
    add_rpc(parser, "where to listen")
    add_options(parser.add_argument_group("limits of the front end"), FrontendConfig, skip={"address"})


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    limits = chosen(arguments, FrontendConfig, skip={"address"})
    return serve(engine_options(arguments, frontend=FrontendConfig(address=arguments.rpc, **limits)))
