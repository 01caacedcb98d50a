"""`cierzo chat`: talk to a running server from a terminal."""

from __future__ import annotations

import argparse
import io
import sys
import time

from cierzo.engine.commands.screen import Screen, remark
from cierzo.engine.errors import CierzoError, CoreFailed
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.frontend.client_options import ConnectOptions
from cierzo.engine.messages import ChatMessage, Final, SamplingParams, ToolCall
from cierzo.engine.options import Access, access, add_effort, add_options, add_rpc, add_sampling, sampling, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sampling parameters, the server's address and the messages."""
    add_sampling(parser)
    add_rpc(parser, "server to talk to")
    add_options(parser, Access)
    parser.add_argument(
        "--message", type=text, metavar="TEXT", help="one message; default: read them from the terminal"
    )
    parser.add_argument("--system", type=text, metavar="TEXT", help="a system message")
    add_effort(parser)


def run(arguments: argparse.Namespace) -> int:
    """Send --message, or lead a conversation."""
    effort = arguments.reasoning_effort
    return chat(arguments.rpc, arguments.message, arguments.system, sampling(arguments), effort, access(arguments))


def chat(
    address: str,
    message: str | None,
    system: str | None,
    params: SamplingParams,
    effort: str | None = None,
    options: ConnectOptions | None = None,
) -> int:
    """Send one message, or lead a conversation that is read from the terminal until its end (Ctrl-D). Where the
    model calls a tool, a line is its result.

    Ctrl-C ends an answer early. Raises CierzoError; within a conversation a turn that fails is told and forgotten.
    """
    history = [ChatMessage(role="system", content=system)] if system else []
    if message is not None:
        history.append(ChatMessage(role="user", content=message))
    with SyncClient(address, **(options or {})) as client:
        _wait_ready(client)
        if message is not None:
            turn(client, history, params, effort)
            return 0
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text spoil their line alone
        while (said := _read_turn(history)) is not None:
            history.append(said)
            if _open_calls(history):
                continue
            try:
                history.append(turn(client, history, params, effort))
            except (CierzoError, KeyboardInterrupt) as error:
                history.pop()
                told = f"{error.code}: {error}" if isinstance(error, CierzoError) else "the answer was cancelled"
                print(f"cierzo: {told}", file=sys.stderr)
    return 0


def _wait_ready(client: SyncClient) -> None:
    if client.health().state == "loading":
        print("the server still loads its model ...", file=sys.stderr)
    client.wait_ready()


def turn(
    client: SyncClient, messages: list[ChatMessage], params: SamplingParams, effort: str | None = None
) -> ChatMessage:
    """Stream one answer into the terminal, then a line of what it took; return the answer as a turn.

    An interrupt cancels the answer at the server. Raises CierzoError, also for an answer that failed.
    """
    screen, started, first = Screen(), time.monotonic(), 0.0
    generation = client.generate(messages=messages, sampling=params, reasoning_effort=effort)
    try:
        for delta in generation:
            first = first or time.monotonic()
            screen.show(delta.parts, delta.text)
    except KeyboardInterrupt:
        generation.cancel()
        print(flush=True)
        raise
    finally:
        screen.close()
    first = first or time.monotonic()
    final = generation.final
    print(f"\n\n{_summary(final, first - started, time.monotonic() - first)}", flush=True)
    if final.samples[0].finish_reason == "failed":
        raise CoreFailed(final.samples[0].message or "the answer failed")
    answer = generation.answer()
    remark(answer.finish_reason, answer.parts, answer.broken_calls, sys.stdout)
    return answer.turn


def _summary(final: Final, first_token_s: float, decode_s: float) -> str:
    """Usage and speed as this client saw them; tokens/s leaves out the first token, whose time is the prompt's."""
    usage = final.usage
    rate = (usage.output_tokens - 1) / decode_s if decode_s > 0 else 0.0
    return (
        f"[{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.output_tokens} output "
        f"tokens, time to first token {first_token_s:.3f} s, {rate:.1f} tokens/s]"
    )


def _open_calls(history: list[ChatMessage]) -> list[ToolCall]:
    """Calls of the last answer that have no result yet."""
    answered = set()
    for turn in reversed(history):
        if turn.role != "tool":
            return [call for call in turn.tool_calls if call.id not in answered]
        answered.add(turn.tool_call_id)
    return []


def _read_turn(history: list[ChatMessage]) -> ChatMessage | None:
    """Read what the user says next, or the result of a call, where one is open; None at the end of input."""
    call = next(iter(_open_calls(history)), None)
    line = _read_line("> " if call is None else f"{call.name}> ")
    if line is None:
        return None
    if call is None:
        return ChatMessage(role="user", content=line)
    return ChatMessage(role="tool", content=line, tool_call_id=call.id, name=call.name)


def _read_line(prompt: str) -> str | None:
    """The next line that is not empty; None at the end of input."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return None
        if line:
            return line
