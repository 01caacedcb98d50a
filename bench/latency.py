"""From what each request saw to the figures that a load is judged by."""

from __future__ import annotations

from collections import Counter

import msgspec

from cierzo.bench.stats import Summary, summarise


class RequestSample(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request, times in seconds from the start of the run.

    `due_s` is when it should have been sent, `start_s` when it was; delta i brought `delta_tokens[i]` tokens at
    `delta_s[i]`. `error` is the code it was refused or failed with, `message` the server's words.
    """

    due_s: float
    start_s: float
    delta_s: list[float]
    delta_tokens: list[int]
    end_s: float
    error: str | None = None
    message: str = ""


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies in seconds of the requests that were answered; `errors` counts the others by code and message.
    `device` is what the server says that it computes on, if it does."""

    device: str
    elapsed_s: float
    answered: int
    errors: dict[str, int]
    requests_per_s: float
    output_tokens_per_s: float
    time_to_first_token_s: Summary
    inter_token_s: Summary
    end_to_end_s: Summary
    send_lag_s: Summary
    samples: list[RequestSample]


def summarise_load(samples: list[RequestSample], elapsed_s: float, device: str = "") -> LoadResult:
    """Latencies count from `due_s`. A delta of k tokens after a gap of g seconds counts as k gaps of g / k."""
    answered = [sample for sample in samples if sample.error is None]
    num_tokens = sum(sum(sample.delta_tokens) for sample in answered)
    return LoadResult(
        device=device,
        elapsed_s=elapsed_s,
        answered=len(answered),
        errors=dict(Counter(f"{s.error}: {s.message}" for s in samples if s.error is not None)),
        requests_per_s=len(answered) / elapsed_s,
        output_tokens_per_s=num_tokens / elapsed_s,
        time_to_first_token_s=summarise([s.delta_s[0] - s.due_s for s in answered if s.delta_s]),
        inter_token_s=summarise([gap for sample in answered for gap in _token_gaps(sample)]),
        end_to_end_s=summarise([sample.end_s - sample.due_s for sample in answered]),
        send_lag_s=summarise([sample.start_s - sample.due_s for sample in samples]),
        samples=samples,
    )


def steady_load(result: LoadResult, left_out: int) -> LoadResult:
    """The load between the S-th completion and the S-th last, S being `left_out`: neither ramp nor tail.

    What ended in between, over the time between the two. Raises ValueError where that leaves nothing.
    """
    answered = sorted((sample for sample in result.samples if sample.error is None), key=lambda one: one.end_s)
    inside = answered[left_out : len(answered) - left_out]
    if not inside:
        raise ValueError(f"{len(answered)} answers, and {left_out} are left out at either end")
    begin_s = answered[left_out - 1].end_s if left_out else 0.0
    return summarise_load(inside, inside[-1].end_s - begin_s, result.device)


def _token_gaps(sample: RequestSample) -> list[float]:
    gaps: list[float] = []
    for before, now, tokens in zip(sample.delta_s, sample.delta_s[1:], sample.delta_tokens[1:], strict=False):
        gaps += [(now - before) / tokens] * tokens
    return gaps


def is_simulated(device: str) -> bool:
    """Whether what a server says of its device means that it computes nothing."""
    return device.startswith("simulated:")


def result_table(result: LoadResult) -> str:
    """The figures as text, latencies in milliseconds."""
    rows = [
        ("time to first token", result.time_to_first_token_s),
        ("inter-token", result.inter_token_s),
        ("end to end", result.end_to_end_s),
        ("sent too late by", result.send_lag_s),
    ]
    lines = [f"SIMULATION of {result.device.partition(':')[2]}"] if is_simulated(result.device) else []
    lines += [f"{'latency, ms':22}" + "".join(f"{name:>10}" for name in ("p50", "p90", "p99", "max"))]
    for name, s in rows:
        figures = [f"{value * 1e3:.2f}" for value in (s.p50, s.p90, s.p99, s.max)] if s.count else ["-"] * 4
        lines.append(f"{name:22}" + "".join(f"{figure:>10}" for figure in figures))
    lines.append(
        f"{result.answered} answered in {result.elapsed_s:.2f} s: {result.requests_per_s:,.1f} requests/s, "
        f"{result.output_tokens_per_s:,.0f} output tokens/s"
    )
    lines += [f"{count} failed: {error}" for error, count in sorted(result.errors.items())]
    return "\n".join(lines)
