"""The longest prompt beside short streams on a simulated card: steps take as long as the target from its first
chunk to its last, and all of it takes no longer than with chunks cut by tokens.

`python tests/bench/test_long_prompt.py` prints both, for each profile.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
import numpy as np
import pytest

from cierzo.bench.virtual import VirtualClock, VirtualCore
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.messages import Submit
from cierzo.scheduler.params import SamplingParams

LONG, SHORT = 0, range(1, 33)
LONG_TOKENS, SHORT_TOKENS = 262_144 - 64, 1000
QUARTERS = 4


class Course(msgspec.Struct, frozen=True, kw_only=True):
    """What the streams saw of the long prompt: seconds until its first token; their gaps while it was computed, the
    99th percentile of each quarter of its chunks and of all; tokens of its largest and smallest chunk."""

    prefill_s: float
    p99_s: float
    quarters_s: list[float]
    largest: int
    smallest: int


def submit(request_id: int, prompt_tokens: int, max_tokens: int) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=request_id)
    prompt = random.Random(request_id).choices(range(100_000), k=prompt_tokens)
    return Submit(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)


def run(config: EngineConfig) -> Course:
    """Start the streams, then the long prompt; step until it has a token."""
    core, chunks, gaps = VirtualCore(config, VirtualClock()), [], []
    for number in SHORT:
        core.submit(submit(number, SHORT_TOKENS, 20_000))
    while core.stats().waiting or core.stats().waiting_tokens > len(SHORT):
        core.step_plain()
    core.submit(submit(LONG, LONG_TOKENS, 1))
    begin_s, first = core.virtual_clock(), False
    while not first:
        before_s, before = core.virtual_clock(), core.stats().computed_tokens
        deltas = core.step_plain()
        assert len(deltas) >= len(SHORT), "every stream gets a token with every step"
        gaps.append(core.virtual_clock() - before_s)
        chunks.append(core.stats().computed_tokens - before - len(SHORT))
        first = any(delta.request_id == LONG for delta in deltas)
    quarters = np.array_split(np.array(gaps), QUARTERS)
    return Course(
        prefill_s=core.virtual_clock() - begin_s,
        p99_s=float(np.percentile(gaps, 99)),
        quarters_s=[float(np.percentile(quarter, 99)) for quarter in quarters],
        largest=max(chunks),
        smallest=min(chunks[:-1]),
    )


def configure(profile: str, **more: Any) -> EngineConfig:
    return resolve(
        EngineOptions(model="small4", device="simulated:h200", weights="nvfp4", profile=profile, **more)  # type: ignore[arg-type]
    )


# The tokens of a step, and of a chunk, that the profiles had when chunks were cut by tokens alone.
BEFORE = {
    "balanced": {"budget_tokens": 1024, "max_chunk_tokens": 512, "max_step_ms": 0.0},
    "throughput": {"budget_tokens": 8192, "max_chunk_tokens": 4096, "max_step_ms": 0.0},
}


@pytest.mark.parametrize("profile", BEFORE)
def test_steps_beside_the_longest_prompt_take_as_long_as_the_target(profile: str) -> None:
    config = configure(profile)
    now, before = run(config), run(configure(profile, **BEFORE[profile]))
    target_s = config.scheduler.max_step_s
    assert now.p99_s < 1.3 * target_s
    assert all(0.7 * target_s < one < 1.3 * target_s for one in now.quarters_s[1:-1])
    assert max(now.quarters_s) < 1.3 * target_s
    assert now.prefill_s < 1.05 * before.prefill_s
    assert before.quarters_s[-1] > 1.5 * before.quarters_s[0]
    assert now.largest >= before.largest
    assert now.smallest < 0.8 * now.largest  # chunks shrink as the context grows


def main() -> None:
    """Print the courses of each profile, before and now."""
    for profile, which in itertools.product(BEFORE, ("by tokens", "by time")):
        config = configure(profile, **(BEFORE[profile] if which == "by tokens" else {}))
        course = run(config)
        quarters = ", ".join(f"{1e3 * one:.0f}" for one in course.quarters_s)
        times = f"prefill {course.prefill_s:.1f} s, p99 {1e3 * course.p99_s:.0f} ms (quarters {quarters})"
        target = f"{profile} {which}, target {1e3 * config.scheduler.max_step_s:.0f} ms"
        print(f"{target}: {times}, chunks {course.largest} to {course.smallest}")


if __name__ == "__main__":
    main()
