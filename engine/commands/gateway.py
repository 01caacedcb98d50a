"""`cierzo gateway`: the HTTP door as a process of its own, before servers that speak the RPC."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Annotated, cast

import msgspec
import uvloop
from msgspec import Meta

from cierzo.engine.errors import CierzoError, Unauthorized, refusal
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.client_options import ConnectOptions
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.tls import Tls
from cierzo.engine.gateway.config import HttpConfig, check_http
from cierzo.engine.log_lines import queued_lines
from cierzo.engine.options import Access, access, add_options, chosen

HTTP = "127.0.0.1:8000"
OF_FRONTEND = ("insecure", "log_format", "max_connections", "high_water_bytes", "slow_reader_s", "keepalive_s")
OTHERS = {*FrontendConfig.__struct_fields__}.difference(OF_FRONTEND)


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the process, beside those of its door and of the way to its servers."""

    http_tls_certificate: Annotated[
        str, Meta(description="file of the certificate chain (PEM) of the HTTP door; none: no TLS")
    ] = ""
    http_tls_key: Annotated[str, Meta(description="file of the certificate's private key (PEM)")] = ""
    drain_s: Annotated[float, Meta(ge=0, description="seconds that open requests have to finish at the end")] = 25.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the servers' addresses, the ways to them, and the settings of the door."""
    servers = parser.add_argument_group("servers")
    told = f"a server of the model (default: {FrontendConfig().address}); may be repeated for several of them"
    servers.add_argument("--rpc", action="append", metavar="HOST:PORT|unix:PATH", help=told)
    add_options(servers, Access)
    door = parser.add_argument_group("HTTP")
    door.add_argument("--http", default=HTTP, metavar="HOST:PORT|unix:PATH", help="where to listen")
    add_options(door, HttpConfig, skip={"http"})
    add_options(door, Gateway)
    add_options(door, FrontendConfig, skip=OTHERS)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    http = HttpConfig(**chosen(arguments, HttpConfig))
    http = http if http.http else msgspec.structs.replace(http, http=HTTP)
    check_http(http)
    settings = Gateway(**chosen(arguments, Gateway))
    frontend = FrontendConfig(
        tls_certificate=settings.http_tls_certificate,
        tls_key=settings.http_tls_key,
        **chosen(arguments, FrontendConfig, skip=OTHERS),
    )
    rpc = arguments.rpc or [FrontendConfig().address]
    with queued_lines(frontend.log_format):
        return uvloop.run(_serve(rpc, access(arguments), http, frontend, settings.drain_s))


async def _serve(
    rpc: list[str], options: ConnectOptions, http: HttpConfig, frontend: FrontendConfig, drain_s: float
) -> int:
    """Listen, and serve until SIGINT, or SIGTERM, which gives open requests `drain_s`."""
    from cierzo.engine.gateway.remote import Remote  # with the packages for HTTP, which need not be there
    from cierzo.engine.gateway.server import HttpServer

    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)

    async def connect(key: str | None) -> Client:
        return await Client.connect(rpc, **cast(ConnectOptions, {**options, "key": key}))

    remote = Remote(connect, lambda: connect(options.get("key")), trusts_all=frontend.insecure)
    tls = Tls(frontend) if frontend.tls_certificate or frontend.tls_key else None
    door = None
    try:
        try:
            await remote.open()
        except Unauthorized as error:
            why = "the server has keys: give the gateway one of its own, without rights, to ask how it is"
            raise refusal("key_file", "a file with a key that the server knows", "none", why) from error
        guarded = msgspec.structs.replace(frontend, keys="at the server" if await _has_keys(connect) else "")
        door = HttpServer(http, guarded, remote, tls)
        await door.start()
        if tls is not None:
            tls.start()
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, tls.reload)
        print(f"ready: {', '.join(rpc)} at {door.address}", flush=True)
        reason = await signals.get()
        await door.close(drain_s if reason == signal.SIGTERM else 0.0)
        return 0
    finally:
        if door is not None:
            await door.close()
        if tls is not None:
            tls.close()
        await remote.close()


async def _has_keys(connect: Callable[[None], Awaitable[Client]]) -> bool:
    """Whether the server refuses who has no key; one that is not there counts as one that does not."""
    try:
        await (await connect(None)).close()
    except Unauthorized:
        return True
    except CierzoError:
        return False
    return False
