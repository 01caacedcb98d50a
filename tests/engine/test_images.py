"""Images through scheduler, cache and batches: a request's tokens depend on its own images and on nothing else.

The runner is the fake one, whose tokens depend on the digest of the image at each position.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_prompts import prompt_of, random_parts, submit
from random_cuts import random_cuts

from cierzo.cache.config import CacheConfig
from cierzo.engine.messages import Abort, Submit, TokenDelta
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.cost import StepCost
from cierzo.scheduler.images import Image
from cierzo.scheduler.plan import StepPlan

VOCAB = 50
MAX_LEN = 80
LARGE = (0, 3, 4)  # a picture of 15 tokens


@dataclass
class Machine:
    """A core on a fake runner, and what came of its requests."""

    core: EngineCore
    runner: FakeRunner
    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    entries: dict[tuple[int, int], list[bytes]] = field(default_factory=dict)
    ends: dict[tuple[int, int], str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)

    def take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            key = delta.request_id, delta.sample
            assert key not in self.ends, "a sequence goes on after its end"
            self.tokens.setdefault(key, []).extend(delta.token_ids)
            self.entries.setdefault(key, []).extend(map(bytes, delta.prompt_logprobs or ()))
            if delta.finish is not None:
                self.ends[key] = delta.finish.reason
                self.messages.append(delta.finish.message)

    def step(self, *, overlapped: bool = False) -> None:
        self.take(self.core.step_overlapped() if overlapped else self.core.step_plain())
        self.core.check()

    def run(self, *, overlapped: bool = False) -> Machine:
        for _ in range(3000):
            if not self.core.has_work():
                return self
            self.step(overlapped=overlapped)
        raise AssertionError("it does not end")


def machine(*, num_blocks: int = 64, prefix_caching: bool = True, **limits: Any) -> Machine:
    defaults = {"budget_tokens": 12, "max_chunk_tokens": 5, "max_running": 4, "max_model_len": MAX_LEN}
    scheduler = SchedulerConfig(**{**defaults, "image_cache_tokens": 40, **limits})
    cache = CacheConfig(block_tokens=4, num_blocks=num_blocks, prefix_caching=prefix_caching)
    sizes = {"num_blocks": num_blocks, "block_tokens": 4, "max_running": scheduler.max_running}
    runner = FakeRunner(vocab_size=VOCAB, **sizes, image_stages=3)
    made = Machine(EngineCore(fake_config(scheduler, cache, vocab_size=VOCAB), runner, lambda: 0.0), runner)
    made.core.observe = made.plans.append
    return made


def timed_machine(**limits: Any) -> Machine:
    """A machine whose steps have room for few rows and few stages of a tower."""
    made = machine(max_step_s=1.0, image_stages=3, **limits)
    made.core._scheduler.reprice(StepCost(0.0, 0.0, 0.0, 0.0, 0.05, 0.0, embedding_s=0.3))
    return made


def alone(request: Submit) -> Machine:
    """In one chunk, with a cache of its own."""
    roomy = machine(budget_tokens=200, max_chunk_tokens=200, image_cache_tokens=1000)
    roomy.core.submit(request)
    return roomy.run()


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    num_blocks=st.sampled_from([24, 26, 64]),
    room=st.sampled_from([1, 8, 14, 100]),
    overlapped=st.booleans(),
    cuts=st.one_of(st.none(), st.integers(0, 1 << 30)),
    prefix_caching=st.booleans(),
    timed=st.booleans(),
)
def test_everyone_gets_the_tokens_that_it_gets_alone(
    seed: int, num_blocks: int, room: int, overlapped: bool, cuts: int | None, prefix_caching: bool, timed: bool
) -> None:
    rng = random.Random(seed)
    limits = {"num_blocks": num_blocks, "prefix_caching": prefix_caching, "image_cache_tokens": room}
    ours = timed_machine(**limits) if timed else machine(**limits)
    asked: dict[int, Submit] = {}
    texts = [random_parts(rng, 2), random_parts(rng, 3)]  # that several begin with
    with random_cuts(cuts):
        for number in range(10):
            parts = [*rng.choice(texts)[: rng.randrange(9)], *random_parts(rng, rng.randrange(3))]
            more = {"n": rng.choice([1, 1, 2]), "prompt_logprobs": rng.choice([None, None, 1])}
            request = submit(number, parts, max_tokens=rng.randrange(1, 12), **more)
            if rng.random() < 0.3:  # resumed: after some of the tokens that it gets alone
                done = alone(msgspec.structs.replace(request, sampling=sampling_of_one(request))).tokens[number, 0]
                request = msgspec.structs.replace(
                    request, sampling=sampling_of_one(request), output_token_ids=done[: rng.randrange(len(done))]
                )
            asked[number] = request
            ours.core.submit(request)
            for _ in range(rng.randrange(4)):
                ours.step(overlapped=overlapped)
            if rng.random() < 0.1:
                ours.core.abort(Abort(request_id=rng.randrange(number + 1)))
        ours.run(overlapped=overlapped)
    for number, request in asked.items():
        expected = alone(request)
        for key, tokens in expected.tokens.items():
            if ours.ends[key] == "cancelled":
                assert ours.tokens.get(key, []) == tokens[: len(ours.tokens.get(key, []))]
            else:
                assert (ours.tokens[key], ours.ends[key]) == (tokens, "length")
                assert ours.entries[key] == expected.entries[key], number


def sampling_of_one(request: Submit) -> Any:
    return msgspec.structs.replace(request.sampling, n=1)


def test_another_image_gives_other_tokens() -> None:
    first, second = (alone(submit(1, [1, (number, 2, 2), 5], temperature=0.0)) for number in (0, 1))
    assert first.tokens != second.tokens


def test_an_image_is_made_once_whatever_its_chunks_and_samples() -> None:
    ours = machine(max_chunk_tokens=2)
    ours.core.submit(submit(1, [1, LARGE, 5, 6], n=3))
    ours.core.submit(submit(2, [7, 7, LARGE, 5]))
    ours.run()
    assert len(ours.runner.towers) == 1


def test_a_request_whose_blocks_are_cached_makes_nothing() -> None:
    ours = machine(image_cache_tokens=1)
    ours.core.submit(submit(1, [1, LARGE, 5, 6, 7, 7]))
    ours.run()
    ours.core.submit(submit(2, [1, (1, 3, 4), 5]))  # takes the place of the embeddings
    ours.run()
    assert len(ours.runner.towers) == 2
    ours.core.submit(submit(3, [1, LARGE, 5, 6, 7, 7]))
    assert len(ours.run().runner.towers) == 2


def test_a_prefix_that_ends_inside_an_image_makes_it_again_if_it_is_gone() -> None:
    ours = machine(image_cache_tokens=1)
    ours.core.submit(submit(1, [1, 1, 1, LARGE]))
    ours.run()
    ours.core.submit(submit(2, [1, (1, 3, 4), 5]))
    ours.run()
    again = submit(3, [1, 1, 1, LARGE, 5, 5], temperature=0.0)
    ours.core.submit(again)
    ours.run()
    assert len(ours.runner.towers) == 3
    assert any(seq.key[0] == 3 and seq.start == 16 for plan in ours.plans for seq in plan.seqs)  # the hit
    assert ours.tokens[3, 0] == alone(again).tokens[3, 0]


def test_embeddings_stay_within_their_bound_and_the_last_used_stay() -> None:
    ours = machine(image_cache_tokens=8)
    for number, name in enumerate((0, 1, 0, 2, 0, 1)):
        ours.core.submit(submit(number, [number, 1, (name, 2, 2), 5]))  # four embeddings each
        ours.run()
        assert sum(map(len, ours.runner._embeddings._kept.values())) <= 8
    # 0, 1, (0), 2 for 1, (0), 1 for 2
    assert len(ours.runner.towers) == 4


def test_an_image_in_use_is_not_forgotten_for_another() -> None:
    """A prompt stands inside its image, and only one has room: no other begins, and none is made twice."""
    ours = machine(image_cache_tokens=12, max_chunk_tokens=2, budget_tokens=4)
    for number in (0, 1, 2):
        ours.core.submit(submit(number, [number, (number, 3, 4), 5]))
    ours.run()
    assert len(ours.runner.towers) == 3
    inside = [
        {seq.key[0] for seq in plan.seqs if seq.images and seq.start + len(seq.token_ids) < 15}
        for plan in ours.plans
    ]
    assert max(map(len, inside)) == 1


@pytest.mark.parametrize(("room", "times"), [(1, 2), (40, 1)])
def test_a_tower_that_takes_long_works_beside_those_who_decode(room: int, times: int) -> None:
    """In stages of steps that nobody's rows of the image are in; each picture still once, or, where one has room,
    once for each request."""
    ours = timed_machine(image_cache_tokens=room)
    ours.core.submit(submit(0, [1, 2, 3], max_tokens=60))
    ours.step()
    for number in (1, 2):
        ours.core.submit(submit(number, [number, LARGE, 5, (1, 4, 2), 6]))
    ours.run()
    begun = [[stages for _, stages in plan.begun] for plan in ours.plans]
    assert sum(map(len, begun)) > 3
    assert max(map(len, begun)) == 1
    assert len(ours.runner.towers) == 2 * times
    done = Counter[bytes]()
    for plan in ours.plans:
        done.update({image.key: stages for image, stages in plan.begun})
    assert max(done.values()) <= 3 * times, "a tower began anew"
    made = [plan for plan in ours.plans if plan.work is not None and plan.work.embeddings]
    assert max(plan.work.embeddings for plan in made) <= 4, "a third of the larger image"
    assert all((0, 0) in {seq.key for seq in plan.seqs} for plan in made)
    for number in (1, 2):
        assert ours.tokens[number, 0] == alone(submit(number, [number, LARGE, 5, (1, 4, 2), 6])).tokens[number, 0]


@pytest.mark.parametrize("room", [1, 1000])
def test_what_an_aborted_request_had_begun_is_forgotten(room: int) -> None:
    ours = timed_machine(image_cache_tokens=room)
    ours.core.submit(submit(0, [1, 2, 3], max_tokens=60))
    ours.step()
    ours.core.submit(submit(1, [LARGE, 5]))
    ours.step()
    assert ours.runner._embeddings._begun
    ours.core.abort(Abort(request_id=1))
    ours.step()
    assert not ours.runner._embeddings._begun
    assert not ours.runner.towers
    ours.run()


def test_a_tower_that_fails_in_stages_ends_its_own_request_alone() -> None:
    ours = timed_machine()
    ours.core.submit(submit(0, [1, 2, 3], max_tokens=60))
    ours.step()

    def fail(image: Image) -> Iterator[None]:
        raise ValueError("the tower fails")
        yield

    ours.runner._embeddings._embed = fail
    ours.core.submit(submit(1, [LARGE, 5]))
    ours.run()
    assert ours.ends == {(0, 0): "length", (1, 0): "failed"}
    assert ours.tokens[0, 0] == alone(submit(0, [1, 2, 3], max_tokens=60)).tokens[0, 0]


@pytest.mark.parametrize("end", ["done", "aborted", "aborted while it waits"])
def test_pixels_go_with_their_request_however_late_its_deadline(end: str) -> None:
    ours = machine(max_running=2 if end != "aborted while it waits" else 1)
    ours.core.submit(submit(0, [1, 2, 3], max_tokens=60))
    ours.step()
    ours.core.submit(msgspec.structs.replace(submit(1, [LARGE, 5]), deadline_at_s=1e6))
    assert len(ours.core._pixels._living) == 1
    ours.step()
    if end != "done":
        ours.core.abort(Abort(request_id=1))
    while (1, 0) not in ours.ends:
        ours.step()
    ours.step()
    ours.plans.clear()
    assert not ours.core._pixels._living
    assert ours.core.has_work()


def test_a_decode_step_has_no_images() -> None:
    ours = machine()
    ours.core.submit(submit(1, [1, LARGE]))
    ours.run()
    assert all(not seq.images for plan in ours.plans for seq in plan.seqs if seq.start >= seq.num_prompt_tokens)


def test_what_was_preempted_inside_an_image_goes_on() -> None:
    ours = machine(num_blocks=20, max_chunk_tokens=3, budget_tokens=8)
    asked = [submit(number, [number, LARGE, 1, (number, 3, 4), 5], max_tokens=20) for number in range(4)]
    for request in asked:
        ours.core.submit(request)
    ours.run()
    assert ours.core.stats().preemptions > 0
    for request in asked:
        assert ours.tokens[request.request_id, 0] == alone(request).tokens[request.request_id, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": b""}, "images[0]: 0 of 0 bytes of pixels have come"),
        ({"pixels": bytes(100)}, "images[0]: 100 bytes of pixels for 2 x 3 tokens"),
        ({"offset": 3}, "images[0]: tokens 3 to 10, must lie from 0 to 9"),
        ({"rows": 0}, "images[0]: 288 bytes of pixels for 0 x 3 tokens"),
    ],
)
def test_an_image_that_does_not_fit_its_prompt_is_refused(change: dict[str, Any], message: str) -> None:
    tokens, images = prompt_of([1, (0, 2, 3), 5])
    request = submit(1, [1, (0, 2, 3), 5])
    assert tokens == request.prompt_token_ids
    request = msgspec.structs.replace(request, images=[msgspec.structs.replace(images[0], **change)])
    ours = machine()
    ours.core.submit(request)
    ours.run()
    assert ours.ends == {(1, 0): "failed"}
    assert message in ours.messages[0]
    ours.core.submit(submit(2, [1, (0, 2, 3), 5]))
    assert ours.run().ends[2, 0] == "length"
