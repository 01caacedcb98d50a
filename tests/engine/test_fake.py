"""The fake runner notices what a model would notice."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cierzo.engine.worker.batch import BatchBuilder
from cierzo.engine.worker.fake import FakeRunner
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import Admission, SeqPlan, StepPlan, StepResult

PROMPT = [5, 6, 7, 8, 9, 10]


def run(
    tokens: list[int] = PROMPT,
    *,
    prompt: int = 6,
    blocks: tuple[int, ...] = (2, 0, 1),
    chunk: int = 6,
    seed: int = 3,
    sample: int = 0,
    temperature: float = 0.7,
    written: tuple[int, int] | None = None,
    **settings: object,
) -> StepResult:
    """The result of computing `tokens` in chunks; `written`: at the end this cache slot gets this word."""
    runner = FakeRunner(vocab_size=1 << 40, num_blocks=4, block_tokens=2, max_running=1, **settings)
    builder = BatchBuilder(max_tokens=6, max_running=1, max_blocks=3, block_tokens=2)
    admission = Admission(
        SamplingParams(seed=seed, logprobs=2, temperature=temperature), tuple(tokens[:prompt]), (), ()
    )
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        first = start == 0
        last = start + len(part) == len(tokens)
        if written is not None and last:
            runner._cache[written[0]] = written[1]
        plan = SeqPlan(
            (1, sample),
            0,
            0,
            start,
            part,
            prompt,
            list(blocks) if first else [],
            last,
            admission if first else None,
        )
        step = StepPlan(1, [plan], len(part))
        runner.launch(step, builder.build(step))
        result = runner.collect()
    return result


def test_chunks_and_blocks_make_no_difference() -> None:
    expected = run()
    assert len(expected.token_ids[0]) == 1
    assert run(chunk=1) == run(chunk=4) == run(blocks=(3, 1, 2)) == expected


def test_a_greedy_answer_depends_on_no_seed() -> None:
    greedy = [run(seed=seed, sample=sample, temperature=0.0).token_ids for seed, sample in ((3, 0), (4, 0), (4, 1))]
    assert greedy[0] == greedy[1] == greedy[2] != run().token_ids


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [4, *PROMPT[1:]]},
        {"tokens": [6, 5, *PROMPT[2:]]},
        {"prompt": 4},  # the form of tokens 4 and 5
        {"seed": 4},
        {"sample": 1},
        {"chunk": 3, "blocks": (2, 0, 1), "written": (4, 1)},  # the first token's slot
        {"chunk": 1, "blocks": (2, 0, 0)},  # positions 4, 5 overwrite 2, 3
    ],
)
def test_everything_else_does(change: dict[str, object]) -> None:
    assert run(**change).token_ids != run().token_ids


def test_cheap_mode_still_reads_the_last_token_through_the_table() -> None:
    expected = run(reads="last").token_ids
    assert run(reads="last", chunk=4, blocks=(3, 1, 2)).token_ids == expected
    assert run([*PROMPT[:5], 99], reads="last").token_ids != expected
    assert run([1, *PROMPT[1:]], reads="last").token_ids == expected


def test_a_script_overrides_and_log_probabilities_are_made_up() -> None:
    result = run(script=lambda key, index: 100 * key[0] + index)
    assert result.token_ids == [[100]]
    assert result.logprobs is not None
    assert result.logprobs[0] is not None
    assert result.logprobs[0][0].top_token_ids == [100, 101]


def test_no_torch() -> None:
    code = "import sys, cierzo.engine.worker.core; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
