"""Hundreds of worlds in virtual time, and proof that the checker sees what is wrong. Long form: `make chaos`."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from cierzo.bench.virtual import VirtualClock, VirtualLoop
from cierzo.cache import manager
from cierzo.engine.frontend.core_side import CoreSide
from cierzo.engine.frontend.heap import Heap
from cierzo.engine.frontend.outlet import Outlets
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.sample import Sample
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.parts import PartsReader
from simulation.__main__ import COMMAND
from simulation.world import World

SEEDS, PARTS = 120, 6
ONCE_RED = (391, 479, 701, 786, 1170, 1242, 1346, 1485, 20_018, 20_129, 20_626, 20_870)
HAPPENS = {
    "cancelled",
    "deadline",
    "failed",
    "length",
    "stop",
    "overloaded",
    "lost",
    "die",
    "leap",
    "swizzle",
    "thoughts",
    "held",  # to a grammar, to its end
    "seen",  # images, in a prompt that was answered
}


@pytest.mark.parametrize("part", range(PARTS))
def test_seeds(part):
    counts: Counter[str] = Counter()
    for seed in range(part * SEEDS // PARTS, (part + 1) * SEEDS // PARTS):
        world = World(seed)
        wrongs = world.run()
        assert not wrongs, f"repeat it by: {COMMAND} {seed}\n" + "\n".join(wrongs[:5])
        counts.update(world.counts)
    missing = HAPPENS - set(counts)
    assert not missing, f"the seeds do not try {missing}"


@pytest.mark.parametrize("seed", ONCE_RED)
def test_seeds_that_were_red(seed):
    assert not World(seed).run()


def test_a_seed_is_one_history():
    """Two runs of a seed are the same, so that one that fails can be looked into."""

    def story(seed):
        world = World(seed)
        assert not world.run()
        return [
            (one.sent_s, one.tokens, one.end_s, one.lost_s)
            for request in world.history.requests
            for one in request.attempts
        ]

    assert story(3) == story(3)
    assert story(14) == story(14)  # with images
    assert story(15) == story(15)  # with grammars, whose matchers and masks threads make


def first_red(seeds=range(60)):
    """Why the first of some seeds fails that does."""
    for seed in seeds:
        if wrongs := World(seed).run():
            return wrongs[0]
    return ""


def forget_tokens(monkeypatch):
    read = Sample.read

    def shorter(self, most):
        self.sent += self.unsent and len(self.token_ids) - self.sent > 2
        return read(self, most)

    monkeypatch.setattr(Sample, "read", shorter)


def never_close(monkeypatch):
    monkeypatch.setattr(Registry, "close", lambda self, stream: self.detach(stream))


def ignore_cancels(monkeypatch):
    monkeypatch.setattr(CoreSide, "abort", lambda self, stream, reason, sample=None: True)


def resume_a_token_early(monkeypatch):
    send = CoreSide._send

    def short(self, stream):
        for sample in stream.samples:
            del sample.token_ids[-1:]
        send(self, stream)

    monkeypatch.setattr(CoreSide, "_send", short)


def swallow_text(monkeypatch):
    monkeypatch.setattr(Detokenizer, "flush", lambda self: "")


def swallow_thoughts(monkeypatch):
    def flush(self):
        self.parts = []
        return ""

    monkeypatch.setattr(PartsReader, "flush", flush)


def forget_costs(monkeypatch):
    monkeypatch.setattr(CoreSide, "_account", lambda self, delta: None)


def tell_another_end(monkeypatch):
    attach = Outlets.attach

    def later(self, stream):
        if stream.ended_at_s is not None:
            stream.ended_at_s += 1.0
        attach(self, stream)

    monkeypatch.setattr(Outlets, "attach", later)


def mistake_images(monkeypatch):
    monkeypatch.setattr(manager, "marks", lambda images, start, end: b"")


def keep_pixels(monkeypatch):
    monkeypatch.setattr(Heap, "let_go", lambda self, stream: None)


FAULTS = [
    *(forget_tokens, never_close, ignore_cancels, resume_a_token_early),
    *(swallow_text, swallow_thoughts, forget_costs, tell_another_end),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_seeds_red(fault, monkeypatch):
    fault(monkeypatch)
    assert first_red()


@pytest.mark.parametrize("fault", [mistake_images, keep_pixels])
def test_a_fault_turns_seeds_with_images_red(fault, monkeypatch):
    fault(monkeypatch)
    assert first_red(range(0, 420, 7))


def test_time_jumps_to_the_next_timer():
    clock = VirtualClock(100.0)
    loop = VirtualLoop(clock)
    begin = clock.now_s
    loop.run_until_complete(asyncio.sleep(3600.0))
    assert 3600.0 <= clock.now_s - begin < 3600.1
    with pytest.raises(RuntimeError, match="never end"):
        loop.run_until_complete(asyncio.Event().wait())
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.close()


def test_all_features_are_tried():
    counts: Counter[str] = Counter()
    for seed in range(100):
        world = World(seed)
        assert not world.run()
        counts.update(world.counts)
    assert not {"resume", "attached", "stall", "drain", "slow_reader", "taken_over"} - set(counts)
