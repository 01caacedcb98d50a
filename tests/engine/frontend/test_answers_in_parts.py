"""Answers in parts through the whole front end: streamed, merged, resumed, whole; and what is as before without."""

from __future__ import annotations

import msgspec
import pytest
from marked import RIGHT, SAID, TOKENS, bare, ids

from cierzo.engine.frontend.answer import Answers
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.sample import STATE_TOKENS
from cierzo.engine.messages import (
    Credit,
    Delta,
    Failure,
    Final,
    Generate,
    Hello,
    Resume,
    SamplingParams,
)
from cierzo.engine.testing.words import EOS, ID_OF
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.prompt import PromptEncoder

PARTS = Hello(client="test", features=["parts", "resume"])
PLAIN = Hello(client="test", features=["resume"])


@pytest.fixture(autouse=True)
def speaks(cores):
    """Every answer is this one."""
    cores.answer = lambda submit, sample: TOKENS


def generate(stream=1, *, deltas=True, parallel=True, brought=(), key=None, **sampling):
    return Generate(
        stream=stream,
        token_ids=[1, 2],
        sampling=SamplingParams(**{"seed": 3, "max_tokens": 200, **sampling}),
        output_token_ids=list(brought),
        deltas=deltas,
        parallel_tool_calls=parallel,
        idempotency_key=key,
    )


async def hear_all(peer):
    """(deltas, answers by sample, last message) of the one stream of a peer."""
    deltas, answers = [], Answers()
    while not isinstance(message := await peer.hear(), Final | Failure | None):
        if isinstance(message, Delta):
            deltas.append(message)
            answers.add(message)
    return deltas, answers, message


def test_thoughts_text_and_calls_are_parts_of_their_own(run, marking, peering):
    async def body():
        async with marking() as house, peering(house, PARTS) as peer:
            peer.say(generate())
            deltas, answers, final = await hear_all(peer)
            answer = answers.of(0, final)
            assert bare(answer.parts) == RIGHT
            assert "".join(delta.text for delta in deltas) == answer.text == "It blows. "
            assert [token for delta in deltas for token in delta.token_ids] == TOKENS
            (end,) = final.samples
            assert (end.finish_reason, end.stop, end.broken_calls) == ("tool_calls", EOS, [])
            assert (end.parts, end.text) == ([], ""), "they came in deltas"
            ids_of_calls = [part.id for part in answer.parts if part.kind == "call"]
            assert len(set(ids_of_calls)) == 2
            assert all(len(name) == 9 and name.isalnum() and name.isascii() for name in ids_of_calls)
            assert not any(marker in part.text for part in answer.parts for marker in ID_OF)

    run(body())


def test_where_there_is_text_alone_deltas_are_as_before(run, marking, peering, cores):
    cores.answer = lambda submit, sample: [*b"It blows.", EOS]

    async def body():
        async with marking() as house, peering(house, PARTS) as peer, peering(house, PLAIN) as plain:
            peer.say(generate())
            plain.say(generate())
            with_parts, without = await hear_all(peer), await hear_all(plain)
            assert with_parts[0] == without[0]
            assert not any(delta.parts for delta in with_parts[0])
            assert with_parts[2].samples == without[2].samples
            assert with_parts[2].samples[0].finish_reason == "stop"

    run(body())


def test_without_the_feature_text_is_what_the_tokens_spell(run, marking, peering):
    async def body():
        async with marking() as house, peering(house, PLAIN) as peer:
            for deltas in (True, False):
                peer.say(generate(deltas=deltas))
                heard, _, final = await hear_all(peer)
                (end,) = final.samples
                text = end.text if not deltas else "".join(delta.text for delta in heard)
                assert text == 'let me see €It blows. wind{"at": "Zaragoza"}rain{"in":  [1, 2]}'
                assert (end.finish_reason, end.parts, end.broken_calls) == ("stop", [], [])
                assert not any(delta.parts for delta in heard)

    run(body())


def test_a_model_that_marks_nothing_has_no_parts(run, serving, peering, cores, tokenizer):
    cores.answer = lambda submit, sample: [*b"<think>a</think>b", EOS]

    async def body():
        async with serving(cores=cores) as house, peering(house, PARTS) as peer:
            peer.say(generate())
            deltas, _, final = await hear_all(peer)
            assert "".join(delta.text for delta in deltas) == "<think>a</think>b"
            assert not any(delta.parts for delta in deltas)
            assert final.samples[0].finish_reason == "stop"

    run(body())


@pytest.mark.parametrize("inline_chars", [0, 2048])
def test_an_answer_goes_on_within_the_thought_that_the_prompt_ends_in(
    run, marking, peering, cores, inline_chars, monkeypatch
):
    """Streamed, whole, resumed from its second token, and at another server that is told of the first one."""
    tokens = [*ids("so[/THINK]It blows."), EOS]
    cores.answer = lambda submit, sample: tokens
    encode = PromptEncoder.encode
    monkeypatch.setattr(
        PromptEncoder, "encode", lambda *given: msgspec.structs.replace(encode(*given), in_thinking=True)
    )

    async def body():
        async with marking(inline_chars=inline_chars) as house, peering(house, PARTS) as peer:
            text = Generate(stream=1, text="Wind?", sampling=SamplingParams(seed=3, max_tokens=200))
            peer.say(text)
            name = (await peer.hear()).request_id
            _, answers, _ = await hear_all(peer)
            assert bare(answers.of(0, None).parts) == [("thinking", "", "so"), ("text", "", "It blows.")]
            peer.say(msgspec.structs.replace(text, deltas=False))
            _, _, final = await hear_all(peer)
            assert bare(final.samples[0].parts) == [("thinking", "", "so"), ("text", "", "It blows.")]
            for rest in (
                Resume(stream=1, request_id=name, received=[1]),
                msgspec.structs.replace(text, output_token_ids=tokens[:1]),
            ):
                peer.say(rest)
                _, answers, _ = await hear_all(peer)
                assert bare(answers.of(0, None).parts) == [("thinking", "", "o"), ("text", "", "It blows.")]

    run(body())


def test_the_final_record_has_whole_parts(run, marking, peering):
    async def body():
        async with marking() as house, peering(house, PARTS) as peer:
            peer.say(generate(1))
            _, streamed, final = await hear_all(peer)
            peer.say(generate(2, deltas=False, n=2))
            _, _, whole = await hear_all(peer)
            first, second = whole.samples
            assert first.parts == streamed.of(0, final).parts
            assert (first.text, first.token_ids) == ("It blows. ", TOKENS)
            assert bare(second.parts) == RIGHT
            assert [part.id for part in first.parts] != [part.id for part in second.parts]
            assert [end.finish_reason for end in whole.samples] == ["tool_calls"] * 2

    run(body())


@pytest.mark.parametrize("deltas", [True, False])
def test_which_log_probabilities_are_a_parts_own(run, marking, peering, deltas):
    async def body():
        async with marking() as house, peering(house, PARTS) as peer:
            peer.say(generate(logprobs=1, deltas=deltas))
            heard, answers, final = await hear_all(peer)
            entries = [entry for delta in heard for entry in delta.logprobs] or final.samples[0].logprobs
            assert [entry.token_id for entry in entries] == TOKENS
            spelled = {}
            for number, part in enumerate(answers.of(0, final).parts):
                own, entries = entries[: part.num_tokens], entries[part.num_tokens :]
                spelled[number] = [entry.token_id for entry in own]
            assert not entries, "each token is of some part"
            assert spelled == {
                0: ids("[THINK]let me see €[/THINK]"),
                1: ids("It blows. "),
                2: ids('[TOOL_CALLS]wind[ARGS]{"at": "Zaragoza"}'),
                3: [*ids('[TOOL_CALLS]rain[ARGS]{"in":  [1, 2]}'), EOS],
            }

    run(body())


def test_tokens_are_counted_by_the_end_of_the_delta_that_they_are_in(run, marking, peering):
    """Here all markers are tokens, so that nothing is left open."""

    async def body():
        async with marking() as house, peering(house, PARTS) as peer:
            peer.say(generate())
            deltas, _, _ = await hear_all(peer)
            come, counted = 0, 0
            for delta in deltas:
                come += len(delta.token_ids)
                counted += sum(part.num_tokens for part in delta.parts) if delta.parts else len(delta.token_ids)
                assert counted <= come
            assert counted == come == len(TOKENS)

    run(body())


# --- ends ------------------------------------------------------------------------------------------------------


def test_without_parallel_calls_an_answer_ends_where_the_second_would_begin(run, marking, peering, cores):
    async def body():
        async with marking() as house, peering(house, PARTS) as peer:
            for deltas in (True, False):
                peer.say(generate(parallel=False, deltas=deltas))
                _, answers, final = await hear_all(peer)
                assert bare(answers.of(0, final).parts) == RIGHT[:3]
                (end,) = final.samples
                assert (end.finish_reason, end.stop) == ("tool_calls", "[TOOL_CALLS]")
                assert end.output_tokens == len(ids(SAID.rpartition("[TOOL_CALLS]")[0])), "without its token"
            assert [abort.reason for abort in cores.now.aborts] in ([], ["stop"], ["stop"] * 2)

    run(body())


@pytest.mark.parametrize(
    ("said", "reason", "broken", "max_tokens"),
    [
        ('[TOOL_CALLS]wind[ARGS]{"at": ', "length", [0], 1000),
        ('[TOOL_CALLS]wind[ARGS]{"at": </s>', "stop", [0], 1000),
        ('[TOOL_CALLS]wind[ARGS]{}[TOOL_CALLS]rain[ARGS]{"in"</s>', "tool_calls", [1], 1000),
        ('[TOOL_CALLS]wind[ARGS]{}[TOOL_CALLS]rain[ARGS]{"in"', "length", [1], 1000),
        ("[THINK]never closed</s>", "stop", [], 1000),
    ],
)
@pytest.mark.parametrize("deltas", [True, False])
def test_broken_calls_are_told_by_number(run, marking, peering, cores, said, reason, broken, max_tokens, deltas):
    ends = said.endswith("</s>")
    tokens = [*ids(said.removesuffix("</s>")), *([EOS] if ends else [])]
    cores.answer = lambda submit, sample: tokens

    async def body():
        async with marking() as house, peering(house, PARTS) as peer:
            peer.say(generate(max_tokens=max_tokens, deltas=deltas))
            _, answers, final = await hear_all(peer)
            (end,) = final.samples
            assert (end.finish_reason, end.broken_calls) == (reason, broken)
            answer = answers.of(0, final)
            calls = [part.call for part in answer.parts if part.kind == "call"]
            assert len(answer.tool_calls) == len(calls) - len(broken)

    run(body())


def test_stop_strings_are_looked_for_in_the_text_alone(run, marking, peering, cores):
    cores.answer = lambda submit, sample: [*ids("[THINK]see END[/THINK]a ENd END b"), EOS]

    async def body():
        async with marking() as house, peering(house, PARTS) as peer:
            for deltas in (True, False):
                peer.say(generate(stop=["END"], deltas=deltas))
                _, answers, final = await hear_all(peer)
                assert bare(answers.of(0, final).parts) == [("thinking", "", "see END"), ("text", "", "a ENd ")]
                assert (final.samples[0].finish_reason, final.samples[0].stop) == ("stop", "END")

    run(body())


# --- readers that are behind, or others -----------------------------------------------------------------------


@pytest.mark.parametrize("stop", [[], ["nowhere"]])
@pytest.mark.parametrize("credit", [200, 1000])
def test_a_reader_that_is_behind_gets_the_same_parts_merged(run, marking, peering, cores, credit, stop):
    cores.free = False

    async def body():
        hello = Hello(client="test", features=["parts", "credit"])
        async with marking(stream_credit_bytes=credit) as house, peering(house, hello) as peer:
            peer.say(generate(stop=stop))
            await cores.until(lambda: cores.now.submits)
            for _ in range(40):
                cores.now.step()
            heard = []
            while sum(map(delta_cost, heard)) < credit:
                heard.append(await peer.hear())
            assert await peer.hear_so_far() == [], "the credit is used up, to the byte that both sides count"
            cores.go_on()
            peer.say(Credit(stream=1, bytes=10**6))
            rest, _, final = await hear_all(peer)
            answers = Answers()
            for delta in (*heard, *rest):
                answers.add(delta)
            assert bare(answers.of(0, final).parts) == RIGHT
            assert max(len(delta.token_ids) for delta in rest) > 1
            assert final.samples[0].finish_reason == "tool_calls"

    run(body())


@pytest.mark.parametrize("offset", range(0, len(TOKENS) + 1, 5))
def test_a_request_is_resumed_from_any_token(run, marking, peering, cores, offset):
    cores.free = False

    async def body():
        async with marking() as house:
            async with peering(house, PARTS) as peer:
                peer.say(generate(n=2))
                name = (await peer.hear()).request_id
                await cores.until(lambda: cores.now.submits)
                for _ in range(len(TOKENS)):
                    cores.now.step()
                before, _, final = await hear_all(peer)
            async with peering(house, PARTS) as peer:
                peer.say(Resume(stream=8, request_id=name, received=[offset, 3]))
                after, _, again = await hear_all(peer)
            assert again.samples == final.samples
            answers, whole = Answers(), Answers()
            for sample, received in ((0, offset), (1, 3)):
                mine = [delta for delta in before if delta.sample == sample]
                for delta in [*mine[:received], *(d for d in after if d.sample == sample)]:
                    answers.add(delta)
                for delta in mine:
                    whole.add(delta)
                assert answers.of(sample, None).parts == whole.of(sample, None).parts

    run(body())


def test_a_resume_does_not_read_a_long_answer_again(run, marking, peering, cores, monkeypatch):
    """Whether the answer is one thought, one text or one call: at most STATE_TOKENS, and what a step may add."""
    tokens = [*ids("[THINK]"), *b"a" * 5000, *ids("[/THINK]"), *b"b" * 5000]
    tokens += [*ids('[TOOL_CALLS]wind[ARGS]{"at": "'), *b"c" * 5000, *b'"}', EOS]
    cores.answer = lambda submit, sample: tokens
    read, inner = [], PartsReader.push

    def counted(self, token_ids):
        read.append(len(token_ids))
        return inner(self, token_ids)

    async def body():
        async with marking(max_answer_bytes=10**7) as house:
            async with peering(house, PARTS) as peer:
                peer.say(generate(max_tokens=4000 * 4))
                name = (await peer.hear()).request_id
                await hear_all(peer)
            monkeypatch.setattr(PartsReader, "push", counted)
            for offset in (1023, 1024, 5001, 9000, 15_000, len(tokens)):
                read.clear()
                async with peering(house, PARTS) as peer:
                    peer.say(Resume(stream=8, request_id=name, received=[offset]))
                    deltas, _, final = await hear_all(peer)
                assert sum(read) - (len(tokens) - offset) <= STATE_TOKENS + 64
                assert [token for delta in deltas for token in delta.token_ids] == tokens[offset:]
                assert final.samples[0].finish_reason == "tool_calls"

    run(body())


@pytest.mark.parametrize("how", ["resume", "join"])
def test_the_connection_that_asked_settles_whether_there_are_parts(run, marking, peering, how):
    async def body():
        async with marking() as house, peering(house, PARTS) as apart, peering(house, PLAIN) as plain:
            apart.say(generate(key="apart"))
            name = (await apart.hear()).request_id
            await hear_all(apart)
            plain.say(generate(key="plain"))
            plain_name = (await plain.hear()).request_id
            await hear_all(plain)
            asks = {
                "resume": lambda name, key: Resume(stream=2, request_id=name, received=[0]),
                "join": lambda name, key: generate(2, key=key),
            }
            plain.say(asks[how](name, "apart"))
            refused = await plain.hear()
            field = "request_id" if how == "resume" else "idempotency_key"
            assert (refused.code, refused.field) == ("invalid_request", field)
            assert refused.limit == "with the feature parts"
            apart.say(asks[how](plain_name, "plain"))
            deltas, _, final = await hear_all(apart)
            assert "".join(delta.text for delta in deltas).startswith("let me see €It blows. wind{")
            assert not any(delta.parts for delta in deltas)
            assert final.samples[0].finish_reason == "stop"

    run(body())


@pytest.mark.parametrize("inline_chars", [0, 2048])
@pytest.mark.parametrize("offset", [1, 10, 25, 40, len(TOKENS) - 1])
@pytest.mark.parametrize("deltas", [True, False])
def test_tokens_that_a_request_brings_are_read_before(run, marking, peering, inline_chars, offset, deltas):
    """At another server, say: the rest of the parts comes, and the calls have the ids that they had."""

    async def body():
        async with marking(inline_chars=inline_chars) as house, peering(house, PARTS) as peer:
            peer.say(generate())
            before, whole, final = await hear_all(peer)
            peer.say(generate(2, brought=TOKENS[:offset], deltas=deltas))
            after, _, again = await hear_all(peer)
            answers = Answers()
            for delta in [*before[:offset], *after]:
                answers.add(delta)
            (end,) = again.samples
            answers.of(0, None).take(end.parts, end.text, 0)
            assert answers.of(0, None).parts == whole.of(0, final).parts
            assert (end.finish_reason, end.output_tokens) == ("tool_calls", len(TOKENS))

    run(body())


def test_tokens_that_end_an_answer_are_refused(run, marking, peering):
    async def body():
        async with marking() as house, peering(house, PARTS) as peer:
            peer.say(generate(brought=TOKENS[:-1], parallel=False))
            refused = await peer.hear()
            assert (refused.code, refused.field, refused.value) == (
                *("invalid_request", "output_token_ids"),
                "[TOOL_CALLS]",
            )

    run(body())


def test_brought_tokens_can_be_asked_for_again(run, marking, peering):
    tokens = [*ids("[THINK]"), *b"a" * 3000, *ids("[/THINK]b")]

    async def body():
        async with marking() as house, peering(house, PARTS) as peer:
            house.cores.answer = lambda submit, sample: [*tokens, ord("c"), EOS]
            peer.say(generate(brought=tokens, max_tokens=4000))
            name = (await peer.hear()).request_id
            await hear_all(peer)
            for offset in (0, 1, 1500, 3000, 3001, 3002):
                peer.say(Resume(stream=1, request_id=name, received=[offset]))
                deltas, answers, final = await hear_all(peer)
                assert [token for delta in deltas for token in delta.token_ids] == [*tokens, ord("c"), EOS][offset:]
                thought = "a" * (3001 - max(offset, 1)) if offset <= 3001 else ""
                text = "bc" if offset <= 3002 else "c"
                answer = answers.of(0, final)
                assert (answer.thinking, answer.text) == (thought, text)

    run(body())
