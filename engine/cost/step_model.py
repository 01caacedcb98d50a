"""Seconds of steps on a device: one operation after another, each at the share of its limit that it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cierzo.engine.cost.device import Device, Number
from cierzo.engine.cost.launched import launched_work
from cierzo.engine.cost.operations import Work, random_distinct
from cierzo.engine.cost.roofs import IN_FLIGHT, LAUNCHES, MEMORY
from cierzo.engine.cost.weights import NumberFormats
from cierzo.engine.cost.work import Distinct, StepShape, step_work, tower_work
from cierzo.engine.errors import refusal

if TYPE_CHECKING:
    from cierzo.engine.config import EngineConfig  # which finds the device of a plan here, at import

FloatArray = NDArray[np.float64]
ARITHMETIC = "arithmetic"  # the roof of products whose share was stated or measured: which one, nobody knows
WAITS = (MEMORY, IN_FLIGHT)


def at_least_0(features: FloatArray) -> list[float]:
    """Coefficients of least squares for sums of 1, those that came out negative left out."""
    used = np.ones(features.shape[1], bool)
    while True:
        found = np.zeros(features.shape[1])
        found[used] = np.linalg.lstsq(features[:, used], np.ones(len(features)), rcond=None)[0]
        if (found >= 0).all():
            return [float(one) for one in found]
        used &= found > 0


class StepTotals(msgspec.Struct, kw_only=True):
    """Totals over the operations of a step, of several steps as arrays [S], or of a run as sums over its steps.

    rows: sequences. distinct_experts: those that had tokens, in a layer on average. num_bytes, operations: on all
    cards together. memory_s: of operations that wait for memory; overhead_s: of those that are hardly more than
    their launches, and beside all operations; arithmetic_s: of the others. limit_s: the least that any kernels
    could take, for all bytes or all operations at the device's rates. roofs_s: of operations, by the roof that
    limits them and by name ("issue of expert_mlp nvfp4").
    """

    steps: Any = 0
    rows: Any = 0.0
    tokens: Any = 0.0
    distinct_experts: Any = 0.0
    num_bytes: Any = 0.0
    operations: Any = 0.0
    memory_s: Any = 0.0
    arithmetic_s: Any = 0.0
    exchange_s: Any = 0.0
    overhead_s: Any = 0.0
    limit_s: Any = 0.0
    roofs_s: dict[str, Any] = {}

    @property
    def total_s(self) -> Any:
        """Seconds of whole steps."""
        return self.memory_s + self.arithmetic_s + self.exchange_s + self.overhead_s

    @property
    def roof(self) -> str:
        """The roof and operation that take most of the time, and their part: "issue of expert_mlp nvfp4, 61%"."""
        if not self.roofs_s:
            return "-"
        name = max(self.roofs_s, key=lambda one: float(self.roofs_s[one]))
        return f"{name}, {self.roofs_s[name] / self.total_s:.0%}"

    def add(self, found: StepTotals, chosen: Any = True) -> StepTotals:
        """Add the sums over steps, or over the `chosen` of them, bool [S]; return this."""
        shape = np.shape(found.rows)

        def added(before: Any, each: Any) -> Any:
            return before + (np.broadcast_to(each, shape) * chosen).sum().item()

        for name in self.__struct_fields__[:-1]:
            setattr(self, name, added(getattr(self, name), getattr(found, name)))
        more = {name: added(self.roofs_s.get(name, 0.0), each) for name, each in found.roofs_s.items()}
        self.roofs_s = self.roofs_s | more
        return self

    def since(self, begin: StepTotals) -> StepTotals:
        """The sums of the steps after those of `begin`."""
        found = {name: getattr(self, name) - getattr(begin, name) for name in self.__struct_fields__[:-1]}
        roofs_s = {name: seconds - begin.roofs_s.get(name, 0.0) for name, seconds in self.roofs_s.items()}
        return StepTotals(**found, roofs_s=roofs_s)


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of an operation's calls: for their bytes and for their arithmetic at the device's rates; those that
    they take, by the roof that limits them; and how many kernels they launch."""

    bytes_s: Any
    operations_s: Any
    roofs_s: dict[str, Any]
    launches: Any = 0.0

    @property
    def limit_s(self) -> Any:
        """The least that the calls could take."""
        return np.maximum(self.bytes_s, self.operations_s)


def price(device: Device, work: Work) -> Price:
    """Price an operation: by what is predicted of it, or its measured share, or the stated one of its kind. Raises
    ConfigError for a device that has none of them."""
    bytes_s, operations_s = _least_s(device, work)
    limit_s = np.maximum(bytes_s, operations_s)
    call_s = limit_s / work.calls
    launches: Number = 0.0
    if (curve := device.curve(work.operation, work.format, work.width)) is not None:
        took_s = work.calls * np.where(limit_s > 0, curve.seconds_of(call_s), 0.0)
        places, place = np.log(curve.limits_s), np.log(np.maximum(call_s, curve.limits_s[0]))
        nearest = np.searchsorted((places[1:] + places[:-1]) / 2, place)
        roofs_s = {}
        for name in dict.fromkeys(curve.roofs):
            under = [at for at, one in enumerate(curve.roofs) if one == name]
            roofs_s[name] = np.where(np.isin(nearest, under), took_s, 0.0)
        launches = work.calls * (limit_s > 0) * np.interp(place, places, curve.launches)
    elif (share := device.measured_share(work.operation, work.format, call_s)) is not None:
        roofs_s = _either(bytes_s >= operations_s, limit_s / share)
    elif not device.stated:
        raise refusal(
            "device", f"one with a prediction or a stated share of {work.operation} {work.format}", device.name
        )
    else:
        stated = bytes_s / device.stated["memory"], operations_s / device.stated[work.kind]
        roofs_s = _either(stated[0] >= stated[1], np.maximum(*stated))
    return Price(bytes_s=bytes_s, operations_s=operations_s, roofs_s=roofs_s, launches=launches)


def _least_s(device: Device, work: Work) -> tuple[Any, Any]:
    """Seconds for an operation's bytes, and for its arithmetic, at the device's rates."""
    mine = (work.num_bytes - work.replicated_bytes) / device.cards + work.replicated_bytes  # of one card
    return mine / device.bytes_per_s, work.operations / device.cards / device.operations_per_s[work.rate]


def _either(waits: Any, took_s: Any) -> dict[str, Any]:
    return {MEMORY: np.where(waits, took_s, 0.0), ARITHMETIC: np.where(waits, 0.0, took_s)}


def step_time(
    device: Device,
    works: Sequence[Work],
    *,
    rows: Number,
    exchanged_bytes: Number = 0.0,
    launches: Sequence[Work] = (),
    launched: Any = False,
) -> StepTotals:
    """Price a step. rows: its sequences. exchanged_bytes: what one of several cards sends. launches: the operations
    as a GPU launches them, which are then priced in place of `works`. launched: whether the host launches the
    step's kernels, which are else replayed; it does so while the device computes, and counts where the device has
    to wait for it."""
    priced = [(work, price(device, work)) for work in launches or works]
    parts = [(roof, work, each) for work, one in priced for roof, each in one.roofs_s.items()]
    took_s = sum(each for *_, each in parts)
    memory_s = sum(each for roof, _, each in parts if roof in WAITS)
    launches_s = sum(each for roof, _, each in parts if roof == LAUNCHES)
    host_s = sum(one.launches for _, one in priced) * device.launch_s * launched
    bytes_s, operations_s = zip(*(_least_s(device, work) for work in works), strict=True)
    beyond_s = launches_s + np.maximum(host_s - took_s, 0.0)
    return StepTotals(
        steps=np.ones_like(rows, dtype=np.int64),
        rows=rows,
        num_bytes=sum(work.num_bytes + (device.cards - 1) * work.replicated_bytes for work in works),
        operations=sum(work.operations for work in works),
        memory_s=memory_s,
        arithmetic_s=sum(each for roof, _, each in parts if roof not in (*WAITS, LAUNCHES)),
        exchange_s=exchanged_bytes / device.link_bytes_per_s if device.cards > 1 else 0.0,
        overhead_s=beyond_s + device.step_overhead_s + device.row_overhead_s * rows,
        limit_s=np.maximum(sum(bytes_s), sum(operations_s)),
        roofs_s={f"{roof} of {work.operation} {work.format}": each for roof, work, each in parts},
    )


class StepModel:
    """Prices the steps of a configuration on a device."""

    def __init__(self, config: EngineConfig, device: Device, distinct: Distinct | None = None) -> None:
        """distinct: of a model with experts, as measured; by default as if tokens chose at random.

        Raises ConfigError for a device that lacks the price of an operation.
        """
        plain = "bf16" if config.dtype == "bfloat16" else config.dtype
        on_gpu, activations = device.kind == "cuda", config.activations
        self.formats = NumberFormats(
            weights=config.weights, plain=plain, activations=activations, on_gpu=on_gpu, head=config.head
        )
        self.device = device
        self._distinct = distinct
        if distinct is None and (moe := config.model.moe) is not None:
            self._distinct = partial(random_distinct, moe.num_experts, moe.experts_per_token)
        self._model, self._layout = config.model, config.layout
        self._replayed = config.graph_sequences
        for generated in (False, True):
            self.time(StepShape.of([(0, 1)], generated=generated), 1.0)

    def work(self, step: StepShape) -> list[Work]:
        """List the operations of a step."""
        return step_work(self._model, self._layout, self.formats, step, self._distinct)

    def launches(self, step: StepShape) -> list[Work]:
        """List the operations of a step as a GPU launches them."""
        return launched_work(self._model, self._layout, self.formats, step, self._distinct)

    def time(self, step: StepShape, rows: Number) -> StepTotals:
        """Price a step of so many sequences; arrays stand for several steps. Twice a layer each card sends the
        hidden states (bf16) of the other cards' rows."""
        hidden_bytes, cards = 2 * self._model.hidden_size, self.device.cards
        sent = 2 * self._model.num_layers * step.tokens * hidden_bytes * (cards - 1) / cards
        found = step_time(
            self.device,
            self.work(step),
            rows=rows,
            exchanged_bytes=sent,
            launches=self.launches(step) if self.device.predicted else (),
            launched=(np.asarray(step.expanded_tokens) > 0) | (np.asarray(rows) > self._replayed),
        )
        embedding_s, pair_s = self.image_prices
        images_s = step.embeddings * embedding_s + step.embedding_pairs * pair_s
        found.arithmetic_s = found.arithmetic_s + images_s
        if embedding_s:
            found.roofs_s[f"{ARITHMETIC} of vision tower {self.formats.plain}"] = images_s
        found.tokens = step.tokens
        found.distinct_experts = self._distinct(step.tokens) if self._distinct else 0.0
        return found

    @cached_property
    def image_prices(self) -> tuple[float, float]:
        """Seconds of a token of an image, and of a pair of its tokens: nearest to `image_s` in relative terms, over
        images of many sizes."""
        vision = self._model.vision
        if vision is None:
            return 0.0, 0.0
        sides = np.linspace(1, vision.max_side_px // vision.unit_px, 12).astype(int)
        embeddings = sides.astype(np.float64) ** 2
        seconds = np.array([self.image_s(int(each)) for each in embeddings])
        one, pair = at_least_0(np.stack([embeddings, embeddings**2], 1) / seconds[:, None])
        return one, pair

    def image_s(self, embeddings: int) -> float:
        """Price the vision tower's work on an image of so many embeddings."""
        works = tower_work(self._model, self.formats, embeddings)
        if self.device.predicted:  # as the launches of steps are
            works = [replace(work, operation="linear_in") for work in works]
        return float(sum(sum(price(self.device, work).roofs_s.values()) for work in works))
