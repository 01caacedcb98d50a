"""Figures of the client, on loopback: `python client_figures.py`, with tests/support on PYTHONPATH.

Prints the pause that a lost connection makes in a stream (the client connects again and resumes; the median and the
longest of several), and the memory and the processor's time of one client with 1,000 streams at once, in a process
of its own. The exit status is 1 if the longest pause is 100 ms or more, the memory 200 MB, or the time one core's.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import statistics
import sys
import time

import msgspec
from fake_rpc_server import LIMITS, Peer, accepted, delta, final, scripted

from cierzo.engine.frontend.client import Client
from cierzo.engine.messages import Generate, Resume

LOSSES, STREAMS, TOKENS, EVERY_S = 20, 1_000, 200, 0.02
MAX_PAUSE_S, MAX_BYTES = 0.1, 200e6


async def _losing(peer: Peer, number: int) -> None:
    """Give a token, lose the connection, and go on from there with the next one."""
    message = await peer.hear((Generate, Resume))
    peer.say(accepted(message.stream), delta(message.stream, [65]))
    if number < LOSSES:
        await peer.flushed()
        await asyncio.sleep(0.02)
        peer.drop()
    else:
        peer.say(final(message.stream))
        await peer.hear()


async def pauses() -> list[float]:
    """Seconds between two tokens between which a stream's connection was lost; 20 ms of them are the server's."""
    times = []
    async with scripted(_losing) as address, await Client.connect(address) as client:
        async for _ in client.generate(token_ids=[1]):
            times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


async def _steady(peer: Peer, number: int) -> None:
    """Take all streams, then give each of them a token at each step."""
    streams = [(await peer.hear(Generate)).stream for _ in range(STREAMS)]
    peer.say(*map(accepted, streams))
    for _ in range(TOKENS):
        peer.say(*(delta(stream, [65]) for stream in streams))
        await peer.flushed()
        await asyncio.sleep(EVERY_S)
    peer.say(*(final(stream, TOKENS) for stream in streams))
    await peer.hear()


async def _read_all(address: str) -> None:
    """Read 1,000 streams; print bytes, seconds of the processor, and seconds."""
    async with await Client.connect(address) as client:

        async def read(number: int) -> int:
            return sum([len(part.token_ids) async for part in client.generate(token_ids=[number])])

        began_s, cpu_s = time.perf_counter(), time.process_time()
        assert await asyncio.gather(*map(read, range(STREAMS))) == [TOKENS] * STREAMS
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(usage.ru_maxrss * 1024, time.process_time() - cpu_s, time.perf_counter() - began_s)


async def streams() -> tuple[float, float]:
    """Bytes of a client with 1,000 streams, and its share of one core."""
    limits = msgspec.structs.replace(LIMITS, max_streams=STREAMS)
    async with scripted(_steady, limits=limits) as address:
        command = (sys.executable, os.path.abspath(__file__), address)
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await child.communicate()
    num_bytes, cpu_s, wall_s = map(float, out.split())
    return num_bytes, cpu_s / wall_s


def main() -> int:
    """Measure and print."""
    if len(sys.argv) > 1:
        asyncio.run(_read_all(sys.argv[1]))
        return 0
    found = asyncio.run(pauses())
    print(f"pause of a lost connection: median {statistics.median(found):.3f} s, longest {max(found):.3f} s")
    num_bytes, share = asyncio.run(streams())
    rate = f"{STREAMS} streams, {TOKENS} tokens each"
    print(f"one client with {rate}: {num_bytes / 1e6:.0f} MB, {share:.2f} of a core")
    return int(max(found) >= MAX_PAUSE_S or num_bytes >= MAX_BYTES or share > 1.0)


if __name__ == "__main__":
    sys.exit(main())
