"""Talking to a server from a terminal: `cierzo chat`, and `cierzo demo`, which brings its own server."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from cierzo.engine.errors import CierzoError, ConnectionLost, CoreFailed
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.messages import ChatMessage, Final, SamplingParams

POLL_S = 0.05
STOP_TIMEOUT_S = 15.0


def chat(address: str, message: str | None, system: str | None, sampling: SamplingParams) -> int:
    """Send one message, or lead a conversation that is read from the terminal until its end (Ctrl-D).

    Ctrl-C ends an answer early. Raises CierzoError; within a conversation a turn that fails is told and forgotten.
    """
    history = [ChatMessage(role="system", content=system)] if system else []
    if message is not None:
        history.append(ChatMessage(role="user", content=message))
    with SyncClient(address) as client:
        _wait_ready(client)
        if message is not None:
            _turn(client, history, sampling)
            return 0
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text spoil their line alone
        while (line := _read_line()) is not None:
            history.append(ChatMessage(role="user", content=line))
            try:
                history.append(ChatMessage(role="assistant", content=_turn(client, history, sampling)))
            except (CierzoError, KeyboardInterrupt) as error:
                history.pop()
                told = f"{error.code}: {error}" if isinstance(error, CierzoError) else "the answer was cancelled"
                print(f"cierzo: {told}", file=sys.stderr)
    return 0


def demo(checkpoint: str, prompt: str, sampling: SamplingParams) -> int:
    """Start a server of the checkpoint, ask it one question over the RPC, stop it."""
    turns = [ChatMessage(role="user", content=prompt)]
    signal.signal(signal.SIGTERM, _terminated)  # the server must not outlive the demo
    with tempfile.TemporaryDirectory(prefix="cierzo-demo-") as folder:
        address = f"unix:{Path(folder) / 'rpc.sock'}"
        server = subprocess.Popen(
            [sys.executable, "-m", "cierzo.engine", "serve", checkpoint, "--rpc", address], start_new_session=True
        )
        try:
            with _connect(address, server) as client:
                print(f"\n> {prompt}\n", flush=True)
                _turn(client, turns, sampling)
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    return 0


def _terminated(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _connect(address: str, server: subprocess.Popen[bytes]) -> SyncClient:
    """A client of the starting server, once that is ready."""
    while server.poll() is None:
        with contextlib.suppress(ConnectionLost):  # it does not listen yet, or has ended
            client = SyncClient(address)
            try:
                client.wait_ready()
            except BaseException:
                client.close()
                raise
            return client
        time.sleep(POLL_S)
    raise CoreFailed(f"the server ended before it was ready, with status {server.returncode}")


def _wait_ready(client: SyncClient) -> None:
    if client.health().state == "loading":
        print("the server still loads its model ...", file=sys.stderr)
    client.wait_ready()


def _turn(client: SyncClient, messages: list[ChatMessage], sampling: SamplingParams) -> str:
    """Stream one answer into the terminal; it ends with a line of what it took. Gives the answer's text.

    Interrupted, it cancels the answer at the server. Raises CierzoError, also for an answer that failed.
    """
    answer = []
    started = time.monotonic()
    first = 0.0
    generation = client.generate(messages=messages, sampling=sampling)
    try:
        for delta in generation:
            first = first or time.monotonic()
            answer.append(delta.text)
            print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        generation.cancel()
        print(flush=True)
        raise
    first = first or time.monotonic()
    final = generation.final
    print(f"\n\n{_summary(final, first - started, time.monotonic() - first)}", flush=True)
    if final.samples[0].finish_reason == "failed":
        raise CoreFailed(final.samples[0].message or "the answer failed")
    return "".join(answer)


def _summary(final: Final, first_token_s: float, decode_s: float) -> str:
    """As seen by this client. Tokens/s is of the tokens after the first one, whose time is the prompt's."""
    usage = final.usage
    rate = (usage.output_tokens - 1) / decode_s if decode_s > 0 else 0.0
    return (
        f"[{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.output_tokens} output "
        f"tokens, time to first token {first_token_s:.3f} s, {rate:.1f} tokens/s]"
    )


def _read_line() -> str | None:
    """The next line that is not empty; None at the end of input."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return None
        if line:
            return line
