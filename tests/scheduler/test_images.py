"""Images in the budget of a step: what the tower takes is work of the step that needs it, and holds nobody up."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cierzo.cache.config import CacheConfig
from cierzo.cache.manager import KVCacheManager
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.cost import LEAST_CHUNK, SEEN_ENOUGH, CostLearner, StepCost, StepWork
from cierzo.scheduler.images import EmbeddingBook, Image, within
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import StepPlan, StepResult
from cierzo.scheduler.request import NewRequest
from cierzo.scheduler.scheduler import Scheduler

# seconds: 0.01 a step, 1 ms a row, 2 ms an image token and 1 us for each pair of these
COST = StepCost(0.01, 0.0, 0.0, 0.0, 0.001, 0.0, embedding_s=0.002, embedding_pair_s=1e-6)
SIDE = 10  # tokens of an image's side: 100 embeddings take 0.21 s, its 110 rows 0.11 s


def image(offset: int, name: int, rows: int = SIDE, columns: int = SIDE) -> Image:
    digest = bytes([name])
    return Image(offset=offset, num_tokens=rows * (columns + 1), digest=digest, columns=columns, key=digest)


class Machine:
    """A scheduler with a price, whose clock passes as the price says."""

    def __init__(
        self, cost: StepCost | None = COST, *, num_blocks: int = 4096, block_tokens: int = 16, **limits: Any
    ) -> None:
        self.now, self.cost = 0.0, cost
        defaults = {"budget_tokens": 4096, "max_chunk_tokens": 2048, "max_running": 64, "max_model_len": 8192}
        cache = KVCacheManager(CacheConfig(num_blocks=num_blocks, block_tokens=block_tokens))
        config = SchedulerConfig(**{**defaults, "max_step_s": 0.5, **limits})
        self.scheduler = Scheduler(config, cache, lambda: self.now, cost)
        self.made: dict[int, list[bytes]] = {}  # by step: images that a runner makes
        self.kept: set[bytes] = set()
        self.begun: set[bytes] = set()

    def add(
        self, request_id: int, prompt_tokens: int, *images: Image, max_tokens: int = 500, **fields: Any
    ) -> None:
        sampling = SamplingParams(seed=1, max_tokens=max_tokens)
        prompt = tuple((request_id + 7 * at) % 97 for at in range(prompt_tokens))
        new = NewRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, images=images, **fields)
        self.scheduler.add(new)

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check()
        if plan.kept is not None:
            self.kept &= {*plan.kept}
        needed = {one.key for seq in plan.seqs for one in seq.images}
        self.made[plan.step] = sorted(needed - self.kept)
        self.kept |= needed
        self.begun |= {one.key for one, _ in plan.begun}
        book = self.scheduler._images
        assert {*book._kept} - {*book._left} <= self.kept | self.begun, "it has as made what no plan makes"
        assert not needed & book._left.keys(), "it has as unmade what the plan makes"
        if self.cost is not None and plan.work is not None:
            self.now += self.cost.seconds(plan.work)
        self.scheduler.commit(plan, StepResult([[7] if seq.samples else [] for seq in plan.seqs]))
        return plan


def test_the_price_of_an_image_is_part_of_the_step_that_needs_it_first() -> None:
    machine = Machine(max_chunk_tokens=50, budget_tokens=64)
    machine.add(1, 200, image(30, 1))
    machine.add(2, 10)
    plan = machine.step()
    assert plan.work is not None
    assert (plan.work.embeddings, plan.work.embedding_pairs) == (100, 10_000)
    assert plan.predicted_s == pytest.approx(0.01 + plan.work.rows * 0.001 + 0.21)
    following = machine.step()
    assert following.work is not None
    assert following.work.embeddings == 0


def test_a_burst_of_images_keeps_steps_to_the_target() -> None:
    """Twenty images at once beside streams that decode: no step is planned to take longer than the target."""
    machine = Machine(max_step_s=0.4)
    for number in range(4):
        machine.add(100 + number, 20)
    machine.step()
    for number in range(20):
        machine.add(number, 180, image(40, number))
    steps: list[float] = []
    while any(len(one.tokens) < 181 for one in machine.scheduler.requests() if one.key[0] < 100):
        plan = machine.step()
        assert {100, 101, 102, 103} <= {seq.key[0] for seq in plan.seqs}, "a stream got no token"
        assert plan.work is not None
        steps.append(COST.seconds(plan.work))
        assert len(steps) < 60
    assert max(steps) <= 0.4 + LEAST_CHUNK * COST.row_s  # whoever is admitted last has a least chunk
    assert sum(map(len, machine.made.values())) == 20
    assert max(map(len, machine.made.values())) == 1


def test_an_image_that_takes_longer_than_the_target_is_made_in_stages() -> None:
    """24 of 8.75 ms: beside those who decode no step takes longer than the target, and all images are made."""
    machine = Machine(max_step_s=0.1, image_stages=24)
    machine.add(100, 20)
    machine.step()
    for number in range(3):
        machine.add(number, 180, image(40, number))
    begun, steps = [], []
    for _ in range(60):
        plan = machine.step()
        assert 100 in {seq.key[0] for seq in plan.seqs}
        begun += [(one.key, stages) for one, stages in plan.begun]
        steps.append(plan.predicted_s)
    assert max(steps) <= 0.1 + LEAST_CHUNK * COST.row_s
    for number in range(3):
        assert 12 <= sum(stages for key, stages in begun if key == bytes([number])) <= 24
    assert all(len(one.tokens) > 180 or one.key[0] == 100 for one in machine.scheduler.requests())


def test_an_image_that_a_prefix_ends_inside_of_is_finished_in_stages() -> None:
    """Up to there its rows are found in the cache; its embeddings are gone, and somebody decodes all the time."""
    machine = Machine(max_step_s=0.1, image_stages=24, image_cache_tokens=1)
    shared = tuple(range(110))

    def add(request_id: int, tail: tuple[int, ...], name: int) -> None:
        sampling = SamplingParams(seed=1, max_tokens=1)
        new = NewRequest(
            request_id=request_id, prompt_token_ids=shared + tail, sampling=sampling, images=(image(0, name),)
        )
        machine.scheduler.add(new)

    for request_id, name in ((1, 1), (2, 2)):  # the second image takes the room of the first
        add(request_id, (111, 112, 113), name)
        while machine.scheduler.has_work():
            machine.step()
    machine.add(100, 20, max_tokens=5000)
    machine.step()
    add(3, (114, 115, 116), 1)
    stages = 0
    for _ in range(40):
        plan = machine.step()
        stages += sum(count for _, count in plan.begun)
        if any(seq.key == (3, 0) for seq in plan.seqs):
            break
    assert any(seq.key == (3, 0) for seq in plan.seqs)
    assert stages < 24


@pytest.mark.parametrize("seed", range(12))
def test_images_of_chunks_that_other_tenants_claim_are_not_made(seed: int) -> None:
    """Random tenants, of whom some take the room of others within a step; `Machine.step` looks at the book."""
    rng = random.Random(seed)
    limits = {
        "budget_tokens": 64,
        "max_chunk_tokens": 24,
        "max_running": 3,
        "image_stages": 4,
        "max_model_len": 400,
    }
    room, seconds = rng.choice([1, 60, 500]), rng.choice([0.0, 0.05, 0.3])
    machine = Machine(**limits, image_cache_tokens=room, max_step_s=seconds, num_blocks=60, block_tokens=8)
    for number in range(1, 61):
        name = number if seed % 2 else number // 8  # of its own, or shared
        pictures = (image(rng.randrange(10), name, 5, 5), image(60, name + 100, 5, 5))
        tenant, weight = rng.choice("abc"), rng.choice([1.0, 4.0])
        machine.add(number, 150, *pictures, max_tokens=30, tenant=tenant, weight=weight)
        for _ in range(rng.randint(0, 4)):
            machine.step()


def test_an_image_of_two_is_made_as_long_as_one_of_them_is_in_the_step() -> None:
    book = EmbeddingBook(1, 4)
    one, other = (
        SimpleNamespace(
            key=(number, 0), new=SimpleNamespace(images=(image(0, 1),)), inside_image=None, paid_images_end=0
        )
        for number in (1, 2)
    )
    book.begin_step()
    for request in (one, other):
        book.take(request, 0, 110)
    book.withdraw({one.key})
    assert book.lacking(other, 0, 110) == []
    book.withdraw({other.key})
    assert [missing.stages for missing in book.lacking(other, 0, 110)] == [4]


class Held:
    """A constraint that is never made."""

    state, error = None, ""


def test_an_empty_step_tells_nothing_that_no_runner_hears() -> None:
    machine = Machine(image_cache_tokens=1)
    machine.add(1, 150, image(0, 1), max_tokens=1)
    machine.add(9, 2, constraint=Held())
    assert machine.step().kept == (image(0, 1).key,)
    plan = machine.step()
    assert (plan.seqs, plan.kept) == ([], None)
    machine.add(2, 20)
    assert machine.step().kept == ()


def test_stages_are_for_those_who_decode() -> None:
    """Where nobody does, an image is made at once: a prompt that has waited gains nothing by it."""
    machine = Machine(max_step_s=0.1, image_stages=24)
    machine.add(1, 180, image(0, 1))
    plan = machine.step()
    assert plan.begun == []
    assert plan.work is not None
    assert plan.work.embeddings == 100


def test_without_a_price_a_tower_begins_with_one_stage() -> None:
    machine = Machine(CostLearner(target_s=0.5).cost, image_stages=24)
    machine.add(100, 20)
    machine.step()
    machine.add(1, 180, image(0, 1))
    plan = machine.step()
    assert [stages for _, stages in plan.begun] == [1]


def test_an_image_without_stages_that_takes_longer_than_the_target_is_made_alone_and_all_go_on() -> None:
    machine = Machine(max_step_s=0.1)
    machine.add(100, 20)
    machine.step()
    for number in range(3):
        machine.add(number, 180, image(40, number))
    for _ in range(60):
        plan = machine.step()
        assert 100 in {seq.key[0] for seq in plan.seqs}
        if made := machine.made[plan.step]:
            assert len(made) == 1
            assert sum(len(seq.token_ids) for seq in plan.seqs) <= 16 + 4, "no more rows than the least chunk"
    assert sum(map(len, machine.made.values())) == 3
    assert all(len(one.tokens) > 180 or one.key[0] == 100 for one in machine.scheduler.requests())


def test_without_a_price_a_step_beside_others_makes_one_image() -> None:
    machine = Machine(CostLearner(target_s=0.5).cost)
    machine.add(100, 20)
    machine.step()
    for number in range(5):
        machine.add(number, 60, image(2, number, 5, 5))
    for _ in range(20):
        machine.step()
    assert max(map(len, machine.made.values())) == 1
    assert sum(map(len, machine.made.values())) == 5


def test_an_image_that_is_kept_costs_nothing_and_one_that_is_not_is_priced_again() -> None:
    for room, made in ((1000, [1, 0]), (100, [1, 1])):
        machine = Machine(image_cache_tokens=room)
        machine.add(1, 150, image(20, 1), max_tokens=1)
        machine.step()
        machine.add(3, 150, image(20, 3), max_tokens=1)  # takes the place of the first, if there is room for one
        machine.step()
        machine.add(2, 150, image(20, 1), max_tokens=1)
        plan = machine.step()
        assert plan.work is not None
        assert [1, plan.work.embeddings // 100] == made


def test_a_tenant_pays_for_an_image_that_is_made_for_it_once() -> None:
    machine = Machine(max_chunk_tokens=40, budget_tokens=80)
    machine.add(1, 150, image(20, 1), tenant="a", weight=2.0)
    machine.add(2, 150, tenant="b", weight=2.0)
    computed = dict.fromkeys((1, 2), 0)
    for _ in range(2):
        for seq in machine.step().seqs:
            computed[seq.key[0]] += len(seq.token_ids)
        counters = {request.tenant.name: request.tenant.counter for request in machine.scheduler.requests()}
        assert counters == {"a": (computed[1] + 100) / 2, "b": computed[2] / 2}


def test_a_prompt_whose_images_take_too_long_for_its_deadline_is_given_up() -> None:
    machine = Machine()
    machine.add(1, 150, image(20, 1), deadline_at_s=0.12)  # alone it takes 0.37 s
    machine.add(2, 150, image(20, 2), deadline_at_s=0.5)
    machine.step()
    ends = [(d.request_id, d.finish.reason) for d in machine.scheduler.take_deltas() if d.finish is not None]
    assert (1, "deadline") in ends
    assert (2, "deadline") not in ends


def test_a_machines_price_of_images_is_learned() -> None:
    learner = CostLearner(target_s=0.0)
    for number in range(4 * SEEN_ENOUGH):
        embeddings = (0, 50, 200, 900, 0, 3000)[number % 6]
        rows = embeddings + 10 * (number % 7) + 1
        work = StepWork(3, 0, rows, 0.0, rows, embeddings, float(embeddings * embeddings))
        learner.observe(work, COST.seconds(work))
    for embeddings in (100, 1000, 2500):
        work = StepWork(2, 0, embeddings, 0.0, 0, embeddings, float(embeddings * embeddings))
        assert learner.cost.seconds(work) == pytest.approx(COST.seconds(work), rel=0.1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 6), st.integers(0, 40), st.integers(0, 40))
def test_which_embeddings_tokens_take(rows: int, columns: int, offset: int, start: int, more: int) -> None:
    """Counted token by token."""
    one = image(offset, 1, rows, columns)
    end, embedding = start + more, 0
    places = {}
    for at in range(one.num_tokens):
        if at % (columns + 1) != columns:
            places[offset + at] = embedding
            embedding += 1
    wanted = [number for at, number in places.items() if start <= at < end]
    first, last = one.embeddings(start, end)
    assert [*range(first, last)] == wanted
    assert embedding == one.num_embeddings
    if wanted:
        assert within([one], start, end) == (one,)
    if end <= offset or start >= one.needed_end:
        assert within([one], start, end) == ()
