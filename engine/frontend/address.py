"""Addresses to listen on: "HOST:PORT" or "unix:PATH"."""

from __future__ import annotations

import msgspec

from cierzo.engine.errors import refusal

MAX_PORT = 65_535
MAX_PATH_BYTES = 107  # of a Unix socket, on Linux


class TcpAddress(msgspec.Struct, frozen=True):
    """A TCP endpoint; port 0 lets the system choose when serving. IPv6 hosts are written in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(msgspec.Struct, frozen=True):
    """A Unix stream socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """Raises ConfigError for anything that is neither "HOST:PORT" nor "unix:PATH"."""
    limit = f"HOST:PORT or unix:PATH (ports up to {MAX_PORT}, paths up to {MAX_PATH_BYTES} bytes)"
    if not isinstance(text, str):  # of a caller without a type checker, and of argparse for "--rpc=--"
        raise refusal("address", limit, text)
    kind, _, path = text.partition(":")
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        if kind == "unix":
            if path and "\0" not in path and len(path.encode()) <= MAX_PATH_BYTES:
                return UnixAddress(path)
        elif "/" in host:
            pass  # a URL
        elif host.encode("idna") and port.isascii() and port.isdigit() and int(port) <= MAX_PORT:
            return TcpAddress(host, int(port))
    except UnicodeError:
        pass  # no name of a file or host
    raise refusal("address", limit, text)
