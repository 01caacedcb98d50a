"""`python -m cierzo.engine.frontend.encoder_process --socket PATH`: a process that encodes prompts, or compiles
grammars, one at a time.

Started by the front end, not by hand; it ends when the front end closes the socket.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.encoding import Compiled, Job, Loaded, RequestEncoder, Setup
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.frames import LENGTH_BYTES
from cierzo.engine.log_lines import plain_lines
from cierzo.engine.messages import Message
from cierzo.engine.server_process import end_with_parent
from cierzo.engine.text.grammar import vocabulary_of
from cierzo.engine.text.grammar_check import GrammarCompiler, on_deep_stack
from cierzo.engine.text.prompt import PromptEncoder


def main() -> int:
    """Parse and run."""
    end_with_parent()
    parser = argparse.ArgumentParser(
        prog="cierzo.engine.frontend.encoder_process", description="Encodes prompts.", allow_abbrev=False
    )
    parser.add_argument("--socket", required=True, metavar="PATH", help="Unix socket of the front end")
    plain_lines("text")
    return run(parser.parse_args().socket)


def run(socket_path: str) -> int:
    """Connect, read the set-up, load the tokenizer, say so; then answer jobs until the socket ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front end, which then ends this process
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(socket_path)
    with connection, connection.makefile("rb") as incoming, contextlib.suppress(EOFError, ConnectionError):
        setup = msgspec.msgpack.decode(_read(incoming), type=Setup)
        plain_lines(setup.frontend.log_format)
        try:
            folder = Path(setup.checkpoint)
            prompts = PromptEncoder.load(folder, setup.tokenizer) if setup.checkpoint else PromptEncoder()
        except CierzoError as error:
            _write(connection, [msgspec.msgpack.encode(failure(0, error))])
            return 1
        if setup.compiles and (table := vocabulary_of(prompts, setup.model)) is not None:
            on_deep_stack(partial(_compile, connection, incoming, GrammarCompiler(table)))
            return 0
        encoder = RequestEncoder(prompts, setup.frontend, setup.model)
        _write(connection, [msgspec.msgpack.encode(Loaded())])
        while True:
            job = msgspec.msgpack.decode(_read(incoming), type=Job)
            body = _read(incoming)
            attached = _read(incoming) if job.has_attached else None
            images = [_read(incoming) for _ in range(job.num_images)]
            _write(connection, encoder.answer(job, body, attached, images))
    return 0


def _compile(connection: socket.socket, incoming: BinaryIO, compiler: GrammarCompiler) -> None:
    """Say that grammars can come, and compile them. Raises EOFError at the end."""
    answer: Message = Loaded()
    while True:
        _write(connection, [msgspec.msgpack.encode(answer)])
        job = msgspec.msgpack.decode(_read(incoming), type=Job)
        try:
            compiler.check(_read(incoming).decode())
            answer = Compiled()
        except CierzoError as error:
            answer = failure(job.stream, error)


def _read(incoming: BinaryIO) -> bytes:
    """The body of the next frame. Raises EOFError at the end."""
    length = int.from_bytes(_exactly(incoming, LENGTH_BYTES), "big")
    return _exactly(incoming, length)


def _exactly(incoming: BinaryIO, num_bytes: int) -> bytes:
    data = incoming.read(num_bytes)
    if len(data) < num_bytes:
        raise EOFError
    return data


def _write(connection: socket.socket, bodies: Iterable[bytes]) -> None:
    for body in bodies:
        connection.sendall(len(body).to_bytes(LENGTH_BYTES, "big"))
        connection.sendall(body)


if __name__ == "__main__":
    raise SystemExit(main())
