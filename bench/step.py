"""`make bench-step`: the step loop apart from the model, with requests arriving, growing and finishing.

A step of the real engine core on a fake runner is timed from `schedule` to the encoded frame for the front end.
Taking in a new request (`submit`) happens between steps and is timed apart. Every prompt fills the context but for
its output, and shares all but its last block with the others, so that it is reached through the prefix cache.

What a step costs must not depend on the context. What an arrival costs does: its prompt is hashed and looked up
block by block in the step that admits it. Hence the long outputs: such a step is then the exception, as in use.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from cierzo.bench.campaign.table import grid_of, text
from cierzo.bench.report import Recording, progress
from cierzo.bench.stats import Summary, summarise
from cierzo.cache.config import CacheConfig
from cierzo.engine.checkpoint import checkpoint_folder
from cierzo.engine.errors import ConfigError
from cierzo.engine.messages import SamplingParams, StepOutput, Submit
from cierzo.engine.options import add_options, chosen, count
from cierzo.engine.server_process import prepare_memory
from cierzo.engine.settings import word_reader
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import fake_config
from cierzo.scheduler.config import SchedulerConfig

VOCAB_SIZE = 131_072
BLOCK_TOKENS = 32
WARM_UP_STEPS = 50
MOST = 1 << 20
length = word_reader(Annotated[int, Meta(ge=2, le=MOST)])  # of a context: a token of the prompt, one of the answer


class StepSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings: every number of running requests at every context (tokens), `steps` timed steps each."""

    running: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: Annotated[int, Meta(ge=1, description="timed steps of each row")] = 1000
    output_tokens: Annotated[int, Meta(ge=1, le=MOST, description="mean output, at most context / 4")] = 2048


class StepRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row: milliseconds of a step and of taking in one request, and the requests and tokens meanwhile."""

    running: int
    context: int
    step_ms: Summary
    submit_ms: Summary
    finished: int
    output_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of both kinds of measurement."""
    parser.add_argument("--running", type=count, nargs="+", default=[64, 512], metavar="N", help="running requests")
    parser.add_argument("--contexts", type=length, nargs="+", default=[1024, 131_072], metavar="N", help="tokens")
    add_options(parser, StepSettings, skip={"running", "contexts"})
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and results here")
    model = parser.add_argument_group("a model's step, operation by operation, instead")
    model.add_argument("--profile", metavar="CHECKPOINT", help="measure this model's kernels")
    model.add_argument(
        "--batches", type=count, nargs="*", default=[1, 8, 32], metavar="N", help="sequences decoding"
    )
    model.add_argument("--prompts", type=count, nargs="*", default=[2048], metavar="N", help="tokens of one prompt")
    model.add_argument("--grammars", metavar="CHECKPOINT", help="measure what grammars cost this model's steps")
    model.add_argument("--sequences", type=count, default=64, metavar="N", help="sequences, with --grammars")
    model.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="of their tokens, with --grammars"
    )
    model.add_argument("--weights", default="auto", metavar="FORMAT", help="number format of the weights")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write JSON if asked."""
    report = Recording("step", arguments.json)
    if arguments.grammars is not None:
        from cierzo.bench import grammars  # imports torch

        checkpoint, weights = checkpoint_folder(arguments.grammars), arguments.weights
        cost = grammars.measure(checkpoint, arguments.sequences, arguments.temperature, weights=weights)
        print(grammars.table(cost))
        report.write({"checkpoint": checkpoint, "weights": weights}, cost)
        return 0
    if arguments.profile is None:
        settings = StepSettings(**chosen(arguments, StepSettings))
        pairs = itertools.product(settings.running, settings.contexts)
        rows = [measure(settings, running, context) for running, context in pairs]
        print(table(rows))
        report.write(settings, rows)
        return 0
    if not arguments.batches and not arguments.prompts:
        raise ConfigError("--profile needs --batches or --prompts, else there is no step", field="batches")
    from cierzo.bench import profile  # imports torch

    checkpoint, weights = checkpoint_folder(arguments.profile), arguments.weights
    ceilings, steps = profile.profile(checkpoint, arguments.batches, arguments.prompts, weights=weights)
    print(profile.table(ceilings, steps))
    report.write({"checkpoint": checkpoint, "weights": weights}, {"ceilings": ceilings, "steps": steps})
    return 0


def measure(settings: StepSettings, running: int, context: int) -> StepRow:
    """Fill the core with requests of evenly spread age, then time steps while each that ends is replaced."""
    core = _core(settings, running, context)
    requests = _requests(settings, running, context)
    encoder, frame = msgspec.msgpack.Encoder(), bytearray()
    submit_ms: list[float] = []
    step_ms: list[float] = []
    ended = output_tokens = 0
    core.submit(next(requests))  # brings the shared prefix into the cache
    while core.has_work():
        core.step_plain()
    wanted = running
    warm_up = WARM_UP_STEPS
    with progress(total=settings.steps, desc=f"{running} x {context}") as bar:
        while len(step_ms) < settings.steps:
            for request in itertools.islice(requests, wanted):
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


def _longest_output(settings: StepSettings, context: int) -> int:
    return 2 * max(1, min(settings.output_tokens, context // 4))


def _core(settings: StepSettings, running: int, context: int) -> EngineCore:
    own_blocks = _longest_output(settings, context) // BLOCK_TOKENS + 3
    num_blocks = context // BLOCK_TOKENS + running * own_blocks
    scheduler = SchedulerConfig(
        budget_tokens=max(8192, running),
        max_chunk_tokens=8192,
        max_running=running,
        max_waiting=2 * running,
        max_model_len=context,
    )
    cache = CacheConfig(block_tokens=BLOCK_TOKENS, num_blocks=num_blocks, hash_key="00" * 16)
    core = EngineCore(fake_config(scheduler, cache, vocab_size=VOCAB_SIZE))
    prepare_memory()
    return core


def _requests(settings: StepSettings, running: int, context: int) -> Iterator[Submit]:
    """Requests that end near the context's length. The first `running` ones are cut short, as if half grown."""
    draw = random.Random(0)
    longest = _longest_output(settings, context)
    shared = [draw.randrange(VOCAB_SIZE) for _ in range(max(1, context - longest))]
    for request_id in itertools.count():
        output_tokens = draw.randint(1, longest)
        if request_id <= running:
            output_tokens = draw.randint(1, output_tokens)
        yield Submit(
            request_id=request_id,
            prompt_token_ids=[*shared[:-1], request_id % VOCAB_SIZE],
            sampling=SamplingParams(max_tokens=output_tokens, seed=request_id, ignore_eos=True),
        )


def table(rows: Sequence[StepRow]) -> str:
    """The rows as text, times in milliseconds."""
    told = []
    for row in rows:
        times = {"step ms": row.step_ms, "submit ms": row.submit_ms}
        figures = {f"{name} {p}": f"{getattr(s, p):.3f}" for name, s in times.items() for p in ("p50", "p99")}
        told.append({"running": str(row.running), "context": str(row.context)} | figures)
    return text(grid_of("", told))
