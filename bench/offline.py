"""`make bench-offline`: our throughput against that of transformers' `generate`, side by side in one process.

Same checkpoint, number format, threads, greedy sampling, prompts (token ids of equal length, so that neither side
pads) and output length. The two alternate within each round and are compared round by round, because a
machine's mood changes from minute to minute. Every round has prompts of its own, and our prefix cache is off.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch
from tqdm import tqdm

from cierzo.bench.report import make_report, write_report
from cierzo.bench.stats import median, paired_ratio, spread
from cierzo.bench.traces import random_prompt
from cierzo.engine.errors import ConfigError
from cierzo.engine.llm import LLM
from cierzo.engine.messages import SamplingParams
from cierzo.engine.options import seed

PROGRESS_AFTER_S = 2.0
WARM_UP_TOKENS = 2  # one from a prompt, one from a decoding step
Generate = Callable[[list[list[int]], int], int]  # prompts, tokens of each answer -> tokens generated in all


class OfflineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison, of every checkpoint at every batch size. Lengths in tokens."""

    checkpoints: tuple[str, ...]
    batches: tuple[int, ...]
    rounds: int
    input_tokens: int
    output_tokens: int
    dtype: str
    threads: int
    seed: int


class OfflineRow(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint at one batch size; output tokens per second of each round, ours and transformers'."""

    checkpoint: str
    batch: int
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """Median over the rounds of ours / theirs; above 1 we are faster."""
        return paired_ratio(self.ours, self.theirs)


def main() -> int:
    """Compare, print the table; exit status 1 if transformers is faster anywhere."""
    arguments = _parser().parse_args()
    settings = OfflineSettings(
        checkpoints=tuple(arguments.checkpoints),
        batches=arguments.batch,
        rounds=arguments.rounds,
        input_tokens=arguments.input_tokens,
        output_tokens=arguments.output_tokens,
        dtype=arguments.dtype,
        threads=arguments.threads or torch.get_num_threads(),
        seed=arguments.seed,
    )
    started = datetime.now(UTC).isoformat(timespec="seconds")
    rows = [row for checkpoint in settings.checkpoints for row in compare(checkpoint, settings)]
    print(_table(rows, settings))
    if arguments.json is not None:
        command = " ".join(["python -m cierzo.bench.offline", *sys.argv[1:]])
        report = make_report("offline", command=command, started=started, settings=settings, results=rows)
        write_report(report, arguments.json)
    return 0 if all(row.ratio >= 1 for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Offline throughput against transformers' generate.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder in Hugging Face layout")
    parser.add_argument("--batch", type=_sizes, default=(1, 8, 32), metavar="N,N,...", help="requests at once")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="rounds; the two sides alternate in each"
    )
    parser.add_argument("--input-tokens", type=int, default=64, metavar="N", help="length of a prompt, tokens")
    parser.add_argument("--output-tokens", type=int, default=32, metavar="N", help="length of an answer, tokens")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="weights and activations"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of both sides; unset: torch's choice")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and every round here")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"batch sizes must be at least 1, got {text}")
    return sizes


def compare(checkpoint: str, settings: OfflineSettings) -> list[OfflineRow]:
    """One row per batch size. Both engines hold the weights at the same time, so the checkpoint must fit twice.

    Raises ConfigError or CheckpointError for a folder that is no checkpoint.
    """
    vocab_size = _config(checkpoint)["vocab_size"]
    theirs = _transformers(checkpoint, settings.dtype)
    torch.set_num_threads(settings.threads)
    context = settings.input_tokens + settings.output_tokens
    with LLM(
        checkpoint,
        dtype=settings.dtype,
        threads=settings.threads,
        max_model_len=context,
        max_running=max(settings.batches),
        prefix_caching=False,
    ) as llm:
        ours = _cierzo(llm)
        total = len(settings.batches) * (settings.rounds + 1)
        with tqdm(
            total=total, unit="round", desc=Path(checkpoint).name, delay=PROGRESS_AFTER_S, leave=False, disable=None
        ) as bar:
            return [
                _compare_batch(checkpoint, batch, ours, theirs, vocab_size, settings, bar)
                for batch in settings.batches
            ]


def _compare_batch(
    checkpoint: str,
    batch: int,
    ours: Generate,
    theirs: Generate,
    vocab_size: int,
    settings: OfflineSettings,
    bar: tqdm[Any],
) -> OfflineRow:
    rates: tuple[list[float], list[float]] = ([], [])
    for round_number in range(settings.rounds + 1):
        first = round_number * 1_000_000
        prompts = [random_prompt(first + i, settings.input_tokens, vocab_size, settings.seed) for i in range(batch)]
        for side in (0, 1) if round_number % 2 else (1, 0):  # neither side always goes first
            if round_number == 0:
                (ours, theirs)[side](prompts, WARM_UP_TOKENS)
            else:
                rates[side].append(_tokens_per_s((ours, theirs)[side], prompts, settings.output_tokens))
        bar.update()
    return OfflineRow(checkpoint=checkpoint, batch=batch, ours=rates[0], theirs=rates[1])


def _tokens_per_s(generate: Generate, prompts: list[list[int]], output_tokens: int) -> float:
    start = time.perf_counter()
    generated = generate(prompts, output_tokens)
    elapsed_s = time.perf_counter() - start
    if generated != len(prompts) * output_tokens:
        raise RuntimeError(f"{generated} tokens instead of {len(prompts)} x {output_tokens}: no fair comparison")
    return generated / elapsed_s


def _cierzo(llm: LLM) -> Generate:
    def generate(prompts: list[list[int]], output_tokens: int) -> int:
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        return sum(len(output.token_ids) for output in llm.generate(prompts, sampling))

    return generate


def _transformers(checkpoint: str, dtype: str) -> Generate:
    """The class that config.json names: transformers' own AutoModel does not map mistral4's text model."""
    import transformers

    model_class = getattr(transformers, _config(checkpoint)["architectures"][0])
    model = model_class.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], output_tokens: int) -> int:
        greedy = transformers.GenerationConfig(
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        ids = torch.tensor(prompts)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        return (output.shape[1] - ids.shape[1]) * output.shape[0]

    return generate


def _config(checkpoint: str) -> dict[str, Any]:
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{checkpoint} has no config.json", field="checkpoint", value=checkpoint)
    config: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    return config


def _table(rows: list[OfflineRow], settings: OfflineSettings) -> str:
    lines = [
        f"{settings.input_tokens} prompt + {settings.output_tokens} output tokens, {settings.dtype}, "
        f"{settings.threads} threads, median of {settings.rounds} rounds (spread)",
        f"{'checkpoint':20}{'batch':>6}{'cierzo tok/s':>20}{'transformers tok/s':>22}{'ratio':>8}",
    ]
    for row in rows:
        ours, theirs = (f"{median(rates):,.1f} ({spread(rates):.0%})" for rates in (row.ours, row.theirs))
        lines.append(f"{Path(row.checkpoint).name:20}{row.batch:6}{ours:>20}{theirs:>22}{row.ratio:8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
