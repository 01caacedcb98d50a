"""The device of a real core process fails: the core says why and ends, and the streams go on in the next one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from sampling_twin import VOCAB
from streams import by_sample, final_of

from cierzo.cache.config import CacheConfig
from cierzo.engine.errors import CoreFailed
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.frames import FrameSplitter, pack
from cierzo.engine.messages import CoreEvent, Ready, Submit
from cierzo.engine.worker.fake import fake_config
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams

CONFIG = fake_config(
    SchedulerConfig(budget_tokens=32, max_chunk_tokens=16, max_running=8, max_model_len=128),
    CacheConfig(block_tokens=4, num_blocks=256, hash_key="00" * 16),
    vocab_size=VOCAB,
)
SUPPORT = Path(__file__).parents[2] / "support"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
LIMIT_S = 100.0  # every core imports torch
ENDED = (1, -signal.SIGKILL)  # the link kills a core that has closed its socket, should it not have gone yet
REQUESTS = [
    {"token_ids": [3, i], "max_tokens": 40, "seed": i, "n": 1 + i % 2, "temperature": 0.8, "ignore_eos": True}
    for i in range(3)
]
REQUESTS += [{"token_ids": [9], "max_tokens": 40, "seed": 1, "frequency_penalty": 0.5, "logprobs": 2}]
REQUESTS += [{"token_ids": [9], "max_tokens": 40, "seed": 1, "temperature": 0.0, "ignore_eos": True}]


@pytest.fixture
def failing(children):
    """`failing(calls, marker)` is a Spawn of cores whose device fails at that forward pass."""

    def after(*arguments):
        async def start(path):
            command = [sys.executable, str(SUPPORT / "faulty_core.py"), path, *map(str, arguments)]
            children.append(await asyncio.create_subprocess_exec(*command, env=ENVIRONMENT))
            return children[-1]

        return start

    return after


@pytest.mark.parametrize("overlap", [False, True])
def test_every_stream_goes_on_with_the_same_tokens(run, serving, failing, children, tmp_path, caplog, overlap):
    marker = tmp_path / "failed"

    async def body():
        async with (
            serving(engine_config=replace(CONFIG, overlap=overlap), spawn=failing(30, marker)) as house,
            await Client.connect(house.address) as client,
        ):
            broken = await asyncio.gather(*map(by_sample, [client.generate(**request) for request in REQUESTS]))
            assert marker.exists()
            unbroken = await asyncio.gather(*(client.complete(**request) for request in REQUESTS))
            assert [tokens for tokens, _ in broken] == [
                {end.sample: end.token_ids for end in final.samples} for final in unbroken
            ]
            assert sum(len(tokens) for samples, _ in broken for tokens in samples.values()) >= 200
            assert (await client.stats()).core_restarts == 1
        assert children[0].returncode in ENDED
        assert children[1].returncode == 0

    run(body(), LIMIT_S)
    (told,) = [record.getMessage() for record in caplog.records if "starting it again" in record.getMessage()]
    assert "CUDA error: an illegal memory access was encountered; one of the last" in told
    assert "launches: table_lookup (30)" in told
    assert "docs.nvidia.com" not in told


def test_a_device_that_fails_in_every_core_is_given_up(run, serving, failing, children):
    async def body():
        async with (
            serving(engine_config=CONFIG, spawn=failing(5), max_core_restarts_per_hour=1) as house,
            await Client.connect(house.address) as client,
        ):
            with pytest.raises(CoreFailed, match=r"more than 1 times .* last: DeviceFault: step \d+: CUDA error"):
                await final_of(client.generate(token_ids=[1], max_tokens=100, seed=1, ignore_eos=True))
            assert (await client.health()).state == "failed"
        assert len(children) == 2
        assert all(child.returncode in ENDED for child in children)

    run(body(), LIMIT_S)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_last_words_of_a_core_and_its_exit_status(tmp_path, overlap):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "core.sock"))
    listener.listen(1)
    command = [sys.executable, str(SUPPORT / "faulty_core.py"), listener.getsockname(), "4"]
    with subprocess.Popen(command, env=ENVIRONMENT) as process:
        connection, _ = listener.accept()
        params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True)
        first = Submit(request_id=1, prompt_token_ids=[1], sampling=params)
        connection.sendall(pack([replace(CONFIG, overlap=overlap)]) + pack([first]))
        said = b""
        while received := connection.recv(1 << 16):
            said += received
        assert process.wait() == 1
    ready, *steps, last = (
        msgspec.msgpack.decode(body, type=CoreEvent) for body in FrameSplitter(1 << 20).feed(said)
    )
    assert isinstance(ready, Ready)
    deltas = [delta for step in steps for delta in step.deltas]
    assert 2 <= sum(len(delta.token_ids) for delta in deltas) <= 3
    assert all(delta.finish is None for delta in deltas)  # the request is not failed, but left to the next core
    assert (last.code, last.message.partition(";")[0]) == (
        "core_failed",
        "DeviceFault: step 4: CUDA error: an illegal memory access was encountered",
    )
