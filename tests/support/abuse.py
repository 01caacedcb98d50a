"""Attacks on a front end's event loop and memory, by raw bytes, with the figures of each.

    python tests/support/abuse.py [--scale 1.0] [--only NAME]

`--scale 1.0` is the long form; `make test` runs a reduced one. Each attack gets a server's address, must be
answered to the end, and afterwards the server must serve. The table has, for each: the loop's longest turn in
processor time, the peak of the process's resident memory, and how long the attack took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

SERVER = Path(__file__).with_name("abused_server.py")
FRAME = 4 * 1024 * 1024
MOST_TURN_MS = 20.0
MOST_PEAK_MB = 1536.0
WAIT_S = 300.0
encode = msgspec.msgpack.Encoder().encode
Figures = dict[str, float]


class Wire:
    """A connection that may say anything, and reads what is answered."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, address: str, *features: str) -> Wire:
        """Connect and say hello."""
        host, _, port = address.rpartition(":")
        wire = cls(*await asyncio.open_connection(host, int(port)))
        hello = {"type": "hello", "magic": "cierzo", "version": 3, "features": ["attach", *features]}
        wire.send(frame(encode(hello)))
        assert (await wire.hear())["type"] == "welcome"
        return wire

    def send(self, data: bytes) -> None:
        """Write bytes as they are."""
        self.writer.write(data)

    async def hear(self) -> dict[str, Any]:
        """The next message; {} at the end of the connection."""
        try:
            size = int.from_bytes(await self.reader.readexactly(4), "big")
            message: dict[str, Any] = msgspec.msgpack.decode(await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return {}
        return message

    async def ends(self, number: int) -> list[dict[str, Any]]:
        """The last messages of so many streams, or up to the connection's end."""
        found: list[dict[str, Any]] = []
        while len(found) < number and (message := await self.hear()):
            if message["type"] in ("final", "error", "pong"):
                found.append(message)
        return found

    async def close(self) -> None:
        """Close the connection."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def frame(body: bytes) -> bytes:
    """A frame with this body."""
    return len(body).to_bytes(4, "big") + body


def listed(field: str, entry: bytes, num_bytes: int, stream: int, *, last: bool = False) -> bytes:
    """The frame of a `generate` whose `field` is a list of equal entries, of so many bytes in all. `last`: stream
    and type stand behind the list."""
    number = (num_bytes - 64) // len(entry)
    names = encode("type") + encode("generate") + encode("stream") + encode(stream)
    entries = encode(field) + b"\xdd" + number.to_bytes(4, "big") + entry * number
    return frame(b"\x83" + (entries + names if last else names + entries))


async def _floods(address: str, frames: list[bytes], expected: int | None = None) -> list[dict[str, Any]]:
    """Send frames on one connection, and wait for their answers."""
    wire = await Wire.connect(address)
    for each in frames:
        wire.send(each)
    answers = await wire.ends(len(frames) if expected is None else expected)
    await wire.close()
    return answers


async def _all_end(address: str, frames: list[bytes], kind: str, expected: int | None = None) -> Figures:
    """Send frames as `_floods` does, and see that all answers are of one type."""
    answers = await _floods(address, frames, expected)
    assert {answer["type"] for answer in answers} == {kind}, answers[:2]
    return {"answers": len(answers)}


TURN = b"\x81\xa4role\xa4user"


def _count(scale: float, full: int) -> int:
    return max(2, round(scale * full))


async def empty_messages(address: str, scale: float) -> Figures:
    """Chats of 380,000 empty messages, 4 MiB each."""
    answers = await _floods(address, [listed("messages", TURN, FRAME, n) for n in range(_count(scale, 12))])
    assert {answer["field"] for answer in answers} == {"messages"}, answers[:2]
    return {"refused": len(answers)}


async def small_chats(address: str, scale: float) -> Figures:
    """Chats of thousands of empty messages in frames that are decoded where they arrive."""
    number = _count(scale, 200)
    answers = await _floods(address, [listed("messages", TURN, 60_000, n) for n in range(number)])
    return {"refused": len(answers)}


async def ids(address: str, scale: float) -> Figures:
    """Four million token ids of one byte, and the longest prompt that is no error."""
    frames = [listed("token_ids", b"\x01", FRAME, n) for n in range(_count(scale, 12))]
    frames += [listed("token_ids", b"\x01", 262_000, 100 + n) for n in range(_count(scale, 12))]
    answers = await _floods(address, frames)
    assert sorted({answer["type"] for answer in answers}) == ["error", "final"]
    return {"answers": len(answers)}


async def small_ids(address: str, scale: float) -> Figures:
    """Frames of 64 KiB with as many token ids."""
    return await _all_end(
        address, [listed("token_ids", b"\x01", 64 * 1024, n) for n in range(_count(scale, 100))], "final"
    )


async def output_ids(address: str, scale: float) -> Figures:
    """Resumed generations of 200,000 tokens, with stop strings to look for in them."""
    message = {"type": "generate", "stream": 0, "token_ids": [1], "output_token_ids": [65] * 200_000}
    sampling = {"max_tokens": 262_000, "temperature": 0, "stop": ["a" * 250 + str(n) for n in range(16)]}
    bodies = [encode({**message, "stream": n, "sampling": sampling}) for n in range(_count(scale, 6))]
    small = [
        encode({**message, "output_token_ids": [65] * 50_000, "stream": 50 + n, "sampling": sampling})
        for n in range(_count(scale, 6))
    ]
    return await _all_end(address, [frame(body) for body in bodies + small], "final")


async def parameters(address: str, scale: float) -> Figures:
    """Frames of 64 KiB full of biases, and of stop strings."""
    base = {"type": "generate", "token_ids": [1]}
    bias = {"logit_bias": dict.fromkeys(range(5000), 1.0)}
    stops = {"stop": ["ab"] * 20_000}
    frames = [
        frame(encode({**base, "stream": n, "sampling": bias if n % 2 else stops}))
        for n in range(_count(scale, 200))
    ]
    return await _all_end(address, frames, "error")


async def inline_prompts(address: str, scale: float) -> Figures:
    """The longest prompts that are encoded on the loop."""
    frames = [
        frame(encode({"type": "generate", "stream": n, "text": f"{n:04d}" + "word " * 408}))
        for n in range(_count(scale, 500))
    ]
    return await _all_end(address, frames, "final")


async def long_prompts(address: str, scale: float) -> Figures:
    """64 prompts of 16,000 characters in one write."""
    frames = [
        frame(encode({"type": "generate", "stream": n, "text": f"{n:04d}" + "word " * 3200})) for n in range(64)
    ]
    return await _all_end(address, [b"".join(frames)], "final", 64)


async def nesting(address: str, scale: float) -> Figures:
    """Lists in lists, and maps in maps, in frames of every size; each ends its connection or its stream."""
    head = b"\x83" + encode("type") + encode("generate") + encode("stream") + b"\x05" + encode("messages")
    number = 0
    for size in (60_000, 2_000_000, FRAME - 100):
        for entry in (b"\x91", b"\x81\xa1x", b"\x91" * 20 + b"\x01"):
            for start in (b"", head, b"\x82" + encode("a") + b"\xdd\x00\x3f\xff\xff"):
                number += len(await _floods(address, [frame((start + entry * (size // len(entry)))[:size])], 1))
    return {"answers": number}


async def lists_first(address: str, scale: float) -> Figures:
    """Messages whose type and stream stand behind the longest list that the loop passes over."""
    number = _count(scale, 20)
    frames = [listed("token_ids", b"\x91\x01", 2 * 1024 * 1024, n, last=True) for n in range(number)]
    answers = await _floods(address, frames)
    assert {answer["code"] for answer in answers} == {"invalid_request"}, answers[:1]
    return {"answers": len(answers)}


async def pings(address: str, scale: float) -> Figures:
    """Tiny pings, hundreds of KiB at a time, on several connections."""
    data = b"".join(frame(encode({"type": "ping", "stream": n % 100})) for n in range(_count(scale, 100_000)))

    async def one() -> float:
        wire, start = await Wire.connect(address), time.monotonic()
        wire.send(data)
        await wire.ends(_count(scale, 100_000))
        await wire.close()
        return time.monotonic() - start

    return {"slowest_s": max(await asyncio.gather(*[one() for _ in range(_count(scale, 8))]))}


async def oversized(address: str, scale: float) -> Figures:
    """Frames of 64 MiB, which end their own streams alone."""
    wire = await Wire.connect(address)
    for n in range(_count(scale, 8)):
        wire.send(listed("token_ids", b"\x01", 64 * 1024 * 1024, n))
        wire.send(frame(encode({"type": "ping", "stream": 100 + n})))
        failure, pong = await wire.ends(2)
        assert (failure["code"], failure["stream"], pong["type"]) == ("frame_too_large", n, "pong")
    await wire.close()
    return {}


async def half_frames(address: str, scale: float) -> Figures:
    """Connections that each send most of a frame of 4 MiB, and wait: past the limit they are refused."""
    wires = [await Wire.connect(address) for _ in range(_count(scale, 200))]
    data = listed("token_ids", b"\x01", FRAME, 1)[:-1]
    for wire in wires:
        wire.send(data)
        await wire.writer.drain()
    for wire in wires:
        wire.send(frame(b"")[:1])  # the last byte of the frame
    codes = [answer["code"] for wire in wires for answer in await wire.ends(1)]
    for wire in wires:
        await wire.close()
    return {"overloaded": codes.count("overloaded"), "invalid": codes.count("invalid_request")}


async def attached_prompts(address: str, scale: float) -> Figures:
    """Twelve prompts of 15 MB by attach; a prompt of 20,000 characters comes when they are all there."""
    size = round(15_000_000 * scale)
    text = encode("word " * (size // 5))
    wire = await Wire.connect(address)
    for n in range(12):
        for at in range(0, len(text), FRAME - 200):
            wire.send(frame(encode({"type": "attach", "stream": n, "data": text[at : at + FRAME - 200]})))
            await wire.writer.drain()
        wire.send(frame(encode({"type": "generate", "stream": n, "attached": "text"})))
    wire.send(frame(encode({"type": "ping", "stream": 99})))
    first = await wire.ends(1)
    other, start = await Wire.connect(address), time.monotonic()
    other.send(frame(encode({"type": "generate", "stream": 0, "text": "word " * 4000})))
    assert [end["type"] for end in await other.ends(1)] == ["final"]
    short_s = time.monotonic() - start
    answers = first + await wire.ends(13 - len(first))
    for each in (wire, other):
        await each.close()
    codes = [answer.get("code") for answer in answers]
    return {"short_waited_s": short_s, "overloaded": codes.count("overloaded"), "answers": len(answers) - 1}


async def hopeless_prompts(address: str, scale: float) -> Figures:
    """Attached texts that cannot fit the model, refused before they are encoded."""
    wire, piece = await Wire.connect(address), b"a" * (FRAME - 200)
    start = time.monotonic()
    for n in range(_count(scale, 4)):
        for _ in range(8):
            wire.send(frame(encode({"type": "attach", "stream": n, "data": piece})))
            await wire.writer.drain()
        wire.send(frame(encode({"type": "generate", "stream": n, "attached": "text"})))
        (answer,) = await wire.ends(1)
        assert "cannot fit" in answer["message"], answer
    await wire.close()
    return {"wall_s": time.monotonic() - start}


async def long_finals(address: str, scale: float) -> Figures:
    """Answers that come in one piece: one of 200,000 tokens, and 16 of 16,000 with log-probabilities."""
    message = {"type": "generate", "token_ids": [1], "deltas": False}
    one = {"max_tokens": round(200_000 * max(scale, 0.1)), "ignore_eos": True}
    many = {"max_tokens": round(16_000 * max(scale, 0.1)), "ignore_eos": True, "n": 16, "logprobs": 5}
    for sampling in (one, many):
        wire = await Wire.connect(address)
        wire.send(frame(encode({**message, "stream": 1, "sampling": sampling})))
        ((final,), num_samples) = await wire.ends(1), sampling.get("n", 1)
        ended = [len(sample["token_ids"]) for sample in final["samples"]]
        assert ended == [sampling["max_tokens"]] * num_samples
        await wire.close()
    return {}


async def scored_prompts(address: str, scale: float) -> Figures:
    """Log-probabilities of prompts of 200,000 tokens, 20 at each place: of one that is read, beside eight that
    nobody reads."""
    size = round(200_000 * max(scale, 0.1))
    sampling = {"prompt_logprobs": 20, "max_tokens": 1}
    message = {"type": "generate", "token_ids": [65] * size, "sampling": sampling}
    wires = [await Wire.connect(address, "prompt_logprobs") for _ in range(9)]
    for wire in reversed(wires):
        wire.send(frame(encode({**message, "stream": 1})))
    count, start = 0, time.monotonic()
    while (heard := await wires[0].hear())["type"] != "final":
        count += len(heard.get("prompt_logprobs", ()))
    took_s = time.monotonic() - start
    for wire in wires:
        await wire.close()
    assert count == size - 1
    return {"entries_per_s": count / took_s}


async def grammars(address: str, scale: float) -> Figures:
    """Schemas, patterns, choices and grammars that cost time or depth, in frames of 60 kB that are read where they
    arrive, and of 4 MiB; and strict tools."""
    rules = "".join(f'r{each}: "a" r{each + 1}\n' for each in range(3000))
    values: list[tuple[str, Any]] = [
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
        ("json_schema", json.dumps({"properties": {f"p{each}": {"type": "integer"} for each in range(1500)}})),
        ("json_schema", json.dumps({"enum": ["x" * 50_000]})),
        ("json_schema", "[" * 60_000),
        ("regex", "(a|b)?" * 9000),
        ("regex", "x{50000}" * 20),
        ("regex", "(" * 60_000),
        ("choice", [f"{each} choice" for each in range(4000)]),
        ("lark", f'start: r0\n{rules}r3000: "b"'),
        ("lark", "start: " + '"a"? ' * 10_000),
        ("regex", "a" * (FRAME - 200)),
        ("choice", ["a"] * 1_000_000),
    ]
    wire, number = await Wire.connect(address, "grammars", "parts"), _count(scale, 120)
    for n in range(number):
        kind, value = values[n % len(values)]
        grammar = {"kind": kind, "value": value}
        wire.send(frame(encode({"type": "generate", "stream": n, "text": f"{n}", "grammar": grammar})))
        await wire.writer.drain()
    schema = {"properties": {f"p{each}": {"type": "string"} for each in range(100)}}
    tools = [{"name": f"f{each}", "parameters": schema, "strict": True} for each in range(20)]
    asked = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": "required"}
    wire.send(frame(encode({"type": "generate", "stream": number, **asked})))
    answers = await wire.ends(number + 1)
    await wire.close()
    assert len(answers) == number + 1
    codes = [answer.get("code") for answer in answers]
    return {"served": codes.count(None), "refused": codes.count("invalid_request")}


ATTACKS: tuple[Callable[[str, float], Awaitable[Figures]], ...] = (
    *(empty_messages, small_chats, ids, small_ids, output_ids, parameters, inline_prompts, long_prompts),
    *(nesting, lists_first, pings, oversized, half_frames, attached_prompts, hopeless_prompts, long_finals),
    *(scored_prompts, grammars),
)


class Victim:
    """The process of a server under attack."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.address = address
        self._process = process

    async def ask(self, word: str) -> str:
        """The answer to a line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n".encode())
        return (await self._process.stdout.readline()).decode().strip()


@asynccontextmanager
async def victim() -> AsyncIterator[Victim]:
    """Start a server; its process and those of its own are gone afterwards."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, str(SERVER), stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Victim(process, (await process.stdout.readline()).decode().strip())
    finally:
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), 30) == 0


async def run(scale: float, only: str | None = None) -> dict[str, Figures]:
    """Run the attacks, print a line for each, and give the figures."""
    found: dict[str, Figures] = {}
    print(f"{'attack':18s} {'turn ms':>8s} {'peak MB':>8s} {'took s':>8s}")
    async with victim() as server:
        await _floods(server.address, [frame(encode({"type": "generate", "stream": 0, "text": "word " * 900}))])
        for attack in ATTACKS:
            if only not in (None, attack.__name__):
                continue
            await server.ask("reset")
            start = time.monotonic()
            own = await asyncio.wait_for(attack(server.address, scale), WAIT_S)
            took_s = time.monotonic() - start
            figures = json.loads(await server.ask("report")) | {"took_s": took_s} | own
            said = ", ".join(f"{name} {value:.3g}" for name, value in own.items())
            print(
                f"{attack.__name__:18s} {figures['turn_ms']:8.1f} {figures['peak_mb']:8.0f} {took_s:8.2f}  {said}",
                flush=True,
            )
            found[attack.__name__] = figures
            (answer,) = await _floods(server.address, [frame(encode({"type": "ping", "stream": 1}))])
            assert answer["type"] == "pong"
    return found


def main() -> int:
    """Run the long form; 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", choices=[attack.__name__ for attack in ATTACKS])
    given = parser.parse_args()
    found = asyncio.run(run(given.scale, given.only))
    broken = [name for name, f in found.items() if f["turn_ms"] > MOST_TURN_MS or f["peak_mb"] > MOST_PEAK_MB]
    print(f"FAIL {', '.join(broken)}" if broken else "PASS")
    return bool(broken)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
