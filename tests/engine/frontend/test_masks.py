"""Masks at the door and through the front end: limits, features, a core that dies, and what no server has."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace
from streams import all_of

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend import validate, wire_checks
from cierzo.engine.frontend.absent import absent
from cierzo.engine.frontend.arguments import generate_message
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoding import RequestEncoder
from cierzo.engine.messages import Generate, SamplingParams, ThinkingBudget
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.syntax import Syntax

CONFIG = FrontendConfig(max_allowed_token_ids=3, max_bad_words=2, max_bad_word_chars=4)
PLAIN = Generate(stream=1, token_ids=[1, 2, 3])


MARKS = Syntax(tokens={20: "think", 21: "/think", 22: "call"})


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"allowed_token_ids": (0, 299, 3)}, None),
        ({"allowed_token_ids": (0, 1, 2, 3)}, "sampling.allowed_token_ids"),
        ({"allowed_token_ids": (0, 300)}, "sampling.allowed_token_ids"),
        ({"allowed_token_ids": (-1,)}, "sampling.allowed_token_ids"),
        ({"bad_words": ("a", "abcd")}, None),
        ({"bad_words": ("a", "b", "c")}, "sampling.bad_words"),
        ({"bad_words": ("a", "")}, "sampling.bad_words[1]"),
        ({"bad_words": ("abcde",)}, "sampling.bad_words[0]"),
        ({"max_thinking_tokens": 0}, None),
        ({"max_thinking_tokens": 10**12}, None),
        ({"max_thinking_tokens": -1}, "sampling.max_thinking_tokens"),
    ],
)
def test_limits(model_info, sampling, field):
    message = replace(PLAIN, sampling=SamplingParams(**sampling))
    if field is None:
        validate.fields(message, CONFIG, model_info)
        return
    with pytest.raises(InvalidRequest) as caught:
        validate.fields(message, CONFIG, model_info)
    assert caught.value.field == field
    assert caught.value.limit is not None
    assert caught.value.value is not None


def test_one_alone_is_taken_for_a_list():
    message = generate_message(token_ids=[1], bad_words="ab", allowed_token_ids=3)
    assert message.sampling == SamplingParams(bad_words=("ab",), allowed_token_ids=(3,))
    assert SamplingParams(bad_words="ab", allowed_token_ids=[3, 4]).bad_words == ("ab",)


def test_many_words_are_not_encoded_on_the_loop(prompts):
    few, many = (
        prompts.weight(replace(PLAIN, sampling=SamplingParams(bad_words=("ab",) * count))) for count in (1, 256)
    )
    assert few < 100
    assert many > FrontendConfig().inline_chars


def test_the_core_is_told_tokens_and_no_text(tokenizer, model_info):
    encoder = RequestEncoder(PromptEncoder(tokenizer, syntax=MARKS), FrontendConfig(), model_info)
    sampling = SamplingParams(bad_words=("ab", "</s>"), max_thinking_tokens=5)
    submit = encoder.encode(replace(PLAIN, sampling=sampling, tool_choice="none")).submit
    assert submit.banned_token_ids[:2] == [[97, 98], [32, 97, 98]]
    assert [22] in submit.banned_token_ids
    assert submit.thinking == ThinkingBudget(5, 20, 21)
    assert submit.sampling == replace(sampling, bad_words=())


def test_they_outlive_a_core(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            whole = client.generate(token_ids=[1], bad_words=["ab"], allowed_token_ids=[97, 98], max_tokens=3)
            await cores.until(lambda: cores.now.submits)
            (first,) = cores.now.submits
            cores.now.step()
            await client.ping()
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.submits)
            (again,) = cores.now.submits
            assert again.output_token_ids
            assert first.banned_token_ids == again.banned_token_ids == [[97, 98], [32, 97, 98]]
            assert first.sampling == again.sampling
            assert again.sampling.allowed_token_ids == (97, 98)
            cores.go_on()
            await all_of(whole)

    run(body())


def test_a_model_that_marks_no_thoughts_has_no_budget(run, serving, cores):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            with pytest.raises(InvalidRequest, match="marks its thoughts by single tokens") as caught:
                await client.complete(token_ids=[1], max_thinking_tokens=5)
            assert caught.value.field == "sampling.max_thinking_tokens"
            await client.complete(token_ids=[1], max_tokens=2)

    run(body())


@pytest.mark.parametrize(
    ("name", "ability"),
    [
        ("lora_request", "adapters"),
        ("adapter", "adapters"),
        ("beam_width", "beam search"),
        ("use_beam_search", "beam search"),
        ("best_of", "beam search"),
        ("embeddings", "embeddings"),
    ],
)
def test_what_no_server_has_is_refused_by_name(name, ability):
    with pytest.raises(InvalidRequest, match=f"this engine has no {ability}.*: {name}") as caught:
        generate_message(token_ids=[1], **{name: 1})
    assert (caught.value.field, caught.value.value) == (name, "1")
    for message, field in (({name: 1}, name), ({"sampling": {name: 1}}, f"sampling.{name}")):
        frame = msgspec.msgpack.encode({"type": "generate", "stream": 1, "token_ids": [1], **message})
        with pytest.raises(msgspec.ValidationError) as refused:
            msgspec.msgpack.decode(frame, type=Generate)
        refusal = wire_checks.undecodable(refused.value, frame)
        assert (refusal.field, refusal.limit, refusal.value) == (field, "left out", "1")
        assert refusal.message == absent(name)
        assert ability in refusal.message


@pytest.mark.parametrize("name", ["response_format", "guided_json", "structured_outputs", "choice", "lark"])
def test_what_has_another_name_here_is_refused_with_that_name(name):
    with pytest.raises(InvalidRequest, match=f"by the field grammar, not by {name}") as caught:
        generate_message(token_ids=[1], **{name: 1})
    assert caught.value.field == name


def test_names_that_mean_nothing_are_still_only_unknown():
    assert absent("temprature") == ""
    assert wire_checks.mistyped("Object contains unknown field `x`").message == "unknown field x"
    assert not [name for kind in (SamplingParams, Generate) for name in kind.__struct_fields__ if absent(name)]


def test_a_method_that_no_server_has_is_refused_by_name(run, serving, peering):
    async def body():
        async with serving() as house, peering(house) as peer:
            peer.say({"type": "embeddings", "stream": 3})
            refusal = await peer.hear()
            assert (refusal.stream, refusal.code) == (3, "unknown_method")
            assert refusal.message == "this engine has no embeddings: embeddings"

    run(body())
