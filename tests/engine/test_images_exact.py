"""Images with real arithmetic: rows that take embeddings, and tokens that depend on nothing else, bit for bit.

The tower is a fixed projection of the pixels. Answers alone, in one chunk, are compared with those in random loads:
in chunks that end inside images, with prefixes found in the cache, after preemptions, resumed; on the CPU's one
native call, and staged, recorded and overlapped as on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from graph_repeater import Repeated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_prompts import IMAGE, UNIT, picture, random_parts, submit
from native_only import needs_native
from oracle import make_queries
from random_cuts import random_cuts
from torch import Tensor

from cierzo.cache.pool import GqaPages, KVPool
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.messages import Submit
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.graphs import DecodeGraphs
from cierzo.engine.worker.runner import ModelRunner, load_model
from cierzo.engine.worker.step_rows import DeviceRows
from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import bind
from cierzo.scheduler.cost import StepCost

MAX_LEN, MAX_RUNNING = 96, 4
CPU = torch.device("cpu")


class Tower:
    """A projection of each token's pixels, which counts the images that it saw."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        self.seen = 0
        width = UNIT * UNIT * 3
        self._weight = torch.randn(width, hidden, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self._dtype = dtype

    def __call__(self, pixels: Tensor) -> Iterator[Tensor | None]:
        assert pixels.dtype == torch.float32
        rows, columns = pixels.shape[0] // UNIT, pixels.shape[1] // UNIT
        # in the first stage: later ones may find another image's in the same memory
        tokens = pixels.view(rows, UNIT, columns, UNIT, 3).transpose(1, 2).reshape(rows * columns, -1).double()
        yield None
        yield None
        self.seen += 1
        yield (tokens[:, :, None] * self._weight).sum(1).to(self._dtype)


@pytest.fixture(scope="module", params=["small4", "small3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("images") / request.param, like=request.param, scale="tiny")


def config_of(folder: Path, num_blocks: int = 64, **options: Any) -> EngineConfig:
    config = resolve(
        EngineOptions(
            model=str(folder), block_tokens=4, max_model_len=MAX_LEN, threads=1, kv_cache_gib=0.02, **options
        )
    )
    cache = msgspec.structs.replace(config.cache, num_blocks=num_blocks)
    return msgspec.structs.replace(config, cache=cache)


def core_of(config: EngineConfig, *, staged: bool = False) -> tuple[EngineCore, Tower]:
    """A core on a tower; staged: as on a GPU, with recorded steps."""
    model, _, _ = load_model(config)
    pool = KVPool(config.layout, config.cache.num_blocks + 1, "cpu")
    for layer in pool.layers:
        for pages in (layer.keys, layer.values) if isinstance(layer, GqaPages) else (layer.latents,):
            pages.fill_(torch.nan)
    tower = Tower(config.model.hidden_size, model.weights.embedding.dtype)
    graphs = DecodeGraphs(
        model,
        pool,
        max_running=MAX_RUNNING,
        max_model_len=MAX_LEN,
        cached_tokens=config.cache.num_blocks * config.cache.block_tokens,
        device=CPU,
        record=Repeated,
    )
    runner = ModelRunner(
        model,
        pool,
        MAX_RUNNING,
        CPU,
        staged=DeviceRows(CPU) if staged else None,
        graphs=graphs if staged else None,
        overlap=config.overlap,
        tower=tower,
    )
    runner.record(-(-MAX_LEN // config.cache.block_tokens))
    return EngineCore(config, runner), tower


Answer = list[tuple[int, float]]


def drain(core: EngineCore, arrivals: list[tuple[int, Submit]]) -> dict[int, Answer]:
    """Tokens of first samples and their log-probabilities; each request arrives before the step of its number."""
    answers: dict[int, Answer] = {}
    step = 0
    while core.has_work() or arrivals:
        while arrivals and arrivals[0][0] <= step:
            core.submit(arrivals.pop(0)[1])
        for delta in core.step():
            assert delta.finish is None or delta.finish.reason == "length", delta.finish
            found = answers.setdefault(delta.request_id, [])
            found += [(entry.token_id, entry.logprob) for entry in delta.logprobs or () if delta.sample == 0]
        core.check()
        step += 1
        assert step < 2000
    return answers


@needs_native
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    staged=st.booleans(),
    overlap=st.booleans(),
    room=st.sampled_from([1, 12, 100]),
    spare=st.sampled_from([0, 3, 40]),
    cuts=st.one_of(st.none(), st.integers(0, 1 << 30)),
    timed=st.booleans(),
)
def test_answers_about_images_depend_on_nothing_else(
    folder: Path, seed: int, staged: bool, overlap: bool, room: int, spare: int, cuts: int | None, timed: bool
) -> None:
    rng = random.Random(seed)
    limits = {"max_running": MAX_RUNNING, "budget_tokens": rng.choice([8, 20, 64]), "max_step_ms": 0.0}
    config = config_of(folder, MAX_LEN // 4 + spare, overlap="on" if overlap else "off", **limits)
    scheduler = msgspec.structs.replace(config.scheduler, image_cache_tokens=room, max_chunk_tokens=7)
    if timed:  # towers take several steps beside those who decode
        scheduler = msgspec.structs.replace(scheduler, max_step_s=1e6, image_stages=3)
    core, _ = core_of(msgspec.structs.replace(config, scheduler=scheduler), staged=staged)
    core._scheduler.reprice(StepCost(0.0, 0.0, 0.0, 0.0, 1e4, 0.0, embedding_s=1e5))
    core._times.took = lambda work, seconds: False
    texts = [random_parts(rng, 2) for _ in range(2)]
    arrivals: list[tuple[int, Submit]] = []
    expected: dict[int, Answer] = {}
    for number in range(5):
        parts = [*rng.choice(texts)[: rng.randrange(9)], *random_parts(rng, rng.randrange(1, 3))]
        temperature = rng.choice([0.0, 0.9])
        request = submit(
            number, parts, max_tokens=rng.randint(2, 9), temperature=temperature, logprobs=0, ignore_eos=True
        )
        alone, _ = core_of(config_of(folder, budget_tokens=200, max_running=MAX_RUNNING))
        answer = drain(alone, [(0, request)])[number]
        known = rng.choice([0, 0, len(answer) // 2])
        expected[number] = answer[known:]
        output = [token for token, _ in answer[:known]]
        arrivals.append((rng.randrange(6), msgspec.structs.replace(request, output_token_ids=output)))
    arrivals.sort(key=lambda one: one[0])
    with random_cuts(cuts):
        assert drain(core, arrivals) == expected


@needs_native
def test_a_tower_sees_an_image_once_and_none_that_the_cache_has(folder: Path) -> None:
    core, tower = core_of(config_of(folder, budget_tokens=64, max_running=MAX_RUNNING))
    parts = [1, (0, 3, 4), 5, (1, 2, 2), 6, 6, 6, 6]
    first = drain(core, [(0, submit(1, parts, logprobs=0, temperature=0.0, n=2))])
    assert tower.seen == 2
    assert drain(core, [(0, submit(2, parts, logprobs=0, temperature=0.0))])[2] == first[1]
    assert tower.seen == 2
    other = drain(core, [(0, submit(3, [1, (2, 3, 4), *parts[2:]], logprobs=0, temperature=0.0))])[3]
    assert tower.seen == 3
    assert [logprob for _, logprob in other] != [logprob for _, logprob in first[1]]


def test_chunks_and_company_change_nothing_without_the_fused_kernels(folder: Path) -> None:
    """Each operation by itself, whatever the machine has in one call."""
    blocks = ("decoder", "mla_block", "gqa_block", "mlp_block", "moe_block")
    kernels = KernelsConfig(implementations=dict.fromkeys(blocks, "composed"))
    limits = {"kernels": kernels, "max_running": MAX_RUNNING}
    try:
        requests = [
            submit(number, [number, (number % 2, 3, 4), 5, (2, 2, 2), 6], logprobs=0, temperature=0.0)
            for number in range(3)
        ]
        expected: dict[int, Answer] = {}
        for request in requests:
            alone, _ = core_of(config_of(folder, budget_tokens=200, **limits))
            expected |= drain(alone, [(0, request)])
        config = config_of(folder, MAX_LEN // 4 + 3, budget_tokens=8, **limits)
        scheduler = msgspec.structs.replace(config.scheduler, image_cache_tokens=1, max_chunk_tokens=7)
        together, tower = core_of(msgspec.structs.replace(config, scheduler=scheduler))
        assert drain(together, [(2 * number, request) for number, request in enumerate(requests)]) == expected
        assert tower.seen >= 3
    finally:
        bind(KernelsConfig(), "cpu")


def test_a_request_with_an_image_ends_alone_where_the_model_takes_none(folder: Path) -> None:
    core, _ = core_of(config_of(folder, budget_tokens=64, max_running=MAX_RUNNING))
    core._runner._tower = None
    core.submit(submit(1, [1, (0, 3, 4)], ignore_eos=True))
    core.submit(submit(2, [1, 2, 3], ignore_eos=True))
    ends = {}
    while core.has_work():
        for delta in core.step():
            if delta.finish is not None:
                ends[delta.request_id] = delta.finish
    assert (ends[1].reason, ends[2].reason) == ("failed", "length")
    assert "the model takes no images" in ends[1].message


# --- rows of a step --------------------------------------------------------------------------------------------


def rows_of(token_ids: Tensor) -> StepRows:
    """9 prompt rows and 3 generated ones of a sequence."""
    tables = torch.tensor([[5, 2, 7]], dtype=torch.int32)
    slots = torch.tensor([20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31])
    expanded, absorbed = make_queries([(9, 9, 0)], tables), make_queries([(3, 12, 0)], tables)
    return StepRows(token_ids, torch.arange(12), slots, 9, expanded, absorbed)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_take_the_place_of_tokens(folder: Path, dtype: str, composed: bool) -> None:
    """As if they stood in the table, under ids of their own."""
    config = config_of(folder, dtype=dtype)
    model, pool, _ = load_model(config)
    if composed:
        blocks = ("decoder", "mla_block", "gqa_block", "mlp_block", "moe_block")
        bind(KernelsConfig(implementations=dict.fromkeys(blocks, "composed")), "cpu")
    table = model.weights.embedding
    made = torch.randn(4, table.shape[1], generator=torch.Generator().manual_seed(3)).to(table.dtype)
    places = torch.tensor([1, 2, 4, 8])
    token_ids = torch.arange(12) * 13 % 90
    token_ids[places] = IMAGE
    rows = replace(rows_of(token_ids), image_rows=places, image_embeddings=made)
    logit_rows = torch.tensor([0, 3, 8, 11])
    found = model.logits(rows, pool, logit_rows)
    assert torch.equal(model.head(rows, pool)(logit_rows), found)
    assert torch.equal(table, model.weights.embedding), "the table was written"
    wide = Decoder(replace(model.weights, embedding=torch.cat([table, made])), model._positions, model._shard)
    token_ids[places] = torch.arange(4) + len(table)
    assert torch.equal(wide.logits(rows_of(token_ids), pool, logit_rows), found)
    token_ids[places] = IMAGE
    assert not torch.equal(model.logits(rows_of(token_ids), pool, logit_rows)[1:], found[1:])
    bind(KernelsConfig(), "cpu")


def test_embeddings_of_another_shape_or_dtype_are_refused(folder: Path) -> None:
    model, pool, _ = load_model(config_of(folder))
    width, dtype = model.weights.embedding.shape[1], model.weights.embedding.dtype
    for made in (
        torch.zeros(3, width, dtype=dtype),
        torch.zeros(2, width + 1, dtype=dtype),
        torch.zeros(2, width).double(),
    ):
        rows = replace(rows_of(torch.arange(12)), image_rows=torch.tensor([1, 2]), image_embeddings=made)
        with pytest.raises(ArgumentError, match="decoder"):
            model.logits(rows, pool)


def test_pixels_come_to_the_tower_as_they_were_sent() -> None:
    pixels, _ = picture(0, 2, 3)
    seen = torch.frombuffer(bytearray(pixels), dtype=torch.float32).view(4, 6, 3)
    *_, found = Tower(8, torch.float32)(seen)
    assert found is not None
    assert found.shape == (6, 8)
