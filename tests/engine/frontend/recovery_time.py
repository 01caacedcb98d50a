"""How fast streams come back after kill -9 of the core, on real processes: `python recovery_time.py [runner]`.

Starts `cierzo serve` with a small checkpoint, opens streams, and prints the time to the last one's first token, the
time that a new core took to start, and the time until every stream, and a new one, had a token from it. The exit
status is 1 if that was more than the start and twice the first time. Runner: "fake" (default) or "model".
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cierzo.engine.frontend.client import Client, Generation
from cierzo.engine.weights.make import make_checkpoint

STREAMS = 200
PROMPT_TOKENS = {"fake": 500, "model": 50}
LOOK_S = 0.01


class Stream:
    """A generation that is read all the time: when its tokens came."""

    def __init__(self, generation: Generation) -> None:
        self.times: list[float] = []
        self.task = asyncio.create_task(self._read(generation))

    async def _read(self, generation: Generation) -> None:
        async for _ in generation:
            self.times.append(time.monotonic())

    def after(self, then: float) -> float:
        """Time of its first token after a time, "inf" if there is none yet."""
        return next((at for at in self.times if at > then), float("inf"))


async def _last(streams: list[Stream], then: float) -> float:
    """When the last of these had a token after a time."""
    while any(stream.after(then) == float("inf") for stream in streams):
        await asyncio.sleep(LOOK_S)
    return max(stream.after(then) for stream in streams)


async def measure(address: str, core: int, prompt_tokens: int) -> tuple[float, float, float]:
    """Seconds to the last first token; and from the kill until a core was ready, and until all went on."""
    async with await Client.connect(address) as client:

        def begin(number: int) -> Stream:
            prompt = [1 + number, *range(2, prompt_tokens + 1)]
            return Stream(client.generate(token_ids=prompt, max_tokens=4000, ignore_eos=True))

        began = time.monotonic()
        streams = [begin(number) for number in range(STREAMS)]
        first_s = await _last(streams, began) - began
        os.kill(core, signal.SIGKILL)
        killed = time.monotonic()
        while (await client.health()).state == "ready":
            await asyncio.sleep(0)
        lost = time.monotonic()  # what comes after this is of the new core
        while (await client.health()).state != "ready":
            await asyncio.sleep(LOOK_S)
        restart_s = time.monotonic() - killed
        streams.append(begin(STREAMS))  # new ones join meanwhile
        recovered_s = await _last(streams, lost) - killed
        for stream in streams:
            stream.task.cancel()
        await asyncio.gather(*(stream.task for stream in streams), return_exceptions=True)
        return first_s, restart_s, recovered_s


def main() -> int:
    """Measure and print."""
    runner = sys.argv[1] if len(sys.argv) > 1 else "fake"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "tiny", like="small4", scale="tiny")
        command = [sys.executable, "-m", "cierzo", "serve", str(checkpoint), "--runner", runner]
        address = f"unix:{folder}/rpc.sock"
        sizes = ("--max-model-len", "8192", "--kv-cache-gib", "1")
        with subprocess.Popen([*command, "--rpc", address, *sizes], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert any(line.startswith("ready: ") for line in server.stdout)
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text(encoding="ascii").split()
            first_s, restart_s, recovered_s = asyncio.run(measure(address, int(children[0]), PROMPT_TOKENS[runner]))
            server.send_signal(signal.SIGINT)
    bound_s = restart_s + 2 * first_s
    print(
        f"{STREAMS} streams, {runner} runner: first tokens within {first_s:.2f} s; after kill -9 a core was ready "
    )
    print(f"after {restart_s:.2f} s, all streams went on after {recovered_s:.2f} s (bound {bound_s:.2f} s)")
    return int(recovered_s > bound_s)


if __name__ == "__main__":
    sys.exit(main())
