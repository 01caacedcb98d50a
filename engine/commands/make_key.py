"""`cierzo make-key`."""

from __future__ import annotations

import argparse
import os
import sys

from cierzo.engine.errors import ConfigError
from cierzo.engine.frontend.keys import key_line, new_key, read_key_file
from cierzo.engine.frontend.tenants import RIGHTS, Name
from cierzo.engine.settings import word_reader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tenant, its rights, and the file."""
    parser.add_argument("tenant", type=word_reader(Name), metavar="TENANT", help="whose key it is")
    parser.add_argument(
        "--right", action="append", choices=RIGHTS, default=[], help="what else it may ask for; may be repeated"
    )
    told = "add a line with the key's digest to this file, and one with the tenant if it has none"
    parser.add_argument("--keys", metavar="FILE", help=f"{told}; it is made if it is not there")


def run(arguments: argparse.Namespace) -> int:
    """Print a new key, which is kept nowhere, and put its digest where a server finds it."""
    key = new_key()
    line = key_line(key, arguments.tenant, tuple(dict.fromkeys(arguments.right)))
    if arguments.keys is None:
        print(f"a line for the key file:\n{line}", file=sys.stderr)
    else:
        _add(arguments.keys, arguments.tenant, line)
        print(f"{arguments.keys}: a server reads it at its start, and again on SIGHUP", file=sys.stderr)
    print(key)
    return 0


def _add(path: str, tenant: str, line: str) -> None:
    """Append to the key file. Raises ConfigError if it is wrong as it is: then nothing is added."""
    is_new = not os.path.exists(path)
    known = not is_new and tenant in read_key_file(path).tenants
    lines = [line] if known else [f'{{"tenant": "{tenant}"}}', line]
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(file).st_size
        ends = size == 0 or _last_byte(path) == b"\n"
        os.write(file, ("" if ends else "\n").encode() + "".join(f"{each}\n" for each in lines).encode())
    finally:
        os.close(file)
    try:
        read_key_file(path)
    except ConfigError:
        os.truncate(path, size)
        raise


def _last_byte(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
