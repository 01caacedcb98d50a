"""`cierzo bench experts`: which experts traffic chooses, layer by layer, in this process or in a running server.

In this process a checkpoint answers the prompts of a file, or random ones; random tokens choose as no text does. A
server that was started with --expert-statistics is asked what its own traffic chose since its start: that of its
users, or of `cierzo bench load`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from statistics import fmean
from typing import Annotated

import msgspec
from msgspec import Meta

from cierzo.bench.campaign.table import grid_of, page
from cierzo.bench.report import Recording
from cierzo.bench.workload import Count, random_prompt, read_lines
from cierzo.engine.cost.operations import random_distinct
from cierzo.engine.errors import ConfigError
from cierzo.engine.expert_statistics import ExpertStatistics, Phase, independent_distinct
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.messages import SamplingParams
from cierzo.engine.options import MAX_SEED, add_options, chosen, seed

HOTTEST = 4  # experts named in a layer's row
RANDOM_REQUESTS = 32
PHASES: tuple[Phase, Phase] = ("decode", "prefill")
LINES = "FILE of prompts: lines of text; in a .jsonl file each is a JSON string, or a list of token ids"
Prompt = str | list[int]
PROMPT = msgspec.json.Decoder(Prompt)


class ExpertsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the traffic, which runs at `rpc`, or else on `checkpoint` with the fields after it.

    Prompts are the lines of `prompts`, over and over until there are `requests`, or else `input_tokens` random ids.
    `concurrency` of them run at once. Every answer has exactly `output_tokens`.
    """

    rpc: str | None = None
    checkpoint: str | None = None
    prompts: Annotated[str | None, Meta(description=LINES)] = None
    requests: Annotated[Count | None, Meta(description="default: the lines of FILE, or 32 random prompts")] = None
    concurrency: Annotated[Count, Meta(description="sequences that run at once")] = 8
    input_tokens: Annotated[Count, Meta(description="length of a random prompt, tokens")] = 128
    output_tokens: Annotated[Count, Meta(description="length of an answer, tokens")] = 32
    temperature: Annotated[float, Meta(description="0: greedy")] = 0.0
    weights: Annotated[str, Meta(description="number format of the weights")] = "auto"
    device: Annotated[str, Meta(description="cpu or cuda")] = "auto"
    seed: Annotated[int, Meta(description="of random prompts and answers")] = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CHECKPOINT or --rpc, and the traffic."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder of the model that shall answer")
    where.add_argument("--rpc", metavar="HOST:PORT|unix:PATH", help="ask this running server instead")
    traffic, what = parser.add_argument_group("what CHECKPOINT shall answer"), {"prompts", "input_tokens"}
    every = set(ExpertsSettings.__struct_fields__)
    add_options(traffic.add_mutually_exclusive_group(), ExpertsSettings, skip=every - what)
    add_options(traffic, ExpertsSettings, skip={"rpc", "checkpoint", *what}, readers={"seed": seed})
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and all counts here")


def run(arguments: argparse.Namespace) -> int:
    """Run the traffic or ask the server, print the tables. Raises ConfigError for a model without experts."""
    settings = ExpertsSettings(**chosen(arguments, ExpertsSettings))
    report = Recording("experts", arguments.json)
    statistics = run_traffic(settings) if settings.rpc is None else _ask(settings)
    print(tables(statistics))
    report.write(settings, statistics)
    return 0


def _ask(settings: ExpertsSettings) -> ExpertStatistics:
    for field in msgspec.structs.fields(ExpertsSettings):
        if field.name != "rpc" and (value := getattr(settings, field.name)) != field.default:
            why = f"{field.name} is for a CHECKPOINT; the server of --rpc has traffic of its own"
            raise ConfigError(why, field=field.name, value=value)
    assert settings.rpc is not None
    with SyncClient(settings.rpc) as client:
        client.wait_ready()
        while not (core := client.stats().core).total_blocks:  # told as soon as the model is loaded
            time.sleep(0.01)
    statistics = core.experts
    if statistics is None:
        why = "this server was started without --expert-statistics: it does not count"
        raise ConfigError(why, field="expert_statistics", limit=True, value=False)
    if not statistics.tokens:
        raise ConfigError("the server has counted no step yet", field="expert_statistics")
    return statistics


def run_traffic(settings: ExpertsSettings) -> ExpertStatistics:
    """Load the checkpoint, answer the prompts, return the counts.

    Raises ConfigError, CheckpointError, and InvalidRequest for a prompt that the model cannot take.
    """
    from cierzo.engine.llm import LLM

    assert settings.checkpoint is not None
    given = None if settings.prompts is None else read_prompts(Path(settings.prompts))
    count = settings.requests or (RANDOM_REQUESTS if given is None else len(given))
    seeds = [(settings.seed + index) % (MAX_SEED + 1) for index in range(count)]
    with LLM(
        settings.checkpoint,
        expert_statistics=True,
        max_running=settings.concurrency,
        weights=settings.weights,
        device=settings.device,
    ) as llm:
        vocab_size = llm.config.model.vocab_size
        prompts: list[Prompt] = (
            [random_prompt(index, settings.input_tokens, vocab_size, settings.seed) for index in range(count)]
            if given is None
            else list(itertools.islice(itertools.cycle(given), count))
        )
        sampling = SamplingParams(
            max_tokens=settings.output_tokens, ignore_eos=True, temperature=settings.temperature
        )
        llm.generate(prompts, [msgspec.structs.replace(sampling, seed=seed) for seed in seeds], progress=True)
        statistics = llm.expert_statistics()
    assert statistics is not None
    return statistics


def read_prompts(path: Path) -> list[Prompt]:
    """Read one prompt a line. Raises ConfigError that names the line which is none."""
    return read_lines(path, PROMPT.decode if path.suffix == ".jsonl" else bytes.decode, "prompts")


def tables(statistics: ExpertStatistics) -> str:
    """The tables: a row per layer, and a row per number of tokens in a step."""
    experts, top_k, layers = statistics.num_experts, statistics.top_k, range(len(statistics.layers))
    head = [f"{statistics.tokens:,} tokens, {top_k} of {experts} experts each, {len(layers)} MoE layers"]
    steps = []
    for phase in PHASES:
        count, buckets = statistics.steps(phase), statistics.buckets(phase)
        mean = sum(bucket.tokens for bucket in buckets) / count if count else 0.0
        head.append(f"{phase:<8} {count:,} steps" + (f" of {mean:.1f} tokens on average" if count else ""))
        for bucket in buckets:
            tokens = bucket.tokens / bucket.steps
            independent = fmean(independent_distinct(statistics, layer, tokens) for layer in layers)
            steps.append(
                {
                    "": phase,
                    "tokens": f"{tokens:.1f}",
                    "steps": str(bucket.steps),
                    "measured": f"{fmean(bucket.distinct) / bucket.steps:.1f}",
                    "independent": f"{independent:.1f}",
                    "uniform": f"{random_distinct(experts, top_k, tokens):.1f}",
                }
            )
    by_layer = grid_of("distinct experts of a step", [_layer(statistics, layer) for layer in layers])
    by_step = grid_of("distinct experts by tokens of the step, on average over layers", steps)
    return page(head, (by_layer, by_step), [])


def _layer(statistics: ExpertStatistics, layer: int) -> dict[str, str]:
    counts = statistics.expert_tokens[layer]
    hottest = sorted(range(len(counts)), key=lambda e: (-counts[e], e))[:HOTTEST]
    return {
        "layer": str(statistics.layers[layer]),
        **{phase: _figure(statistics.distinct_per_step(layer, phase)) for phase in PHASES},
        "imbalance": _figure(statistics.imbalance(layer)),
        "entropy": _figure(statistics.entropy_share(layer), 3),
        "the hottest experts": "  ".join(f"{e} ({counts[e] / max(statistics.tokens, 1):.1%})" for e in hottest),
    }


def _figure(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
