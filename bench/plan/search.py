"""From a checkpoint, devices and a workload to a plan: what fits, what comes out, and what would help most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cierzo.bench.plan.forecast import Forecast, forecast
from cierzo.bench.report import Report
from cierzo.bench.workload import Workload
from cierzo.engine.config import KV_BYTE_FORMAT, EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.cards import find_device
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.step_model import StepModel
from cierzo.engine.cost.weights import tower_bytes, weight_bytes
from cierzo.engine.cost.work import measured_distinct
from cierzo.engine.device_memory import images_bytes
from cierzo.engine.errors import ConfigError
from cierzo.engine.expert_statistics import ExpertStatistics
from cierzo.kernels.formats.number_formats import ACTIVATION_FORMATS, formats_on

Limit = Annotated[float, Meta(gt=0)] | None
Statistic = Literal["mean", "p50", "p99"]
FINENESS = 1.02  # the search within limits ends where a load this much higher breaks one


class LatencyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies that a plan must keep, milliseconds, on average or at a percentile; None: any will do."""

    max_ttft_ms: Annotated[
        Limit, Meta(description="find the highest load whose first tokens keep this; a trace must keep it")
    ] = None
    max_inter_token_ms: Annotated[Limit, Meta(description="the same for the time between two tokens")] = None
    statistic: Annotated[Statistic, Meta(description="of these times that must keep it")] = "p99"

    @property
    def given(self) -> bool:
        """Whether there is a limit to keep."""
        return self.max_ttft_ms is not None or self.max_inter_token_ms is not None

    def broken(self, found: Forecast) -> str | None:
        """The limit that a forecast does not keep, with the numbers."""
        if not found.keeps_up:
            return "requests come faster than they end"
        latencies = (
            ("time to first token", self.max_ttft_ms, found.time_to_first_token_s),
            ("inter-token time", self.max_inter_token_ms, found.inter_token_s),
        )
        for name, limit_ms, latency in latencies:
            took_ms = getattr(latency, self.statistic) * 1e3
            if limit_ms is not None and took_ms > limit_ms:
                return f"{name} {self.statistic} {took_ms:,.0f} ms, limit {limit_ms:,.0f} ms"
        return None


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A setting or a device changed, and what that brings. gain: the factor of requests/s in a closed loop and
    within limits, else that by which the median completion time falls. refused: why it cannot be made."""

    what: str
    gain: float = 0.0
    requests_per_s: float = 0.0
    completion_p50_s: float = 0.0
    refused: str = ""


class DevicePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan for one device. tower_gb: of the weights, the vision tower's; image_gb: of images' embeddings that
    are kept, and of pixels on their way. refused: why the workload cannot run on it; then there is no forecast."""

    device: str
    shares: str  # measured, predicted or stated
    weights: str
    kv_dtype: str
    weight_gb: float = 0.0
    tower_gb: float = 0.0
    image_gb: float = 0.0
    memory_gb: float = 0.0
    kv_gb: float = 0.0
    kv_tokens: int = 0
    workload: str = ""
    forecast: Forecast | None = None
    changes: tuple[Change, ...] = ()
    refused: str = ""


@dataclass
class Planner:
    """Plans of one checkpoint and one workload, for one device at a time. experts: chosen by real traffic.
    calibrated: this machine's CPU, for the device "cpu"."""

    options: EngineOptions
    workload: Workload
    limits: LatencyLimits
    experts: ExpertStatistics | None = None
    calibrated: Device | None = None

    def __post_init__(self) -> None:
        self._distinct = None if self.experts is None else measured_distinct(self.experts)

    def plan(self, name: str, *, changes: bool = True) -> DevicePlan:
        """Plan for the device of this name. Raises ConfigError for an unknown one."""
        device = self.calibrated if name == "cpu" else find_device(name)
        assert device is not None
        given = self.options
        plan = DevicePlan(device=name, shares=device.shares, weights=given.weights, kv_dtype=given.kv_dtype)
        try:
            config = self._config(name, given)
            plan = msgspec.structs.replace(plan, weights=config.weights, kv_dtype=config.layout.dtype)
            found, workload = self._best(config)
        except ConfigError as error:
            return msgspec.structs.replace(plan, refused=error.message)
        formats = StepModel(config, device).formats
        return msgspec.structs.replace(
            plan,
            weight_gb=weight_bytes(config.model, formats) / 1e9,
            tower_gb=tower_bytes(config.model, formats) / 1e9,
            image_gb=images_bytes(config.model, config.scheduler.image_cache_tokens) / 1e9,
            memory_gb=device.cards * device.memory_bytes / 1e9,
            kv_gb=config.cache.num_blocks * config.layout.bytes_per_block / 1e9,
            kv_tokens=config.cache.num_blocks * config.layout.block_tokens,
            workload=str(workload),
            forecast=found,
            changes=tuple(self._changes(name, config, found)) if changes else (),
        )

    def at(self, name: str, workload: Workload) -> Forecast:
        """Forecast another workload, whatever the limits."""
        return self._forecast(self._config(name, self.options), workload)

    def _config(self, name: str, options: EngineOptions) -> EngineConfig:
        """The engine's configuration on a device. Raises ConfigError where the engine would not start."""
        config = resolve(msgspec.structs.replace(options, device=name if name == "cpu" else f"simulated:{name}"))
        if self.experts is not None:
            moe, layers = config.model.moe, config.model.num_layers
            ours = (layers - moe.first_dense_layers, moe.num_experts, moe.experts_per_token) if moe else (0, 0, 0)
            theirs = (len(self.experts.layers), self.experts.num_experts, self.experts.top_k)
            if ours != theirs:
                found, limit = ("{} layers of {} experts, {} a token".format(*one) for one in (theirs, ours))
                told = f"expert statistics of {found}; {config.name} has {limit}"
                raise ConfigError(told, field="experts", limit=limit, value=found)
        return config

    def _forecast(self, config: EngineConfig, workload: Workload) -> Forecast:
        return forecast(config, workload, device=config.card or self.calibrated, distinct=self._distinct)

    def _best(self, config: EngineConfig) -> tuple[Forecast, Workload]:
        """Forecast the workload as it is, or the highest load that keeps the limits; a trace is one load."""
        given, limits, rate = self.workload, self.limits, self.workload.rate
        if not limits.given:
            return self._forecast(config, given), given
        found: dict[float, tuple[Forecast, Workload]] = {}

        def keeps(size: float) -> bool:
            load = {"concurrency": int(size)} if rate is None else {"rate": size}
            workload = given if given.trace else msgspec.structs.replace(given, **load)
            found[size] = self._forecast(config, workload), workload
            return limits.broken(found[size][0]) is None

        clients = (config.scheduler.max_waiting, config.frontend.max_open_samples, 4 * config.scheduler.max_running)
        low, most = (1, min(clients)) if rate is None else (rate / 1024, rate * 1024)
        best = highest(keeps, low, low if given.trace else most, FINENESS, whole=rate is None)
        if best is None:
            broken = limits.broken(found[low][0])
            raise ConfigError(f"workload {found[low][1]}: {broken}", field="max_ttft_ms", value=broken)
        return found[best]

    def _changes(self, name: str, config: EngineConfig, found: Forecast) -> list[Change]:
        """Forecast each change alone, the one that helps most first; changes that cannot be made come last."""
        by_rate = self.workload.concurrency is not None or (self.limits.given and not self.workload.trace)
        changes = []
        for what, other, settings in self._candidates(name, config):
            options = msgspec.structs.replace(self.options, **settings)
            try:
                changed, _ = self._best(self._config(other, options))
            except ConfigError as error:
                changes.append(Change(what=what, refused=error.message))
                continue
            rate, completion_s = changed.requests_per_s, changed.completion_s.p50
            gain = rate / found.requests_per_s if by_rate else found.completion_s.p50 / completion_s
            changes.append(Change(what=what, gain=gain, requests_per_s=rate, completion_p50_s=completion_s))
        return sorted(changes, key=lambda change: -change.gain)

    def _candidates(self, name: str, config: EngineConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Changes as (words, device, settings). On a CPU the weights stay: its shares were measured with them."""
        kind, limits = config.card.kind if config.card else "cpu", config.scheduler
        if kind == "cuda":
            for setting, formats in (("weights", formats_on(kind)), ("activations", ("bf16", *ACTIVATION_FORMATS))):
                others = (one for one in formats if one != getattr(config, setting))
                yield from ((f"{setting} {one}", name, {setting: one}) for one in others)
            yield from ((f"device {other}", other, {}) for other in other_cards(name))
        pages = KV_BYTE_FORMAT[kind]
        other_pages = "bf16" if config.layout.dtype == pages else pages
        yield f"KV cache {other_pages}", name, {"kv_dtype": other_pages}
        for what, factor in (("twice the step", 2.0), ("half the step", 0.5)):
            budget = max(limits.max_running, int(limits.budget_tokens * factor))
            chunk = max(1, int(limits.max_chunk_tokens * factor))
            sizes = {"budget_tokens": budget, "max_chunk_tokens": chunk}
            yield f"{what}: {budget:,} tokens, chunks of {chunk:,}", name, sizes
        running = 2 * limits.max_running
        more = {"max_running": running, "budget_tokens": max(running, limits.budget_tokens)}
        yield f"max_running {running:,}", name, more


def highest(
    keeps: Callable[[float], bool], low: float, most: float, near: float, *, whole: bool = True
) -> float | None:
    """Find the highest load that keeps a limit, to within a factor `near`: doubled from `low` on until `most` or
    until one does not keep it, then bisected; of whole numbers, or of any. None where `low` does not keep it."""
    if not keeps(low):
        return None
    high = math.inf
    while low < most and high > low * near and not (whole and high - low == 1):
        if high == math.inf:
            size = min(2 * low, most)
        else:
            size = (low + high) // 2 if whole else (low * high) ** 0.5
        low, high = (size, high) if keeps(size) else (low, size)
    return low


def read_experts(path: Path) -> ExpertStatistics:
    """Read which experts real traffic chose, from a report of `cierzo bench experts`. Raises ConfigError for any
    other file."""
    try:
        statistics = msgspec.convert(msgspec.json.decode(path.read_bytes(), type=Report).results, ExpertStatistics)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"expert statistics {path}: {error}", field="experts", value=path) from error
    if not statistics.tokens:
        raise ConfigError(f"expert statistics {path}: nothing was counted", field="experts", value=path)
    return statistics


def other_cards(name: str) -> list[str]:
    """Names of the next card in the same number, and of twice the cards; none for a device without a data sheet."""
    count, _, card = name.rpartition("x")
    if card not in DATA_SHEETS:
        return []
    names, number = list(DATA_SHEETS), int(count or 1)
    following = names[names.index(card) + 1 : names.index(card) + 2]
    return [*(f"{number}x{other}" if number > 1 else other for other in following), f"{2 * number}x{card}"]
