"""Grammars on their way through the front end: what is refused, compiled once, shared, killed, and sent again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import pytest
from msgspec.structs import replace

from cierzo.engine.errors import CierzoError, InvalidRequest, Overloaded
from cierzo.engine.frontend import wire_checks
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoders import CRASHED, Encoders, Late, TooSlow, spawn_encoder
from cierzo.engine.frontend.encoding import Compiled, Setup
from cierzo.engine.frontend.grammar_checks import GrammarChecks
from cierzo.engine.messages import (
    ChatMessage,
    Final,
    Generate,
    Grammar,
    Hello,
    SamplingParams,
    StepOutput,
    Tool,
    Vocabulary,
)
from cierzo.engine.testing.words import EOS, bytes_and, fake_model
from cierzo.engine.text.grammar import GrammarWriter

USER = {"role": "user", "content": "a"}
CHOICE = {"kind": "choice", "value": ["yes", "no"]}
TOOL = {"name": "f", "parameters": {"type": "object"}, "strict": True}
FAR = 1e12


def test_the_core_gets_the_grammar_of_the_whole_answer(run, marking, cores):
    async def body():
        async with marking() as house, await Client.connect(house.address) as client:
            await client.complete(messages=[USER], grammar=CHOICE, max_tokens=2)
            await client.complete(messages=[USER], tools=[TOOL], tool_choice="f", max_tokens=2)
            await client.complete(messages=[USER], tools=[TOOL], max_tokens=2)
            await client.complete(messages=[USER], max_tokens=2)
            held, called, free, plain = (submit.grammar for submit in cores.now.submits)
            assert 'HELD: "yes" | "no"' in held
            assert "arguments_0" in called
            assert "text_token*" in free
            assert plain == ""

    run(body())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"grammar": Grammar(kind="json_object")}, "grammar"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [Tool(name="a"), Tool(name="f", strict=True)]}, "tools[1].strict"),
    ],
)
def test_what_a_grammar_comes_from_needs_the_feature(fields, field):
    message = Generate(stream=1, messages=[ChatMessage(role="user")], **fields)
    wire_checks.features(message, {"parts", "grammars"})
    with pytest.raises(InvalidRequest, match="needs the feature grammars") as caught:
        wire_checks.features(message, {"parts"})
    assert caught.value.field == field


def test_what_cannot_be_held_is_refused_by_its_field(run, marking, cores):
    cases = [
        ({"grammar": {"kind": "json_schema", "value": '{"type": "x"}'}}, "grammar.value"),
        ({"grammar": {"kind": "json_schema", "value": "{"}}, "grammar.value"),
        ({"grammar": {"kind": "lark", "value": "start: a"}}, "grammar.value"),
        ({"grammar": {"kind": "yaml", "value": ""}}, "grammar.kind"),
        ({"tools": [TOOL | {"parameters": {"properties": {"a": {"type": "x"}}}}]}, "tools[0].parameters"),
        ({"tools": [TOOL], "tool_choice": "g"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ]

    async def body():
        async with marking() as house, await Client.connect(house.address) as client:
            for _ in range(2):
                for arguments, field in cases:
                    with pytest.raises(InvalidRequest) as caught:
                        await client.complete(messages=[USER], **arguments)
                    assert caught.value.field == field
            assert cores.now.submits == []
            assert house.frontend.counters.accepted == 0
            counts = house.frontend.grammars.counts
            assert (counts.compiled, counts.known, counts.refused) == (0, 0, 6)
            await client.complete(messages=[USER], max_tokens=1)
            assert house.frontend.budget.num_bytes == 0

    run(body())


def test_a_model_that_can_have_none_says_so(run, serving):
    async def body():
        async with serving(text=False) as house, await Client.connect(house.address) as client:
            with pytest.raises(InvalidRequest, match="need a tokenizer") as caught:
                await client.complete(token_ids=[1], grammar=CHOICE)
            assert caught.value.field == "grammar"

    run(body())


def test_a_new_core_gets_the_grammar_again(run, marking, cores):
    cores.free = False

    async def body():
        async with marking() as house, await Client.connect(house.address) as client:
            generation = client.generate(text="a", grammar=CHOICE, max_tokens=6, seed=1, n=2)
            await cores.until(lambda: cores.now.submits)
            first = cores.now
            assert house.frontend.budget.num_bytes == len(first.submits[0].grammar)
            first.step()
            await client.ping()
            first.kill()
            await cores.until(lambda: len(cores.lives) == 2 and len(cores.now.submits) == 2)
            assert {submit.grammar for submit in cores.now.submits} == {first.submits[0].grammar} != {""}
            cores.go_on()
            async for _ in generation:
                pass
            assert house.frontend.grammars.counts.compiled == 1
            assert house.frontend.budget.num_bytes == 0

    run(body())


def test_a_key_stands_for_the_grammar_too(run, marking, cores):
    async def body():
        async with marking() as house, await Client.connect(house.address) as client:
            same = {"text": "a", "max_tokens": 2, "idempotency_key": "k", "seed": 1}
            await client.complete(**same, grammar=CHOICE)
            await client.complete(**same, grammar=CHOICE)
            assert len(cores.now.submits) == 1
            with pytest.raises(CierzoError) as caught:
                await client.complete(**same, grammar={"kind": "json_object"})
            assert caught.value.code == "key_reused"

    run(body())


def test_an_end_within_the_grammar_is_told_to_those_who_have_the_feature(run, marking, peering, cores):
    async def body():
        async with marking() as house:
            for features in (["grammars", "resume"], ["resume"]):
                async with peering(house, Hello(client="t", features=features)) as peer:
                    cores.free = False
                    peer.say(Generate(stream=1, token_ids=[1], sampling=SamplingParams(max_tokens=9)))
                    await cores.until(lambda: cores.now.running)
                    (stream,) = house.frontend.streams
                    delta = cores.now.end((stream.run_id, 0), "length")
                    delta = replace(delta, finish=replace(delta.finish, incomplete=True))
                    house.frontend.core.step(StepOutput(deltas=[delta]))
                    while not isinstance(message := await peer.hear(), Final):
                        pass
                    assert message.samples[0].incomplete == ("grammars" in features)

    run(body())


class Compilers:
    """Encoders that compile when they are told to."""

    def __init__(self):
        self.asked = []

    def compile(self, grammar, deadline_at_s, tenant="default"):
        self.asked.append(asyncio.get_running_loop().create_future())
        return self.asked[-1]


@pytest.fixture
def compilers():
    return Compilers()


@pytest.fixture
def checks(compilers):
    return GrammarChecks(FrontendConfig(max_known_grammars=2), compilers, time.monotonic)


def test_requests_with_the_same_grammar_wait_together(run, compilers, checks):
    async def body():
        waiting = [checks.ask("a", "t") for _ in range(3)]
        other = checks.ask("b", "t")
        assert len(compilers.asked) == 2
        waiting[0].cancel()
        compilers.asked[0].set_result(Compiled())
        await asyncio.wait(waiting)
        assert [each.cancelled() for each in waiting] == [True, False, False]
        assert checks.ask("a", "t") is None
        assert (checks.counts.compiled, checks.counts.known) == (2, 1)
        other.cancel()
        await asyncio.sleep(0)
        assert compilers.asked[1].cancelled()  # as nobody waits for it
        again = checks.ask("b", "t")
        assert len(compilers.asked) == 3
        compilers.asked[2].set_exception(InvalidRequest("no", limit="l", value="v"))
        with pytest.raises(InvalidRequest):
            await again
        with pytest.raises(InvalidRequest) as caught:
            checks.ask("b", "t")
        assert (caught.value.message, caught.value.limit, caught.value.value) == ("no", "l", "v")

    run(body())


def test_what_is_known_has_a_limit_and_what_was_too_slow_once_is_tried_again(run, compilers, checks):
    async def body():
        for name in ("a", "b", "c"):
            asked = checks.ask(name, "t")
            compilers.asked[-1].set_result(Compiled())
            await asked
            assert checks.ask("a", "t") is None or name == "c"
        assert checks.ask("a", "t") is None  # used of late
        assert checks.ask("b", "t") is not None
        for number, error in enumerate((TooSlow("slow"), CierzoError("internal error: died"), Late())):
            asked = checks.ask("x", "t")
            assert len(compilers.asked) == 5 + number
            compilers.asked[-1].set_exception(error)
            kind = Overloaded if isinstance(error, Late) else type(error)
            with pytest.raises(kind):
                await asked
        checks.close()

    run(body())


def test_a_request_that_ends_while_its_grammar_is_compiled_leaves_nothing(run, marking, cores, compilers):
    async def body():
        async with marking() as house, await Client.connect(house.address) as client:
            house.frontend.grammars._encoders = compilers
            late = client.generate(text="a", grammar=CHOICE, deadline_s=0.3)
            cancelled = client.generate(text="a", grammar=CHOICE)
            other = client.generate(text="a", grammar={"kind": "json_object"})
            await client.ping()
            assert [len(compilers.asked), house.frontend.budget.num_bytes > 0] == [2, True]
            cancelled.cancel()
            other.cancel()
            for generation in (late, cancelled, other):
                async for _ in generation:
                    pass
            reasons = [generation.final.samples[0].finish_reason for generation in (late, cancelled, other)]
            assert reasons == ["deadline", "cancelled", "cancelled"]
            assert all(asked.cancelled() for asked in compilers.asked)
            assert (house.frontend.budget.num_bytes, cores.now.submits) == (0, [])
            _open_at_the_end = client.generate(text="a", grammar=CHOICE)
            await client.ping()
            assert len(compilers.asked) == 3

    run(body())


# --- processes ---------------------------------------------------------------------------------------------


class Spawned:
    """Real processes, kept to be looked at."""

    def __init__(self):
        self.processes = []

    async def __call__(self, path):
        self.processes.append(await spawn_encoder(path))
        return self.processes[-1]


@pytest.fixture
def setup(tmp_path):
    bytes_and(("<s>", "</s>")).save(str(tmp_path / "tokenizer.json"))
    return Setup(checkpoint=str(tmp_path), frontend=FrontendConfig(max_grammar_s=30.0), model=fake_model())


def written(grammar: Grammar) -> bytes:
    table = Vocabulary(tokens=[b"a"] * 256 + [b""] * 44, control_ids=[], eos_token_ids=[EOS])
    message = Generate(stream=0, text="a", grammar=grammar)
    return GrammarWriter(table, None).write(message, in_thinking=False, one_call=False, apart=False).encode()


def test_a_process_of_its_own_compiles_and_is_killed_past_its_time(run, setup):
    """The one that encodes short prompts goes on meanwhile; the next grammar has a new process."""
    spawned = Spawned()

    async def body():
        config = replace(setup.frontend, max_grammar_s=1.0)
        encoders = Encoders(config, setup, spawned)
        encoders.start()
        try:
            ordinary = written(Grammar(kind="choice", value=["a"]))
            assert await encoders.compile(ordinary, FAR) == Compiled()
            num_processes = len(spawned.processes)
            os.kill(encoders._compiling.process.pid, signal.SIGSTOP)  # as if it never came to an end
            slow = encoders.compile(written(Grammar(kind="choice", value=["b"])), FAR)
            behind = encoders.compile(ordinary, FAR)
            with pytest.raises(TooSlow, match=r"within 1 s \(max_grammar_s\)") as caught:
                await slow
            assert caught.value.limit == "1 s"
            assert await behind == Compiled()
            assert len(spawned.processes) == num_processes + 1
            assert sum(process.returncode is not None for process in spawned.processes) == 1
            assert encoders.budget.num_bytes == 0
        finally:
            await encoders.close()
        assert all(process.returncode is not None for process in spawned.processes)

    run(body(), 60.0)


def test_a_process_that_is_killed_is_replaced_and_one_that_crashes_is_the_grammars_fault(run, setup):
    spawned = Spawned()

    async def body():
        encoders = Encoders(setup.frontend, setup, spawned)
        encoders.start()
        encoders.warm()
        try:
            ordinary = written(Grammar(kind="choice", value=["a"]))
            await encoders.compile(ordinary, FAR)
            for number, kind in enumerate((signal.SIGKILL, signal.SIGABRT)):
                compiler = encoders._compiling.process
                os.kill(compiler.pid, signal.SIGSTOP)  # so that it is certainly at it
                asked = encoders.compile(written(Grammar(kind="choice", value=[str(number)])), FAR)
                await asyncio.sleep(0.2)
                os.kill(compiler.pid, kind)
                os.kill(compiler.pid, signal.SIGCONT)
                if kind == signal.SIGKILL:
                    assert await asked == Compiled()
                else:
                    with pytest.raises(InvalidRequest, match=CRASHED):
                        await asked
            assert await encoders.compile(ordinary, FAR) == Compiled()
        finally:
            await encoders.close()

    run(body(), 60.0)


def test_rules_within_rules_are_compiled_on_a_deep_stack(run, setup):
    async def body():
        encoders = Encoders(setup.frontend, setup)
        encoders.start()
        chain = "start: r0\n" + "".join(f'r{n}: "7" r{n + 1}\n' for n in range(4000)) + 'r4000: "8"'
        names = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(3000)}
        schema = {"$defs": names | {"d3000": {}}, "$ref": "#/$defs/d0"}
        try:
            for kind, value in (("lark", chain), ("json_schema", json.dumps(schema))):
                try:
                    await encoders.compile(written(Grammar(kind=kind, value=value)), FAR)
                except InvalidRequest as error:
                    assert error.message != CRASHED  # noqa: PT017
        finally:
            await encoders.close()

    run(body(), 60.0)


def test_each_core_gets_the_vocabulary_behind_its_settings(run, serving, cores):
    table = Vocabulary(tokens=[b"a", b""], control_ids=[1], eos_token_ids=[1])

    async def body():
        async with serving(cores=cores, vocabulary=table) as house, await Client.connect(house.address) as client:
            await client.complete(token_ids=[1], max_tokens=1)
            assert cores.now.vocabulary == table
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.vocabulary == table)

    run(body())
