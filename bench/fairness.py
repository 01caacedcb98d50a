"""`cierzo bench fairness`: what a tenant that floods the engine takes from the others, and what fairness costs.

The real core, a step at a time, on a fake runner, on a simulated card in virtual time, or on a model. Three
questions: what the others are served beside a tenant that asks for ten times its share; how many steps a modest one
waits for its first token beside that flood, and how many alone; and what all are served together, beside what they
are served as one tenant, first come first served. Service is counted from outside, by what comes back: a generated
token counts for two, and those of a prompt count once its first answer is there.

The modest tenant asks for half of its share, at random moments. What it asks for at once must fit into its share of
slots, and a prompt into that of a step, else it waits for itself.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cierzo.bench.campaign.table import grid_of, text
from cierzo.bench.report import Recording
from cierzo.cache.config import CacheConfig
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.messages import SamplingParams, Submit, TokenDelta
from cierzo.engine.options import add_options, chosen
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import fake_config
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.policy import GENERATED_CHARGE

FLOOD = 10  # times its share: what the tenant that floods keeps asking for
LEAST_KEPT = 0.9  # of its share, by each other tenant
MOST_STEPS_LATER = 2  # the modest tenant's first token, at the 99th percentile
LEAST_TOTAL = 0.97  # of first come, first served
Number = Annotated[int, Meta(ge=1, le=1 << 20)]


class FairnessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings. Prompts and answers have half to one and a half of the given lengths, by chance."""

    model: Annotated[str, Meta(description="fake, or as of `cierzo serve`")] = "fake"
    device: Annotated[str, Meta(description="as of `cierzo serve`, such as simulated:h200")] = "cpu"
    weights: Annotated[
        Literal["auto", "bf16", "fp8", "int8", "int4", "nvfp4"], Meta(description="number format of the weights")
    ] = "auto"
    tenants: Annotated[Number, Meta(description="tenants, one of which floods")] = 4
    max_running: Annotated[Number, Meta(description="sequences that run, at most")] = 128
    input_tokens: Annotated[Number, Meta(description="mean length of a prompt")] = 256
    output_tokens: Annotated[Number, Meta(description="mean length of an answer")] = 32
    steps: Annotated[Number, Meta(description="steps of each run")] = 2000
    pairs: Annotated[Number, Meta(description="runs beside first come, first served; their median counts")] = 1


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """Service of a run by tenant, in prompt tokens, and what it took. waits: of the modest tenant's requests, steps
    to the first token."""

    service: dict[str, float]
    steps: int
    seconds: float
    waits: list[int] = []

    @property
    def rate(self) -> float:
        """Service of all a second."""
        return sum(self.service.values()) / self.seconds


class Fairness(msgspec.Struct, frozen=True, kw_only=True):
    """The answers. kept: of its share, by the tenant that keeps least; total: of first come, first served."""

    kept: float
    wait_alone: int
    wait_beside: int
    total: float

    @property
    def is_fair(self) -> bool:
        """Whether every bound is kept."""
        is_soon = self.wait_beside <= self.wait_alone + MOST_STEPS_LATER
        return self.kept >= LEAST_KEPT and is_soon and self.total >= LEAST_TOTAL


class Machine:
    """A core that computes as the settings say, and a clock for it: of the fake one, steps."""

    def __init__(self, settings: FairnessSettings) -> None:
        self.steps = 0
        longest = 2 * (settings.input_tokens + settings.output_tokens)
        self.seconds: Callable[[], float]
        if settings.model == "fake":
            limits = SchedulerConfig(max_running=settings.max_running, max_model_len=longest, max_waiting=1 << 20)
            blocks = settings.max_running * -(-longest // 16)
            self.core = EngineCore(fake_config(limits, CacheConfig(block_tokens=16, num_blocks=blocks)))
            self.seconds = lambda: float(self.steps)
            self.vocab_size = 32_000
            return
        config = resolve(
            EngineOptions(
                model=settings.model,
                device=settings.device,
                weights=settings.weights,
                max_running=settings.max_running,
                max_model_len=longest,
                max_waiting=1 << 16,
            )
        )
        self.vocab_size = config.model.vocab_size
        if config.runner == "simulated":
            from cierzo.bench.virtual import VirtualClock, VirtualCore  # which bring all of the load client

            clock = VirtualClock()
            self.core, self.seconds = VirtualCore(config, clock), clock
        else:
            self.core, self.seconds = EngineCore(config), time.perf_counter

    def step(self) -> list[TokenDelta]:
        """Take a step."""
        self.steps += 1
        return self.core.step_plain() if self.core.has_work() else []


class Load:
    """Requests of tenants, and what they have been served."""

    def __init__(self, machine: Machine, settings: FairnessSettings, *, apart: bool = True) -> None:
        """apart: whether the core knows whose a request is."""
        self._machine, self._settings, self._apart = machine, settings, apart
        self._draw = random.Random(0)
        self._sent = 0
        self._asked: dict[int, tuple[str, int, int]] = {}  # tenant, tokens of the prompt, step before which it came
        self.open = Counter[str]()
        self.service = Counter[str]()
        self.waits: dict[str, list[int]] = {}

    def send(self, tenant: str) -> None:
        """Send a request."""
        settings, draw = self._settings, self._draw
        num_prompt, max_tokens = self._length(settings.input_tokens), self._length(settings.output_tokens)
        self._sent += 1
        self._asked[self._sent] = tenant, num_prompt, self._machine.steps
        self.open[tenant] += 1
        self._machine.core.submit(
            Submit(
                request_id=self._sent,
                prompt_token_ids=draw.choices(range(self._machine.vocab_size), k=num_prompt),
                sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=self._sent),
                tenant=tenant if self._apart else "",
                cache_salt=tenant.encode(),
            )
        )

    def step(self) -> None:
        """Take a step, and count what comes back."""
        for delta in self._machine.step():
            tenant, num_prompt, came = self._asked[delta.request_id]
            if num_prompt:
                self._asked[delta.request_id] = tenant, 0, came
                self.service[tenant] += num_prompt
                self.waits.setdefault(tenant, []).append(self._machine.steps - came)
            self.service[tenant] += int(GENERATED_CHARGE) * len(delta.token_ids)
            if delta.finish is not None:
                assert delta.finish.reason == "length", delta.finish
                self.open[tenant] -= 1
                del self._asked[delta.request_id]

    def _length(self, mean: int) -> int:
        return self._draw.randint((mean + 1) // 2, mean + mean // 2)


def flood(settings: FairnessSettings, *, apart: bool) -> Served:
    """Let one tenant ask for FLOOD times its share of the slots, and each other for twice its own. The first
    quarter of the steps is not counted."""
    machine = Machine(settings)
    load = Load(machine, settings, apart=apart)
    share = -(-settings.max_running // settings.tenants)
    wanted = {f"tenant {number}": share * (2 if number else FLOOD) for number in range(settings.tenants)}
    before, before_s = load.service.copy(), machine.seconds()
    for step in range(settings.steps):
        for tenant, count in wanted.items():
            while load.open[tenant] < count:
                load.send(tenant)
        load.step()
        if step == settings.steps // 4:
            before, before_s = load.service.copy(), machine.seconds()
    service = {tenant: float(load.service[tenant] - before[tenant]) for tenant in wanted}
    counted = settings.steps - settings.steps // 4 - 1
    return Served(service=service, steps=counted, seconds=machine.seconds() - before_s)


def modest(settings: FairnessSettings, per_step: float, *, beside: bool) -> Served:
    """Let one of two tenants ask for half of its share of `per_step`, the service of a step, at random moments;
    beside: while the other one floods."""
    machine = Machine(settings)
    load, draw = Load(machine, settings), random.Random(1)
    cost = settings.input_tokens + GENERATED_CHARGE * settings.output_tokens
    steps_between = cost / (per_step / 2 / 2)
    arrivals = deque[float]()
    at = settings.steps / 4
    while at < settings.steps * 0.95:
        arrivals.append(at)
        at += draw.expovariate(1 / steps_between)
    start_s = machine.seconds()
    for step in range(settings.steps):
        while arrivals and arrivals[0] <= step:
            arrivals.popleft()
            load.send("modest")
        while beside and load.open["flood"] < FLOOD * settings.max_running / 2:
            load.send("flood")
        load.step()
    seconds = machine.seconds() - start_s
    waits = load.waits["modest"]
    return Served(service=dict(load.service), steps=settings.steps, seconds=seconds, waits=sorted(waits))


def measure(settings: FairnessSettings) -> Fairness:
    """Put the three questions."""
    ratios: list[float] = []
    for _ in range(settings.pairs):
        together, apart = (flood(settings, apart=apart) for apart in (False, True))
        ratios.append(apart.rate / together.rate)
    total = sum(apart.service.values())
    kept = min(served for number, served in enumerate(apart.service.values()) if number)
    waits = [modest(settings, total / apart.steps, beside=beside).waits for beside in (False, True)]
    alone, beside = (some[int(0.99 * (len(some) - 1))] for some in waits)
    return Fairness(
        kept=kept / (total / settings.tenants),
        wait_alone=alone,
        wait_beside=beside,
        total=median(ratios),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the machine, the load and the length of a run."""
    told = f"{LEAST_KEPT} of a share, first tokens {MOST_STEPS_LATER} steps later than alone, {LEAST_TOTAL}"
    parser.epilog = f"Exit status 1: a bound is missed ({told} of first come, first served)."
    add_options(parser, FairnessSettings)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and results here")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write JSON if asked; the exit status: whether every bound is kept."""
    settings = FairnessSettings(**chosen(arguments, FairnessSettings))
    found = measure(settings)
    row = {
        "least kept of a share": f"{found.kept:.3f} (at least {LEAST_KEPT})",
        "p99 steps to first token": f"{found.wait_beside} (alone {found.wait_alone})",
        "service of all": f"{found.total:.3f} of first come, first served (at least {LEAST_TOTAL})",
    }
    print(text(grid_of("", [row])))
    Recording("fairness", arguments.json).write(settings, found)
    return 0 if found.is_fair else 1
