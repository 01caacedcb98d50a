"""Metrics for Prometheus, made of the front end's own numbers when they are asked for.

Nothing of prometheus_client is touched while requests are served. Names of vLLM are told beside ours where they
mean the same, with its label `model_name`. docs/operations.md, "What to watch", has each name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from cierzo import __version__
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.observe.tallies import BOUNDS_S, Histogram

Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]
STATES = ("loading", "ready", "stalled", "draining", "failed")
# Ends of requests in vLLM's words; all else is an error, or was refused, which it does not count.
VLLM_ENDS = {"stop": "stop", "tool_calls": "stop", "length": "length", "cancelled": "abort", "deadline": "abort"}
# Sums of cost records by tenant: field of `TenantTally`, name, help.
COSTS = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens of requests that have ended."),
    ("cached_tokens", "cached_tokens", "Prompt tokens of ended requests that came from the prefix cache."),
    ("output_tokens", "output_tokens", "Tokens that were generated for requests that have ended."),
    ("computed_tokens", "computed_tokens", "Rows of steps that ended requests took."),
    ("recomputed_tokens", "recomputed_tokens", "Rows that computed tokens for the second time."),
    ("steps", "sequence_steps", "Steps that had a row of an ended request, by sample."),
    ("preemptions", "preemptions", "Preemptions of requests that have ended."),
    ("kv_block_s", "kv_block_seconds", "Blocks of the KV cache that ended requests held, times seconds."),
)
BUCKETS = (*(f"{bound:g}" for bound in BOUNDS_S), "+Inf")


class Collector:
    """Collector of prometheus_client over a front end; `collect` is called on the front end's loop."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def collect(self) -> Iterator[Metric]:
        """Give all families."""
        self._frontend.core.pace.enter()
        yield from self._server()
        yield from self._core()
        yield from self._requests()
        yield from self._tenants()
        yield from self._records()

    def _server(self) -> Iterator[Metric]:
        frontend, model = self._frontend, self._frontend.model
        labels = {"version": __version__, "model_name": model.name, "device": model.device}
        yield _by(GaugeMetricFamily, "cierzo_server_info", "The server and its model; always 1.", labels, [1])
        states = [(state, float(frontend.health == state)) for state in STATES]
        yield _labelled(GaugeMetricFamily, "cierzo_state", "1 for the state that health tells.", "state", states)
        for name, text, value in (
            ("uptime_seconds", "Seconds since the front end started.", frontend.uptime_s),
            ("connections", "Connections that said hello.", frontend.streams.num_sinks),
            ("open_samples", "Answers in progress, waiting ones included.", frontend.streams.num_samples),
            ("open_tokens", "Prompt and resumed tokens of open requests.", frontend.streams.num_tokens),
            ("answer_heap_bytes", "Heap of all open answers.", frontend.heap.num_bytes),
            (
                "kept_answer_bytes",
                "Heap of ended answers that can be resumed.",
                frontend.keeper.kept_bytes,
            ),
        ):
            yield GaugeMetricFamily(f"cierzo_{name}", text, value)
        yield CounterMetricFamily("cierzo_core_restarts", "Cores that died or hung.", frontend.core.num_restarts)
        expires_s = frontend.observer.certificate_expires_s()
        if expires_s is not None:
            text = "Unix time at which the server's certificate expires."
            yield GaugeMetricFamily("cierzo_certificate_expiry_timestamp_seconds", text, expires_s)

    def _core(self) -> Iterator[Metric]:
        stats, past = self._frontend.core.stats, self._frontend.core.past
        text = "Sequences that are computed."
        yield from self._both(
            GaugeMetricFamily, "cierzo_sequences_running", "num_requests_running", text, stats.running
        )
        text = "Sequences that wait for a place in the batch."
        yield from self._both(
            GaugeMetricFamily, "cierzo_sequences_waiting", "num_requests_waiting", text, stats.waiting
        )
        text = "Known tokens that are not computed yet."
        yield GaugeMetricFamily("cierzo_waiting_tokens", text, stats.waiting_tokens)
        text = "Duration of a step: an average over the latest ones."
        yield GaugeMetricFamily("cierzo_step_seconds", text, stats.step_s)
        in_use = stats.total_blocks - stats.free_blocks
        blank = stats.free_blocks - stats.cached_blocks  # what can be taken is blank, or holds a prefix
        blocks = [("blank", blank), ("cached", stats.cached_blocks), ("used", in_use)]
        text = "Blocks of the KV cache: blank, free but with a prefix that may be found, and held by sequences."
        yield _labelled(GaugeMetricFamily, "cierzo_kv_blocks", text, "state", blocks)
        text = "Share of the KV cache that sequences hold."
        usage = in_use / stats.total_blocks if stats.total_blocks else 0.0
        yield from self._both(GaugeMetricFamily, "cierzo_kv_cache_usage_ratio", "kv_cache_usage_perc", text, usage)
        for field, name, theirs, text in COUNTS:
            value = getattr(stats, field) + getattr(past, field)
            if theirs:
                yield from self._both(CounterMetricFamily, f"cierzo_{name}", theirs, text, value)
            else:
                yield CounterMetricFamily(f"cierzo_{name}", text, value)

    def _requests(self) -> Iterator[Metric]:
        frontend, observer = self._frontend, self._frontend.observer
        yield CounterMetricFamily("cierzo_accepted", "Requests that were accepted.", frontend.counters.accepted)
        counts = frontend.grammars.counts
        outcomes = [("compiled", counts.compiled), ("known", counts.known), ("refused", counts.refused)]
        text = "Requests with a grammar: compiled for it, known from before, or refused."
        yield _labelled(CounterMetricFamily, "cierzo_grammars", text, "outcome", outcomes)
        text = "Requests that were refused: error code, the limit that was met, and whether it is the tenant's own."
        refused = CounterMetricFamily("cierzo_refused", text, labels=["code", "limit", "whose"])
        for labels, count in observer.refusals.items():
            refused.add_metric(labels, count)
        yield refused
        ends = CounterMetricFamily("cierzo_requests", "Requests that ended, and how.", labels=["tenant", "end"])
        theirs: Counter[str] = Counter(dict.fromkeys(("stop", "length", "abort"), 0))
        theirs["error"] = -sum(observer.refusals.values())
        for tenant, tally in observer.tenants.items():
            for end, count in tally.ends.items():
                ends.add_metric([tenant, end], count)
                theirs[VLLM_ENDS.get(end, "error")] += count
        yield ends
        text = "Requests that ended, without those that were refused."
        success = CounterMetricFamily("vllm:request_success", text, labels=["model_name", "finished_reason"])
        for reason, count in theirs.items():
            success.add_metric([frontend.model.name, reason], count)
        yield success
        text = "Time between tokens of a sample, as the front end gets them."
        yield from self._latency("inter_token_latency_seconds", text, {"": frontend.core.pace.gaps}, [])
        text = "Time from a request's arrival to its first token."
        by_tenant = {tenant: tally.first_tokens for tenant, tally in observer.tenants.items()}
        yield from self._latency("time_to_first_token_seconds", text, by_tenant, ["tenant"])

    def _tenants(self) -> Iterator[Metric]:
        tallies = self._frontend.observer.tenants
        open_requests = Counter(dict.fromkeys(tallies, 0))
        open_requests.update(self._frontend.observer.label(stream.tenant.name) for stream in self._frontend.streams)
        text = "Open requests."
        yield _labelled(GaugeMetricFamily, "cierzo_open_requests", text, "tenant", open_requests.items())
        for field, name, text in COSTS:
            values = [(tenant, getattr(tally, field)) for tenant, tally in tallies.items()]
            yield _labelled(CounterMetricFamily, f"cierzo_tenant_{name}", text, "tenant", values)

    def _records(self) -> Iterator[Metric]:
        observer = self._frontend.observer
        usage = observer.usage
        if usage is not None:
            text = "Cost records that were written."
            yield CounterMetricFamily("cierzo_usage_records", text, usage.num_written)
            text = "Cost records that could not be written, and are lost."
            yield CounterMetricFamily("cierzo_usage_records_lost", text, usage.num_lost)
            text = "1 while cost records cannot be written."
            yield GaugeMetricFamily("cierzo_usage_failing", text, float(usage.why_not() is not None))
        text = "Lines of the log that were lost because nobody took them."
        yield CounterMetricFamily("cierzo_log_lines_lost", text, observer.num_lost_lines())

    def _both(self, kind: Kind, name: str, theirs: str, text: str, value: float) -> Iterator[Metric]:
        """A number under our name, and under vLLM's."""
        yield _by(kind, name, text, {}, [value])
        yield _by(kind, f"vllm:{theirs}", text, {"model_name": self._frontend.model.name}, [value])

    def _latency(
        self, name: str, text: str, histograms: dict[str, Histogram], labels: list[str]
    ) -> Iterator[Metric]:
        """Histograms by our label, and their sum under vLLM's name."""
        ours = HistogramMetricFamily(f"cierzo_{name}", text, labels=labels)
        for label, each in histograms.items():
            ours.add_metric([label] * len(labels), _buckets(each.counts), each.sum_s)
        yield ours
        theirs = HistogramMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        counts = [sum(column) for column in zip(*(each.counts for each in histograms.values()), strict=True)]
        total_s = sum(each.sum_s for each in histograms.values())
        theirs.add_metric([self._frontend.model.name], _buckets(counts), total_s)
        yield theirs


# Counters of cores: field of `CoreStats`, our name, vLLM's, help.
COUNTS = (
    ("steps", "steps", "", "Steps."),
    ("finished", "sequences_finished", "", "Sequences that ended in a core."),
    ("prompt_tokens", "prompt_tokens", "prompt_tokens", "Prompt tokens of sequences that were admitted."),
    ("output_tokens", "generation_tokens", "generation_tokens", "Tokens that were generated."),
    ("prompt_tokens", "prefix_cache_query_tokens", "prefix_cache_queries", "Tokens looked up in the prefix cache."),
    ("cached_tokens", "prefix_cache_hit_tokens", "prefix_cache_hits", "Tokens found in the prefix cache."),
    ("preemptions", "preemptions", "num_preemptions", "Sequences that gave their blocks back to wait again."),
    ("computed_tokens", "computed_tokens", "", "Rows of steps, of sequences that have ended."),
    ("recomputed_tokens", "recomputed_tokens", "", "Rows that computed a token for the second time."),
)


def _by(kind: Kind, name: str, text: str, labels: dict[str, str], values: list[float]) -> Metric:
    family = kind(name, text, labels=[*labels])
    for value in values:
        family.add_metric([*labels.values()], value)
    return family


def _labelled(kind: Kind, name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    """A family with one label."""
    family = kind(name, text, labels=[label])
    for value_of_label, value in values:
        family.add_metric([value_of_label], value)
    return family


def _buckets(counts: list[int]) -> list[tuple[str, int]]:
    return [*zip(BUCKETS, accumulate(counts), strict=True)]
