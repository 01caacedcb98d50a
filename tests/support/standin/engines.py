"""Engines on the stand-in: `python -m standin engines FOLDER MODEL SEED REQUESTS` serves a toy model of a folder
and prints JSON, what each request got. The whole of what serves on a card runs: loading, staging, recorded decode
steps, overlapped steps."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.messages import Submit
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker.core import EngineCore
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.fault import DeviceFault
from cierzo.scheduler.params import SamplingParams
from standin.driver import Machine, on_card
from standin.library import ILLEGAL_ADDRESS
from standin.machine import Backend, Graph, torch_cuda

MOST_STEPS = 400
MAX_RUNNING = 2
# name -> (model, checkpoint, weights, activations)
MODELS = {
    "small4": ("small4", "hf", "nvfp4", "bf16"),
    "small3": ("small3", "hf", "fp8", "fp8"),
}


def make_config(folder: Path, name: str, **changes: Any) -> EngineConfig:
    """The configuration of a toy model, made in the folder unless it is there."""
    like, checkpoint_format, weights, activations = MODELS[name]
    checkpoint = folder / name
    if not checkpoint.exists():
        make_checkpoint(checkpoint, like=like, scale="tiny", checkpoint_format=checkpoint_format)
    options = EngineOptions(
        model=str(checkpoint),
        device="cuda",
        weights=weights,
        activations=activations,
        max_running=MAX_RUNNING,
        budget_tokens=12,
        block_tokens=16,
        max_model_len=64,
        kv_cache_gib=0.001,
    )
    return resolve(msgspec.structs.replace(options, **changes))


def load(seed: int, count: int = 3) -> list[tuple[int, Submit]]:
    """Requests, and the steps before which they come. A prompt of several chunks is alone at first, so that steps
    without results follow one another; others begin alike. Tokens are the likeliest, drawn, penalised, reported."""
    rng = random.Random(seed)
    beginning, found, step = [rng.randrange(3, 200) for _ in range(17)], [], 0
    for number in range(count):
        prompt = [rng.randrange(3, 200) for _ in range(rng.randrange(2, 6) if number else 41)]
        params = SamplingParams(
            max_tokens=rng.randrange(2, 4),
            logprobs=2 if number % 3 == 2 else None,
            repetition_penalty=1.3 if number % 3 == 2 else 1.0,
            temperature=0.9 if number % 2 else 0.0,
            top_p=0.95 if number % 2 else 1.0,
            seed=number,
            ignore_eos=True,
        )
        ids = [*beginning, *prompt] if number % 2 or number > 3 else prompt
        found.append((step, Submit(request_id=number, prompt_token_ids=ids, sampling=params)))
        step += 2 + rng.randrange(2)
    return found


def answers(core: EngineCore, requests: list[tuple[int, Submit]]) -> dict[str, list[Any]]:
    """Tokens and log-probabilities of each request."""
    waiting, found = [*requests], {str(request.request_id): [[], []] for _, request in requests}
    for step in range(MOST_STEPS):
        while waiting and waiting[0][0] <= step:
            core.submit(waiting.pop(0)[1])
        if not waiting and not core.has_work():
            return found
        for delta in core.step():
            tokens, logprobs = found[str(delta.request_id)]
            tokens += delta.token_ids
            logprobs += msgspec.to_builtins(delta.logprobs or [])
            assert delta.finish is None or delta.finish.reason == "length", delta.finish
    raise AssertionError(f"after {MOST_STEPS} steps there is still work")


@contextmanager
def engine(machine: Machine, config: EngineConfig) -> Iterator[EngineCore]:
    """An engine on the card, as a server makes it."""
    with running_on(Backend(machine.card.stream)), machine.card.loading():
        core = EngineCore(config)
        with machine.card.serving():
            yield core


def ends_with_its_card(machine: Machine, core: EngineCore) -> None:
    """Fail the launch number 30 from now: the step that waits for it next is told, and so is what comes after."""
    machine.library.inject("kernel", 30, ILLEGAL_ADDRESS)
    for number in (100, 101):
        core.submit(msgspec.structs.replace(load(0)[-1][1], request_id=number))
        said = ""
        for _ in range(MOST_STEPS):
            try:
                core.step()
            except DeviceFault as error:
                said = str(error)
                break
        assert "an illegal memory access was encountered" in said, said


def main(folder: str, name: str, seed: str, count: str) -> int:
    """Serve them."""
    device.require = lambda: None  # CUDA C++ runs on fibers, without CuPy
    with on_card() as machine, torch_cuda(machine.card):
        config = make_config(Path(folder), name)
        assert config.overlap
        with engine(machine, config) as core:
            recordings, modules = Graph.recordings, machine.library.raw("standin_count", 1)
            found = answers(core, load(int(seed), int(count)))
            assert Graph.replays > 0
            assert (Graph.recordings, machine.library.raw("standin_count", 1)) == (recordings, modules)
            ends_with_its_card(machine, core)
    print(json.dumps(found))
    return 0
