"""`cierzo make-key`."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cierzo.engine.errors import refusal
from cierzo.engine.frontend.keys import key_line, new_key, read_key_file
from cierzo.engine.frontend.tenants import RIGHTS, Name
from cierzo.engine.settings import word_reader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tenant, its rights, and the file."""
    parser.add_argument("tenant", type=word_reader(Name), metavar="TENANT", help="whose key it is")
    rights = "stats: the server's figures; experts: those of experts among them; drain: to stop and begin admission"
    parser.add_argument(
        "--right",
        action="append",
        choices=RIGHTS,
        default=[],
        help=f"what the key opens besides requests of the tenant's own ({rights}); may be repeated",
    )
    told = "add a line with the key's digest to this file, and one with the tenant if it has none"
    parser.add_argument("--keys", metavar="FILE", help=f"{told}; it is made if it is not there")


def run(arguments: argparse.Namespace) -> int:
    """Print a new key, which is kept nowhere, and put its digest where a server finds it."""
    key = new_key()
    line = key_line(key, arguments.tenant, tuple(dict.fromkeys(arguments.right)))
    if arguments.keys is None:
        print(key, flush=True)
        _tell("lines for the key file; the first one only if it has no line of this tenant:")
        _tell(_tenant_line(arguments.tenant), line)
        return 0
    with _added(arguments.keys, arguments.tenant, line) as lines:
        print(key, flush=True)
    if len(lines) > 1:
        _tell(f"{arguments.keys}: the tenant {arguments.tenant} is new there, without limits")
    _tell(f"{arguments.keys}: added, and read by a server at its start, and again on SIGHUP:", *lines)
    return 0


@contextmanager
def _added(path: str, tenant: str, line: str) -> Iterator[list[str]]:
    """Append to the key file, and give the lines; they are taken back if it is wrong with them, or if the key
    cannot be told. Raises ConfigError if it is wrong as it is. Meanwhile no other make-key changes it."""
    try:
        file = open(path, "ab+", buffering=0, opener=_open)  # noqa: SIM115, it is closed below
    except OSError as error:
        raise refusal("keys", "a file that can be written", path, str(error.strerror or error)) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = tenant in read_key_file(path).tenants
        lines = [line] if known else [_tenant_line(tenant), line]
        size = os.fstat(file.fileno()).st_size
        ends = size == 0 or os.pread(file.fileno(), 1, size - 1) == b"\n"
        try:
            data = ("" if ends else "\n").encode() + "".join(f"{each}\n" for each in lines).encode()
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            read_key_file(path)
            yield lines
        except BaseException:
            os.ftruncate(file.fileno(), size)
            raise


def _open(path: str, flags: int) -> int:
    """Open a file, for its owner alone if it is new; a pipe without waiting for whoever reads it."""
    return os.open(path, flags | os.O_NONBLOCK, 0o600)


def _tenant_line(tenant: str) -> str:
    return f'{{"tenant": "{tenant}"}}'


def _tell(*lines: str) -> None:
    """Print beside the key, which stands alone on stdout."""
    print(*lines, sep="\n", file=sys.stderr)
