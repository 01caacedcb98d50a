"""From what each request saw to the figures that a load is judged by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import msgspec

from cierzo.bench.campaign.table import grid_of, text
from cierzo.bench.stats import Summary, summarise
from cierzo.engine.errors import Draining, FrameTooLarge, InvalidRequest, Overloaded, UnknownMethod

Outcome = Literal["answered", "refused", "failed", "deadline"]
SIMULATED = "simulated:"  # how the device of a server begins that computes nothing
REFUSALS = {kind.code for kind in (InvalidRequest, FrameTooLarge, UnknownMethod, Overloaded, Draining)}


class RequestSample(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that was sent, times in seconds from the start of the run.

    `due_s` is when it should have been sent, `start_s` when it was; delta i brought `delta_tokens[i]` tokens at
    `delta_s[i]`. `finish` is the finish reason that its final record told, empty where there was none. `error` is
    None for an answer, else the code that the request was refused or failed with, or the finish reason of one that
    was accepted and came to nothing; `message` has the server's words.
    """

    due_s: float
    start_s: float
    delta_s: list[float]
    delta_tokens: list[int]
    end_s: float
    error: str | None = None
    message: str = ""
    finish: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens that came."""
        return sum(self.delta_tokens)

    @property
    def token_gaps(self) -> Iterator[float]:
        """Seconds between tokens: a delta of k tokens after g seconds counts as k gaps of g / k."""
        for (before_s, now_s), tokens in zip(pairwise(self.delta_s), self.delta_tokens[1:], strict=True):
            yield from [(now_s - before_s) / tokens] * tokens

    @property
    def outcome(self) -> Outcome:
        """How the request ended."""
        if self.error is None:
            return "answered"
        if self.error == "deadline":
            return "deadline"
        return "refused" if self.error in REFUSALS else "failed"

    @property
    def told(self) -> str:
        """Outcome and reason of a request without an answer: "refused: overloaded: full"."""
        code = self.error if self.error != self.outcome else ""
        return ": ".join(word for word in (self.outcome, code, self.message) if word)


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """How the requests ended, and latencies in seconds of those that were answered.

    `answered`, `refused`, `failed` and `deadline` add up to the samples; `unsent` requests were never sent, as the
    connection was lost. `short` answers have fewer than the `asked_tokens` of the load. `errors` counts what was
    not answered by outcome and reason. `device` is what the server says that it computes on, `max_model_len` its
    longest request, where it says so.
    """

    device: str
    elapsed_s: float
    answered: int
    refused: int
    failed: int
    deadline: int
    short: int
    unsent: int
    errors: dict[str, int]
    requests_per_s: float
    output_tokens_per_s: float
    time_to_first_token_s: Summary
    inter_token_s: Summary
    end_to_end_s: Summary
    send_lag_s: Summary
    asked_tokens: int
    max_model_len: int | None
    samples: list[RequestSample]


def summarise_load(
    samples: list[RequestSample],
    elapsed_s: float,
    device: str = "",
    *,
    asked_tokens: int = 0,
    max_model_len: int | None = None,
    unsent: int = 0,
) -> LoadResult:
    """Latencies count from `due_s`."""
    answered = [sample for sample in samples if sample.outcome == "answered"]
    outcomes = Counter(sample.outcome for sample in samples)
    return LoadResult(
        device=device,
        elapsed_s=elapsed_s,
        answered=len(answered),
        refused=outcomes["refused"],
        failed=outcomes["failed"],
        deadline=outcomes["deadline"],
        short=sum(sample.num_tokens < asked_tokens for sample in answered),
        unsent=unsent,
        errors=dict(Counter(sample.told for sample in samples if sample.error is not None)),
        requests_per_s=len(answered) / elapsed_s,
        output_tokens_per_s=sum(sample.num_tokens for sample in answered) / elapsed_s,
        time_to_first_token_s=summarise([s.delta_s[0] - s.due_s for s in answered if s.delta_s]),
        inter_token_s=summarise([gap for sample in answered for gap in sample.token_gaps]),
        end_to_end_s=summarise([sample.end_s - sample.due_s for sample in answered]),
        send_lag_s=summarise([sample.start_s - sample.due_s for sample in samples]),
        asked_tokens=asked_tokens,
        max_model_len=max_model_len,
        samples=samples,
    )


def steady_load(result: LoadResult, left_out: int) -> LoadResult:
    """The load between the S-th completion and the S-th last, S being `left_out`: neither ramp nor tail.

    What ended in between, over the time between the two. Raises ValueError where that leaves nothing.
    """
    answered = [sample for sample in result.samples if sample.outcome == "answered"]
    answered.sort(key=lambda sample: sample.end_s)
    inside = answered[left_out : len(answered) - left_out]
    if not inside:
        raise ValueError(f"{len(answered)} answers, and {left_out} are left out at either end")
    begin_s = answered[left_out - 1].end_s if left_out else 0.0
    elapsed_s = inside[-1].end_s - begin_s
    return summarise_load(inside, elapsed_s, result.device, asked_tokens=result.asked_tokens)


def result_table(result: LoadResult) -> str:
    """The figures as text, latencies in milliseconds, and what became of the requests."""
    latencies = {
        "time to first token": result.time_to_first_token_s,
        "inter-token": result.inter_token_s,
        "end to end": result.end_to_end_s,
        "sent too late by": result.send_lag_s,
    }
    rows = [
        {"latency, ms": name}
        | {each: f"{getattr(s, each) * 1e3:.2f}" if s.count else "-" for each in ("p50", "p90", "p99", "max")}
        for name, s in latencies.items()
    ]
    simulated = result.device.removeprefix(SIMULATED)
    outcomes = ("answered", "refused", "failed", "deadline", "short")
    lines = [
        text(grid_of(f"SIMULATION of {simulated}" if simulated != result.device else "", rows)),
        text(grid_of("", [{"requests": ""} | {name: f"{getattr(result, name):,}" for name in outcomes}])),
        f"{result.answered} answered in {result.elapsed_s:.2f} s: {result.requests_per_s:,.1f} requests/s, "
        f"{result.output_tokens_per_s:,.0f} output tokens/s",
        *_shorts(result),
        *(f"{count} {error}" for error, count in sorted(result.errors.items())),
    ]
    if result.unsent:
        lines.append(f"{result.unsent} not sent: the connection was lost")
    return "\n".join(lines)


def _shorts(result: LoadResult) -> list[str]:
    """A line for each reason that answers are shorter than they were asked for."""
    context = "the context" if result.max_model_len is None else f"max_model_len {result.max_model_len}"
    reasons = {"length": f"cut to what {context} leaves", "stop": "that stopped early", "": "that ended early"}
    reasons["tool_calls"] = "that ended in a call"
    lines = []
    for finish, reason in reasons.items():
        answers = (one for one in result.samples if one.outcome == "answered" and one.finish == finish)
        lengths = [one.num_tokens for one in answers if one.num_tokens < result.asked_tokens]
        if lengths:
            span = "-".join(map(str, sorted({min(lengths), max(lengths)})))
            lines.append(f"{len(lengths)} {reason}: {span} tokens instead of {result.asked_tokens}")
    return lines
