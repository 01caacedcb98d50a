"""A cell's figures, from what the clients saw."""

from __future__ import annotations

import msgspec

from cierzo.bench.headline.cells import Cell
from cierzo.bench.latency import LoadResult, RequestSample, steady_load
from cierzo.bench.load import LoadSettings
from cierzo.bench.stats import Summary, summarise
from cierzo.engine.cost.step_model import StepTotals

WHOLE_BELOW_TOKENS = 100_000  # of a load whose single tokens are kept


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """A step on average, in one engine: sequences in it, experts of a layer that had tokens (0 in a dense
    model), bytes and operations. limit_requests_per_s: of all replicas, at the device's full rates."""

    running: float
    distinct_experts: float
    num_bytes: float
    operations: float
    limit_requests_per_s: float


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A closed loop of `concurrency` clients in all, divided between `replicas` engines of equal load.

    requests_per_s: steady, of `steady`; plain: all requests over all the time. Latencies are those of the requests
    that end in the steady time where throughput is measured, of all where latency is.
    """

    replicas: int = 1
    concurrency: int
    requests: int
    requests_per_s: float
    plain_requests_per_s: float
    output_tokens_per_s: float
    time_to_first_token_s: Summary
    time_per_output_token_s: Summary
    inter_token_s: Summary
    completion_s: Summary
    errors: dict[str, int] = {}
    steps: Steps | None = None

    @property
    def share_of_limit(self) -> float | None:
        """Share of the requests per second that the device's full rates would allow."""
        return None if self.steps is None else self.requests_per_s / self.steps.limit_requests_per_s


def requests_for(concurrency: int) -> int:
    """Number of requests of a closed loop whose middle third is looked at."""
    return max(3 * concurrency, 4)


def closed_loop(cell: Cell, concurrency: int, seed: int) -> LoadSettings:
    """The load of a cell at a concurrency."""
    return LoadSettings(
        rpc="",
        requests=requests_for(concurrency),
        concurrency=concurrency,
        input_tokens=cell.input_tokens,
        output_tokens=cell.output_tokens,
        seed=seed,
    )


def figure(
    result: LoadResult,
    concurrency: int,
    *,
    is_throughput: bool,
    replicas: int = 1,
    totals: StepTotals | None = None,
) -> Figure:
    """concurrency: of one replica, whose load `result` is; totals: of the steps in its steady time."""
    settled = steady_load(result, concurrency)
    looked_at = settled if is_throughput else result
    steps = None
    if totals is not None:
        steps = Steps(
            running=totals.rows / totals.steps,
            distinct_experts=totals.distinct_experts / totals.steps,
            num_bytes=totals.num_bytes / totals.steps,
            operations=totals.operations / totals.steps,
            limit_requests_per_s=replicas * settled.answered / totals.limit_s,
        )
    return Figure(
        replicas=replicas,
        concurrency=replicas * concurrency,
        requests=replicas * len(result.samples),
        requests_per_s=replicas * settled.requests_per_s,
        plain_requests_per_s=replicas * result.requests_per_s,
        output_tokens_per_s=replicas * settled.output_tokens_per_s,
        time_to_first_token_s=looked_at.time_to_first_token_s,
        time_per_output_token_s=summarise([_per_token(one) for one in looked_at.samples if one.error is None]),
        inter_token_s=looked_at.inter_token_s,
        completion_s=looked_at.end_to_end_s,
        errors=result.errors,
        steps=steps,
    )


def _per_token(sample: RequestSample) -> float:
    """Seconds from the first token to the last, divided by the tokens after the first."""
    tokens = sum(sample.delta_tokens) - 1
    return (sample.delta_s[-1] - sample.delta_s[0]) / tokens if tokens > 0 else 0.0


def thinned(samples: list[RequestSample]) -> list[RequestSample]:
    """The samples of a load that are kept: all of a small one, else the first and the last token's times."""
    if sum(sum(one.delta_tokens) for one in samples) < WHOLE_BELOW_TOKENS:
        return samples
    return [_ends(one) if len(one.delta_s) > 2 else one for one in samples]


def _ends(sample: RequestSample) -> RequestSample:
    first = sample.delta_tokens[0]
    return msgspec.structs.replace(
        sample,
        delta_s=[sample.delta_s[0], sample.delta_s[-1]],
        delta_tokens=[first, sum(sample.delta_tokens) - first],
    )
