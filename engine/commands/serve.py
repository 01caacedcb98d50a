"""`cierzo serve`."""

from __future__ import annotations

import argparse

import msgspec

from cierzo.engine.checkpoint import DEMO
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.launch import serve
from cierzo.engine.options import add_engine, add_options, add_rpc, chosen, engine_options

WHO_MAY_COME = ("keys", "tls_certificate", "tls_key", "tls_client_ca", "insecure")
WHAT_IS_TOLD = ("usage_file", "max_usage_bytes", "metrics", "log_format")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the engine's settings, the address, and the settings of the front end."""
    add_engine(parser)
    add_rpc(parser, "where to listen")
    fields = {*FrontendConfig.__struct_fields__} - {"address"}
    limits = fields.difference(WHO_MAY_COME, WHAT_IS_TOLD)
    groups = {"who may come": WHO_MAY_COME, "what is told": WHAT_IS_TOLD, "limits of the front end": limits}
    for title, names in groups.items():
        add_options(parser.add_argument_group(title), FrontendConfig, skip={"address"} | fields.difference(names))
    add_options(parser.add_argument_group("HTTP (needs the extra: pip install cierzo[gateway])"), HttpConfig)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    limits = chosen(arguments, FrontendConfig, skip={"address"})
    http = HttpConfig(**chosen(arguments, HttpConfig))
    if arguments.checkpoint == DEMO:  # whose folder has a name that nobody would type
        http = msgspec.structs.replace(http, served_model_name=(*http.served_model_name, DEMO))
    return serve(engine_options(arguments, frontend=FrontendConfig(address=arguments.rpc, **limits)), http)
