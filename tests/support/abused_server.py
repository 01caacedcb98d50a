"""A front end in a process of its own, whose core answers at once, and which measures its loop and its memory.

`python tests/support/abused_server.py '{"max_frame_bytes": ...}'` makes a checkpoint with a tokenizer of bytes,
prints its address, and obeys lines on its standard input: "reset" (answered by "ok") and "report" (by JSON).
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
import uvloop
from tokenizers import decoders, models, pre_tokenizers

from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoders import Encoders
from cierzo.engine.frontend.encoding import Setup
from cierzo.engine.frontend.frames import pack
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.rpc import RpcServer
from cierzo.engine.messages import CoreCommand, Finish, StepOutput, Submit, TokenDelta, TokenLogprobs
from cierzo.engine.testing.words import fake_model
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.scheduler.plan import entry_bytes, packed_entry
from cierzo.scheduler.policy import SCORED_BYTES

WATCH_S = 0.001
LONGEST_TOKEN = "ab " * 32  # in bytes of a text 96 a token: 15 MB of it could fit the model
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
MAX_MODEL_LEN = 262_144


def write_checkpoint(folder: Path) -> None:
    """A tokenizer of single bytes, with one long token beside them, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([tokenizers.AddedToken(LONGEST_TOKEN)])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


STEP_TOKENS = 256
ENTRY = TokenLogprobs(65, -1 / 3, [70, 71, 72, 73, 74], [-1 / 3] * 5)


class InstantCore:
    """Ends every request with one token, a turn later; one that ignores the end of text gets all its tokens."""

    frontend: Frontend

    def send(self, command: CoreCommand) -> None:
        """Encode the command as a link would, and answer it."""
        pack((command,))
        if isinstance(command, Submit):
            params = command.sampling
            count = params.max_tokens if params.ignore_eos else 1
            turn = self._answer(command.request_id, params.n, count, params.logprobs is not None)
            if params.prompt_logprobs is not None:
                turn = chain(self._score(command), turn)
            asyncio.get_running_loop().call_soon(self._take_turn, turn)

    def _take_turn(self, turns: Iterator[StepOutput]) -> None:
        if (step := next(turns, None)) is not None:
            self.frontend.core.step(step)
            asyncio.get_running_loop().call_soon(self._take_turn, turns)

    def _answer(self, run_id: int, n: int, count: int, logprobs: bool) -> Iterator[StepOutput]:
        finish = Finish("length", "", None, 1, count, 0, 0, 0.0, 0.0, 0.0)
        size = STEP_TOKENS // n
        for start in range(0, count, size):
            tokens = [65] * min(size, count - start)
            entries, end = [ENTRY] * len(tokens) if logprobs else None, finish if start + size >= count else None
            yield StepOutput(deltas=[TokenDelta(run_id, i, tokens, entries, end) for i in range(n)])

    def _score(self, command: Submit) -> Iterator[StepOutput]:
        """Entries of the prompt, as many in a step as a scheduler lets come."""
        count = command.sampling.prompt_logprobs or 0
        entry = packed_entry(TokenLogprobs(65, -1 / 3, [*range(70, 70 + count)], [-1 / 3] * count))
        prompt: list[int] = msgspec.msgpack.decode(msgspec.msgpack.encode(command.prompt_token_ids))
        size, left = SCORED_BYTES // entry_bytes(count), len(prompt) - 1 - command.num_scored
        for start in range(0, left, size):
            entries = [entry] * min(size, left - start)
            packed = msgspec.msgpack.encode(TokenDelta(command.request_id, 0, [], None, None, entries))
            yield StepOutput(deltas=[msgspec.msgpack.decode(packed, type=TokenDelta)])  # as it comes


class Watchdog:
    """The longest turn of the loop, in processor time of its thread: load beside it does not count.

    A timer fires every millisecond, at the beginning of a turn; between two of them lies at most a turn that takes
    longer than that.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._last = time.thread_time()

    def look(self) -> None:
        """Measure, and look again."""
        now = time.thread_time()
        self.longest_s = max(self.longest_s, now - self._last)
        self._last = time.thread_time()
        asyncio.get_running_loop().call_later(WATCH_S, self.look)


def _peak_rss_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


async def serve(limits: dict[str, Any]) -> None:
    """Serve until standard input ends."""
    loop, watchdog = asyncio.get_running_loop(), Watchdog()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        config = FrontendConfig(address="127.0.0.1:0", **limits)
        model = fake_model(name="abused", max_model_len=MAX_MODEL_LEN, eos_token_ids=[299])  # which no text has
        core = InstantCore()
        encoders = Encoders(config, Setup(checkpoint=folder, frontend=config, model=model))
        frontend = core.frontend = Frontend(config, model, PromptEncoder.load(Path(folder)), core, encoders)
        frontend.core.ready()
        server = RpcServer(config, frontend)
        await server.start()
        encoders.start()
        lines = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        gc.collect()
        gc.freeze()  # as `cierzo serve` does
        print(server.address, flush=True)
        watchdog.look()
        while line := await lines.readline():
            if line == b"reset\n":
                gc.collect()
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
                print("ok", flush=True)
                watchdog.longest_s = 0.0
            else:
                figures = {
                    "turn_ms": watchdog.longest_s * 1000,
                    "peak_mb": _peak_rss_mb(),
                    "open": len(frontend.streams),
                    "unencoded": encoders.budget.num_bytes,
                }
                print(json.dumps(figures), flush=True)
        await server.close()
        await frontend.close()
        await encoders.close()


if __name__ == "__main__":
    uvloop.run(serve(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
