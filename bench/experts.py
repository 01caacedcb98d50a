"""`cierzo bench experts`: which experts traffic chooses, layer by layer, in this process or in a running server.

In this process a checkpoint answers the prompts of a file, or random ones; random tokens choose as no text does. A
server that was started with --expert-statistics is asked what its own traffic chose since its start: that of its
users, or of `cierzo bench load`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.report import Recording
from cierzo.bench.traces import random_prompt
from cierzo.engine.errors import ConfigError, refusal
from cierzo.engine.expert_statistics import ExpertStatistics, independent_distinct
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.messages import SamplingParams
from cierzo.engine.options import MAX_SEED, finite, positive, seed

HOTTEST = 4  # experts named in a layer's row
RANDOM_REQUESTS = 32
Prompt = str | list[int]


class ExpertsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the traffic, which runs at `rpc`, or else on `checkpoint` with the fields after it.

    Prompts are the lines of `prompts`, over and over until there are `requests`, or else `input_tokens` random ids.
    `concurrency` of them run at once. Every answer has exactly `output_tokens`.
    """

    rpc: str | None = None
    checkpoint: str | None = None
    prompts: str | None = None
    requests: int | None = None
    concurrency: int = 8
    input_tokens: int = 128
    output_tokens: int = 32
    temperature: float = 0.0
    weights: str = "auto"
    device: str = "auto"
    seed: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CHECKPOINT or --rpc, and the traffic."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder of the model that shall answer")
    where.add_argument("--rpc", metavar="HOST:PORT|unix:PATH", help="ask this running server instead")
    traffic = parser.add_argument_group("what CHECKPOINT shall answer")
    for flag, kind, metavar, text in (
        (
            "--prompts",
            Path,
            "FILE",
            "lines of text; in a .jsonl file each is a JSON string, or a list of token ids",
        ),
        ("--requests", positive, "N", f"in all; default: the lines of FILE, or {RANDOM_REQUESTS} random prompts"),
        ("--concurrency", positive, "C", "sequences that run at once; default: 8"),
        ("--input-tokens", positive, "N", "length of a random prompt, tokens; default: 128"),
        ("--output-tokens", positive, "N", "length of an answer, tokens; default: 32"),
        ("--temperature", finite, "X", "default: 0, greedy"),
        ("--weights", str, "FORMAT", "number format of the weights; default: the checkpoint's dtype"),
        ("--device", str, "cpu|cuda", "where it runs; default: the CPU"),
        ("--seed", seed, "N", "of random prompts and answers; default: 0"),
    ):
        traffic.add_argument(flag, type=kind, metavar=metavar, help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and all counts here")


def run(arguments: argparse.Namespace) -> int:
    """Run the traffic or ask the server, print the tables. Raises ConfigError for a model without experts."""
    settings = _settings(arguments)
    report = Recording("experts", arguments.json)
    statistics = _ask(settings.rpc) if settings.rpc is not None else run_traffic(settings)
    print(tables(statistics))
    report.write(settings, statistics)
    return 0


def _settings(arguments: argparse.Namespace) -> ExpertsSettings:
    given: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value
        for name in ExpertsSettings.__struct_fields__
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.rpc is not None and len(given) > 1:
        name = next(name for name in given if name != "rpc")
        raise ConfigError(
            f"{name} is for a CHECKPOINT; the server of --rpc has traffic of its own", field=name, value=given[name]
        )
    if "prompts" in given and "input_tokens" in given:
        raise ConfigError("input_tokens is the length of random prompts; prompts has its own", field="input_tokens")
    return ExpertsSettings(**given)


def _ask(address: str) -> ExpertStatistics:
    with SyncClient(address) as client:
        statistics = client.stats().core.experts
    if statistics is None:
        why = "this server was started without --expert-statistics: it does not count"
        raise ConfigError(why, field="expert_statistics", limit=True, value=False)
    return statistics


def run_traffic(settings: ExpertsSettings) -> ExpertStatistics:
    """Load the checkpoint, answer the prompts, return the counts. Raises ConfigError, CheckpointError."""
    from cierzo.engine.llm import LLM

    assert settings.checkpoint is not None
    given = None if settings.prompts is None else read_prompts(Path(settings.prompts))
    with LLM(
        settings.checkpoint,
        expert_statistics=True,
        max_running=settings.concurrency,
        weights=settings.weights,
        device=settings.device,
    ) as llm:
        vocab_size = llm.config.model.vocab_size
        if given is None:
            limit = llm.config.scheduler.max_model_len - 1
            if settings.input_tokens > limit:
                raise refusal("input_tokens", f"at most {limit}", settings.input_tokens, "max_model_len, less one")
            count = settings.requests or RANDOM_REQUESTS
            prompts: list[Prompt] = [
                random_prompt(index, settings.input_tokens, vocab_size, settings.seed) for index in range(count)
            ]
        else:
            _check_vocabulary(given, vocab_size, settings.prompts)
            count = settings.requests or len(given)
            prompts = [given[index % len(given)] for index in range(count)]
        sampling = [
            SamplingParams(
                max_tokens=settings.output_tokens,
                ignore_eos=True,
                temperature=settings.temperature,
                seed=(settings.seed + index) % (MAX_SEED + 1),
            )
            for index in range(count)
        ]
        llm.generate(prompts, sampling, progress=True)
        statistics = llm.expert_statistics()
    assert statistics is not None
    return statistics


# --- prompts -----------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[Prompt]:
    """Read one prompt a line. Raises ConfigError that names the line which is none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(
            f"prompts {path} cannot be read: {error.strerror}", field="prompts", value=path
        ) from error
    if not lines:
        raise ConfigError(f"prompts {path} has no lines", field="prompts", limit="at least one line", value=path)
    is_json = path.suffix == ".jsonl"
    return [_prompt(line, is_json, f"prompts {path}, line {number}") for number, line in enumerate(lines, 1)]


def _prompt(line: bytes, is_json: bool, where: str) -> Prompt:
    limit = "a JSON string or a list of token ids" if is_json else "text in UTF-8"
    try:
        prompt = msgspec.json.decode(line, type=Prompt) if is_json else line.decode()
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        raise ConfigError(f"{where} must be {limit}: {error}", field="prompts", limit=limit) from error
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ConfigError(f"{where} is empty", field="prompts", limit=limit, value=prompt)
    return prompt


def _check_vocabulary(prompts: list[Prompt], vocab_size: int, path: str | None) -> None:
    for number, prompt in enumerate(prompts, 1):
        wrong = [] if isinstance(prompt, str) else [i for i in prompt if not 0 <= i < vocab_size]
        if wrong:
            raise ConfigError(
                f"prompts {path}, line {number}: token id {wrong[0]} is not in 0 .. {vocab_size - 1}",
                field="prompts",
                limit=vocab_size - 1,
                value=wrong[0],
            )


# --- tables ------------------------------------------------------------------------------------------------


def tables(statistics: ExpertStatistics) -> str:
    """The tables: a row per layer, and a row per number of tokens in a step."""
    return "\n".join([*_layers(statistics), "", *_steps(statistics)])


def _layers(statistics: ExpertStatistics) -> Iterator[str]:
    experts, top_k = statistics.num_experts, statistics.top_k
    yield f"{statistics.tokens:,} tokens, {top_k} of {experts} experts each, {len(statistics.layers)} MoE layers"
    for phase in ("decode", "prefill"):
        steps = statistics.steps(phase)
        tokens = sum(bucket.tokens for bucket in statistics.buckets(phase))
        yield f"{phase:<8} {steps:,} steps" + (f" of {tokens / steps:.1f} tokens on average" if steps else "")
    yield ""
    yield f"{'':>5}  {'distinct experts of a step':^26}"
    yield f"{'layer':>5}  {'decode':>12}  {'prefill':>12}  {'imbalance':>9}  {'entropy':>7}  the hottest experts"
    for layer, number in enumerate(statistics.layers):
        counts = statistics.expert_tokens[layer]
        hottest = sorted(range(experts), key=lambda e: (-counts[e], e))[:HOTTEST]
        shares = "  ".join(f"{e} ({counts[e] / max(statistics.tokens, 1):.1%})" for e in hottest)
        decode, prefill = (_figure(statistics.distinct_per_step(layer, phase)) for phase in ("decode", "prefill"))
        imbalance, entropy = _figure(statistics.imbalance(layer)), _figure(statistics.entropy_share(layer), 3)
        yield f"{number:>5}  {decode:>12}  {prefill:>12}  {imbalance:>9}  {entropy:>7}  {shares}"


def _steps(statistics: ExpertStatistics) -> Iterator[str]:
    """Means over layers of distinct experts: measured, and of independent tokens."""
    layers, uniform = range(len(statistics.layers)), statistics.top_k / statistics.num_experts
    yield "distinct experts by tokens of the step, on average over layers"
    yield f"{'tokens':>15}  {'steps':>7}  {'measured':>8}  {'independent':>11}  {'uniform':>7}"
    for phase in ("decode", "prefill"):
        for bucket in statistics.buckets(phase):
            tokens = bucket.tokens / bucket.steps
            measured = sum(bucket.distinct) / bucket.steps / len(layers)
            independent = sum(independent_distinct(statistics, layer, tokens) for layer in layers) / len(layers)
            even = statistics.num_experts * (1 - (1 - uniform) ** tokens)
            yield (
                f"{phase:>7} {tokens:>7.1f}  {bucket.steps:>7}"
                f"  {measured:>8.1f}  {independent:>11.1f}  {even:>7.1f}"
            )


def _figure(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
