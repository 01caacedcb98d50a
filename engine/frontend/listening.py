"""Sockets of the RPC: what is bound, who may reach it, and what the kernel is asked to watch."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Callable
from fcntl import ioctl
from ipaddress import ip_address
from struct import Struct as Layout
from termios import TIOCOUTQ
from typing import cast

from cierzo.engine.errors import ConfigError, refusal
from cierzo.engine.frontend.address import Address, TcpAddress, UnixAddress
from cierzo.engine.frontend.config import FrontendConfig

log = logging.getLogger(__name__)

INT = Layout("i")
KEEPALIVE_PROBES = 4
LINGER_S = 2.0  # how long a peer may take to read what its connection ends with
KERNEL_BYTES = 128 * 1024  # that the kernel takes beyond what it can send: a reader that stalls is seen early


async def listen(
    config: FrontendConfig, address: Address, connection: Callable[[], asyncio.Protocol]
) -> asyncio.Server:
    """Bind an address, and make a `connection` for each peer. Raises ConfigError if it cannot be had, or if other
    machines would reach what has not both keys and TLS."""
    loop = asyncio.get_running_loop()
    try:
        if isinstance(address, UnixAddress):
            remove_stale(address.path)
            return await loop.create_unix_server(connection, address.path)
        await _require_guarded(config, address)
        return await loop.create_server(connection, address.host, address.port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror or error}",
            field="address",
            limit="one that is free",
            value=address,
        ) from error


async def _require_guarded(config: FrontendConfig, address: TcpAddress) -> None:
    """Refuse an address that other machines reach, unless there are keys and TLS, or nobody minds."""
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    if all(ip_address(str(where[0]).partition("%")[0]).is_loopback for *_, where in found):
        return
    lacking = [name for name, given in (("keys", config.keys), ("TLS", config.tls_certificate)) if not given]
    if not lacking:
        return
    what = f"{address} is reached from other machines, and has no {' and no '.join(lacking)}"
    if not config.insecure:
        raise refusal(
            "address", "one of this machine, or have keys and TLS, or insecure be set", str(address), what
        )
    log.warning("%s", what)


def peer_of(name: object) -> tuple[str, bool]:
    """A peer's address in words, and whether it is on this machine: every Unix socket's is."""
    if not isinstance(name, tuple) or not name:
        return "a local peer", True
    host = ip_address(str(name[0]).partition("%")[0])
    mapped = getattr(host, "ipv4_mapped", None) or host
    return str(TcpAddress(str(mapped), name[1])), mapped.is_loopback


def in_kernel(sock: socket.socket | None) -> int:
    """Bytes that the kernel has taken of a connection, and its peer has not."""
    try:
        (num_bytes,) = INT.unpack(ioctl(cast(socket.socket, sock).fileno(), TIOCOUTQ, bytes(INT.size)))
    except (AttributeError, OSError):
        return 0
    return cast(int, num_bytes)


def watch_socket(sock: socket.socket, keepalive_s: float) -> None:
    """Have the kernel send at once, keep little, and look for a peer that is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, KERNEL_BYTES)
    find_half_open(sock, keepalive_s)


def find_half_open(sock: socket.socket, keepalive_s: float) -> None:
    """Have the kernel look for a peer that is gone without a word: after `keepalive_s` of silence, and as long
    again until the connection ends; also while something is on its way to it."""
    quiet_s = max(1, round(keepalive_s))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, quiet_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, quiet_s // KEEPALIVE_PROBES))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000 * quiet_s)


def bound(server: asyncio.Server, address: Address) -> Address:
    """The address that a server listens on: with the port that the system chose, where that was left to it."""
    if isinstance(address, UnixAddress):
        return address
    return TcpAddress(address.host, server.sockets[0].getsockname()[1])


def unbind(address: Address) -> None:
    """Remove the file of an address that was bound, if it has one that is still there."""
    if isinstance(address, UnixAddress) and os.path.exists(address.path):
        os.unlink(address.path)


def remove_stale(path: str) -> None:
    """Remove the socket file of a server that died; raises OSError if one listens, or if it is another file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(17, "the file exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise OSError(98, "another server listens there")
