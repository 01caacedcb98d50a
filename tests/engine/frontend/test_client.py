"""The clients against a whole front end: streaming, completion, many streams, cancellation, errors."""

from __future__ import annotations


def test_token_ids_stream_over_tcp(run, serving):
    async def body():
        async with serving() as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)
            deltas = [delta async for delta in generation]
            expected = [10, 17, 24, 31, 38]
            assert [token for delta in deltas for token in delta.token_ids] == expected
            assert "".join(delta.text for delta in deltas) == bytes(expected).decode()
            final = generation.final
            assert final.samples[0].finish_reason == "length"
            assert (final.usage.prompt_tokens, final.usage.output_tokens, final.usage.cached_tokens) == (3, 5, 3)
            assert final.seed == 4

    run(body())


from cierzo.engine.frontend.client import Client  # noqa: E402
