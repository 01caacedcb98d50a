"""Sockets of the RPC as the system has them: who is at the other end, and whether it still is; stale files."""

from __future__ import annotations

import os
import socket
import stat
from ipaddress import ip_address

from cierzo.engine.frontend.address import TcpAddress

KEEPALIVE_PROBES = 4


def peer_of(name: object) -> tuple[str, bool]:
    """A peer's address in words, and whether it is on this machine: every Unix socket's is."""
    if not isinstance(name, tuple) or not name:
        return "a local peer", True
    host = ip_address(str(name[0]).partition("%")[0])
    mapped = getattr(host, "ipv4_mapped", None) or host
    return str(TcpAddress(str(mapped), name[1])), mapped.is_loopback


def find_half_open(sock: socket.socket, keepalive_s: float) -> None:
    """Have the kernel look for a peer that is gone without a word: after `keepalive_s` of silence, and as long
    again until the connection ends; also while something is on its way to it."""
    quiet_s = max(1, round(keepalive_s))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, quiet_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, quiet_s // KEEPALIVE_PROBES))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000 * quiet_s)


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
