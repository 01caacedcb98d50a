"""The front end with a real core process, which is then killed: every stream goes on with the same tokens."""

from __future__ import annotations

import asyncio
import signal

import pytest
from msgspec.structs import replace

from cierzo.cache.config import CacheConfig
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.errors import CheckpointError
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.core_link import spawn_worker
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker.fake import fake_config
from cierzo.scheduler.config import SchedulerConfig

CONFIG = fake_config(
    SchedulerConfig(budget_tokens=64, max_chunk_tokens=32, max_running=16, max_model_len=4096),
    CacheConfig(block_tokens=8, num_blocks=4096, hash_key="00" * 16),
    vocab_size=300,
)


@pytest.fixture
def spawn(children):
    async def start(path):
        children.append(await spawn_worker(path))
        return children[-1]

    return start


def test_streams_go_on_after_kill_9(run, serving, spawn, children):
    requests = [{"token_ids": [9, i], "max_tokens": 700, "seed": i, "n": 1 + i % 2} for i in range(4)]

    async def body():
        async with (
            serving(engine_config=CONFIG, spawn=spawn) as house,
            await Client.connect(house.address) as client,
        ):
            unbroken = await asyncio.gather(*(client.complete(**request) for request in requests))
            generations = [client.generate(**request) for request in requests]
            got = [dict.fromkeys(range(request["n"]), ()) for request in requests]
            killed = False

            async def read(generation, samples):
                nonlocal killed
                async for delta in generation:
                    samples[delta.sample] += tuple(delta.token_ids)
                    if not killed and all(len(tokens) > 20 for each in got for tokens in each.values()):
                        children[0].kill()
                        killed = True

            await asyncio.gather(*map(read, generations, got))
            assert got == [{end.sample: tuple(end.token_ids) for end in final.samples} for final in unbroken]
            assert [generation.final.usage.output_tokens for generation in generations] == [700, 1400] * 2
            assert (await client.stats()).core_restarts == 1
        assert [child.returncode for child in children] == [-signal.SIGKILL, 0]

    run(body())


def test_a_checkpoint_that_cannot_be_read(run, serving, spawn, children, tmp_path):
    async def body():
        with pytest.raises(CheckpointError):
            async with serving(
                engine_config=replace(CONFIG, runner="model", checkpoint=str(tmp_path)), spawn=spawn
            ):
                pass
        assert children[0].returncode is not None

    run(body())


def test_experts_that_a_model_chose_are_read_through_the_server(run, serving, spawn, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "tiny", like="small4", scale="tiny")
    config = resolve(EngineOptions(model=str(checkpoint), kv_cache_gib=0.01, expert_statistics=True))

    async def body():
        async with (
            serving(engine_config=config, spawn=spawn) as house,
            await Client.connect(house.address) as client,
        ):
            while (nothing := (await client.stats()).core.experts) is None:  # told at once, before any request
                pass
            assert (nothing.layers, nothing.tokens) == ([0, 1, 2], 0)
            await client.complete(token_ids=[5, 6, 7], max_tokens=4, ignore_eos=True)
            counted = (await client.stats()).core.experts
            assert (counted.steps("prefill"), counted.steps("decode"), counted.tokens) == (1, 3, 6)
            assert {sum(counts) for counts in counted.expert_tokens} == {6 * counted.top_k}

    run(body())
