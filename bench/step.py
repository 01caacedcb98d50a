"""`make bench-step`: the step loop apart from the model, with requests arriving, growing and finishing.

Real scheduler, cache manager, block tables and batch builder, and a fake runner in place of the model. A step is
timed from `schedule` to the encoded frame for the front end, the fake runner included. Taking in a new request
(`submit`) happens between steps and is timed apart. Every prompt fills the context but for its output, and shares
all but its last block with the others, so that long contexts are reached through the prefix cache.

What a step costs must not depend on the context. What an arrival costs does: its prompt is hashed and looked up
block by block in the step that admits it. Hence the long outputs: such a step is then the exception, as in use.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shlex
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from cierzo.bench.report import check_writable, make_report, write_report
from cierzo.bench.stats import Summary, summarise
from cierzo.cache.config import CacheConfig
from cierzo.engine.messages import SamplingParams, StepOutput, Submit
from cierzo.engine.options import count, positive, seed
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import fake_config
from cierzo.engine.worker.process import prepare_memory
from cierzo.scheduler.config import SchedulerConfig

VOCAB_SIZE = 131_072
WARM_UP_STEPS = 50
PROGRESS_AFTER_S = 2.0
HEADER = (
    f"{'ms':>7} {'':>8} {'step':>8} {'':>8} {'submit':>8}\n{'running':>7} {'context':>8}"
    + 2 * f" {'p50':>8} {'p99':>8}"
)


class StepSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Every number of running requests at every context, in tokens; `steps` timed steps each."""

    running: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    output_tokens: int
    block_tokens: int
    seed: int


class StepRow(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a step, and of taking in one request; and what happened meanwhile."""

    running: int
    context: int
    step_ms: Summary
    submit_ms: Summary
    finished: int
    output_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of both kinds of measurement."""
    parser.add_argument("--running", type=count, nargs="+", default=[64, 512], metavar="N", help="running requests")
    parser.add_argument("--contexts", type=count, nargs="+", default=[1024, 131_072], metavar="N", help="tokens")
    parser.add_argument("--steps", type=positive, default=1000, metavar="N", help="timed steps of each row")
    parser.add_argument(
        "--output-tokens", type=count, default=2048, metavar="N", help="mean output, at most context / 4"
    )
    parser.add_argument("--block-tokens", type=count, default=32, metavar="N", help="tokens per KV block")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of output lengths and prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and results here")
    model = parser.add_argument_group("a model's step, operation by operation, instead")
    model.add_argument("--profile", metavar="CHECKPOINT", help="measure this model's kernels")
    model.add_argument(
        "--batches", type=count, nargs="*", default=[1, 8, 32], metavar="N", help="sequences decoding"
    )
    model.add_argument("--prompts", type=count, nargs="*", default=[2048], metavar="N", help="tokens of one prompt")
    model.add_argument("--weights", default="auto", metavar="FORMAT", help="number format of the weights")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write JSON if asked."""
    if arguments.json is not None:
        check_writable(arguments.json)  # before the steps, not after them
    started = datetime.now(UTC).isoformat(timespec="seconds")
    settings, results = _loop(arguments) if arguments.profile is None else _profile(arguments)
    if arguments.json is not None:
        command = shlex.join(["cierzo", *sys.argv[1:]])
        report = make_report("step", command=command, started=started, settings=settings, results=results)
        write_report(report, arguments.json)
    return 0


def _loop(arguments: argparse.Namespace) -> tuple[Any, Any]:
    settings = StepSettings(
        running=tuple(arguments.running),
        contexts=tuple(arguments.contexts),
        steps=arguments.steps,
        output_tokens=arguments.output_tokens,
        block_tokens=arguments.block_tokens,
        seed=arguments.seed,
    )
    print(HEADER)
    rows = []
    for running, context in itertools.product(settings.running, settings.contexts):
        rows.append(measure(settings, running, context))
        print(_line(rows[-1]), flush=True)
    return settings, rows


def _profile(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from cierzo.bench import profile

    ceilings, steps = profile.profile(
        arguments.profile, arguments.batches, arguments.prompts, weights=arguments.weights
    )
    print(profile.table(ceilings, steps))
    settings = {"checkpoint": arguments.profile, "weights": arguments.weights}
    return settings, {"ceilings": ceilings, "steps": steps}


def measure(settings: StepSettings, running: int, context: int) -> StepRow:
    """Fill the core with requests of evenly spread age, then time steps while each that ends is replaced."""
    core = _core(settings, running, context)
    requests = _requests(settings, running, context)
    encoder, frame = msgspec.msgpack.Encoder(), bytearray()
    submit_ms: list[float] = []
    step_ms: list[float] = []
    ended = output_tokens = 0
    _prime(core, next(requests))
    wanted = running
    warm_up = WARM_UP_STEPS
    bar = tqdm(
        total=settings.steps, desc=f"{running} x {context}", delay=PROGRESS_AFTER_S, leave=False, disable=None
    )
    with bar:
        while len(step_ms) < settings.steps:
            for _ in range(wanted):
                request = next(requests)
                start = time.perf_counter()
                core.submit(request)
                submit_ms.append((time.perf_counter() - start) * 1e3)
            start = time.perf_counter()
            deltas = core.step_plain()
            encoder.encode_into(StepOutput(deltas=deltas), frame)
            elapsed_ms = (time.perf_counter() - start) * 1e3
            wanted = sum(delta.finish is not None for delta in deltas)
            if core.stats().waiting == 0 and warm_up:
                warm_up -= 1
            elif not warm_up:
                step_ms.append(elapsed_ms)
                ended += wanted
                output_tokens += sum(len(delta.token_ids) for delta in deltas)
                bar.update()
    return StepRow(
        running=running,
        context=context,
        step_ms=summarise(step_ms),
        submit_ms=summarise(submit_ms),
        finished=ended,
        output_tokens=output_tokens,
    )


def _mean_output_tokens(settings: StepSettings, context: int) -> int:
    return max(1, min(settings.output_tokens, context // 4))


def _core(settings: StepSettings, running: int, context: int) -> EngineCore:
    own_blocks = 2 * _mean_output_tokens(settings, context) // settings.block_tokens + 3
    num_blocks = context // settings.block_tokens + running * own_blocks
    scheduler = SchedulerConfig(
        budget_tokens=max(8192, running),
        max_chunk_tokens=8192,
        max_running=running,
        max_waiting=2 * running,
        max_model_len=context,
    )
    cache = CacheConfig(block_tokens=settings.block_tokens, num_blocks=num_blocks, hash_key="00" * 16)
    core = EngineCore(fake_config(scheduler, cache, vocab_size=VOCAB_SIZE))
    prepare_memory()
    return core


def _requests(settings: StepSettings, running: int, context: int) -> Iterator[Submit]:
    """Requests that end near the context's length. The first `running` ones are cut short, as if half grown."""
    draw = random.Random(settings.seed)
    longest = 2 * _mean_output_tokens(settings, context)
    prompt_tokens = max(1, context - longest)
    shared = [draw.randrange(VOCAB_SIZE) for _ in range(prompt_tokens)]
    for request_id in itertools.count():
        output_tokens = draw.randint(1, longest)
        if request_id <= running:
            output_tokens = draw.randint(1, output_tokens)
        yield Submit(
            request_id=request_id,
            prompt_token_ids=[*shared[:-1], request_id % VOCAB_SIZE],
            sampling=SamplingParams(max_tokens=output_tokens, seed=request_id, ignore_eos=True),
        )


def _prime(core: EngineCore, request: Submit) -> None:
    """Bring the shared prefix into the cache."""
    core.submit(request)
    while core.has_work():
        core.step_plain()


def _line(row: StepRow) -> str:
    step, submit = row.step_ms, row.submit_ms
    figures = " ".join(f"{value:>8.3f}" for value in (step.p50, step.p99, submit.p50, submit.p99))
    return f"{row.running:>7} {row.context:>8} {figures}"
