"""Addresses of the RPC: "HOST:PORT" or "unix:PATH"."""

from __future__ import annotations

from dataclasses import dataclass

from cierzo.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP endpoint; port 0 lets the system choose when serving. IPv6 hosts are written in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix stream socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """Raises ConfigError for anything that is neither "HOST:PORT" nor "unix:PATH"."""
    if text.startswith("unix:") and len(text) > len("unix:"):
        return UnixAddress(text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if colon and host and port.isascii() and port.isdigit() and int(port) < 65536:
        return TcpAddress(host, int(port))
    form = "HOST:PORT or unix:PATH"
    raise ConfigError(f"{text!r} is not an address: {form}", field="address", limit=form, value=text)
