"""A program of a user who checks types: mypy and pyright, in their strict modes, find nothing wrong with it but
what is marked. Nothing here is run."""

from __future__ import annotations

import ssl

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.client import Client, Reconnect, Retry, SyncClient
from cierzo.engine.messages import Delta, Final, Health


async def asynchronous() -> str:
    """Use of the client for asyncio."""
    options = ssl.create_default_context()
    async with await Client.connect(
        ["one:7071", "two:7071"], 5.0, connections=2, retry=Retry(max_attempts=2), tls=options, key="secret"
    ) as client:
        await client.wait_ready(timeout_s=10.0)
        health: Health = await client.health("one:7071")
        text = "" if health.ready else "; ".join(health.notes)
        generation = client.generate(messages={"role": "user", "content": "Hi"}, max_tokens=3, caller_id="mine")
        try:
            async for delta in generation:
                text += delta.text
            last: Delta | None = await generation.next(timeout_s=1.0)
            final: Final = generation.final
            tokens: list[int] = await client.tokenize(messages=[{"role": "user", "content": "Hi"}])
            text += await client.detokenize(tokens)
            answer = await client.ask(text="Hi", temperature=0.5, stop=["."])
        except CierzoError as error:
            ran: bool | None = error.may_have_run
            return f"{error.code} {ran}"
        return f"{text} {last} {final.usage.output_tokens} {answer.text}"


def blocking() -> str:
    """Use of the client for scripts."""
    with SyncClient("unix:/run/cierzo", reconnect=Reconnect(max_attempts=3), default_deadline_s=30.0) as client:
        tokens: list[int] = client.tokenize(text="Hi", control_tokens=True)
        pieces: list[bytes] = client.token_bytes(tokens)
        said = client.detokenize(tokens) + client.tokenizer_info().eos_token + str(len(pieces))
        return said + "".join(delta.text for delta in client.generate(token_ids=[1, 2], seed=7))


def wrong(client: SyncClient) -> None:
    """Mistakes that a type checker finds."""
    client.generate(text="Hi", max_token=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.generate(text=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SyncClient("one:7071", conections=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
