"""Encoder processes of a folder with tekken.json: they read the same file as the front end, and no torch."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mistral_speakers import speaker
from tekken_folders import write_tekken

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoders import Encoders, spawn_encoder
from cierzo.engine.frontend.encoding import Encoded, Job, Setup
from cierzo.engine.messages import ChatMessage, Generate, Tool
from cierzo.engine.testing.words import fake_model
from cierzo.engine.text.tokenizer import Tokenizer

USER = ChatMessage(role="user", content="What time is it?")
TOOLS = [Tool(name="now", parameters={"type": "object"})]
FAR = 1e12


async def _ask(encoders: Encoders, message: Generate) -> Encoded:
    job = Job(stream=message.stream, features=["parts"], has_attached=False)
    return await encoders.submit(job, msgspec.msgpack.encode(message), [], FAR)


def _ids(encoded: Encoded) -> list[int]:
    return msgspec.msgpack.decode(encoded.submit.prompt_token_ids)


def test_a_process_encodes_as_mistral_common_does_and_has_no_torch(run, tmp_path: Path) -> None:
    ours = speaker("v15")
    model = fake_model(vocab_size=ours.vocabulary.num_tokens)
    config = FrontendConfig()
    setup = Setup(checkpoint=str(write_tekken(tmp_path)), frontend=config, model=model)
    processes: list[asyncio.subprocess.Process] = []

    async def spawn(path: str) -> asyncio.subprocess.Process:
        processes.append(await spawn_encoder(path))
        return processes[-1]

    async def body() -> None:
        encoders = Encoders(config, setup, spawn)
        encoders.start()
        try:
            chat = Generate(stream=1, messages=[USER], tools=TOOLS, reasoning_effort="high")
            expected = ours.encode_theirs(USER, tools=TOOLS, reasoning_effort="high")
            assert _ids(await _ask(encoders, chat)) == expected
            text = Generate(stream=1, text="</s>", suffix="x")
            assert _ids(await _ask(encoders, text)) == ours.vocabulary.encode_middle("</s>", "x")
            with pytest.raises(InvalidRequest) as caught:
                await _ask(encoders, Generate(stream=1, messages=[USER], tools=[Tool(name="a b")]))
            assert caught.value.field == "tools[0].name"
            loaded = [Path(f"/proc/{process.pid}/maps").read_text() for process in processes]
            assert any("tiktoken" in each for each in loaded)  # of two, one may still be starting
            assert not any("libtorch" in each for each in loaded)
        finally:
            await encoders.close()

    run(body())


def test_a_server_may_end_while_they_start(run, tmp_path: Path) -> None:
    """Reading tekken.json takes a second, and nothing is left to complain about."""
    setup = Setup(checkpoint=str(write_tekken(tmp_path)), frontend=FrontendConfig(), model=fake_model())
    complaints: list[dict[str, Any]] = []

    async def body() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        started = asyncio.Event()

        async def spawn(path: str) -> asyncio.subprocess.Process:
            process = await spawn_encoder(path)
            started.set()
            return process

        encoders = Encoders(setup.frontend, setup, spawn)
        encoders.start()
        await started.wait()
        while not any(seat.pipe is not None and seat.pipe.transport is not None for seat in encoders._seats):
            await asyncio.sleep(0.01)  # until one has connected
        await encoders.close()
        del encoders
        gc.collect()

    run(body())
    gc.collect()
    assert not complaints


def test_a_process_reads_the_file_that_the_front_end_reads(run, tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer._inner.save(str(write_tekken(tmp_path) / "tokenizer.json"))
    by_tekken = [1, *speaker("v15").vocabulary.encode_piece("hi")]

    async def body() -> None:
        for setting, expected in (
            ("tokenizers", tokenizer.encode("hi")),
            ("mistral", by_tekken),
        ):
            setup = Setup(str(tmp_path), FrontendConfig(), fake_model(vocab_size=3000), setting)
            encoders = Encoders(setup.frontend, setup)
            encoders.start()
            try:
                assert _ids(await _ask(encoders, Generate(stream=1, text="hi"))) == expected
            finally:
                await encoders.close()

    run(body())
