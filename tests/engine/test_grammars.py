"""Grammars through the engine, whatever happens to a request, against llguidance asked anew for each token."""

from __future__ import annotations

import gc
import random
import re
import threading
import time
from typing import Any, cast
from unittest.mock import patch

import msgspec
import pytest
import torch
from grammar_twin import EOS, FREE, VOCAB, VOCABULARY, has_ended, may_end, spelled
from graph_repeater import Repeated
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cuts import random_cuts
from sampling_twin import TABLE, directly, permitted, request_of
from torch import Tensor

from cierzo.cache.config import CacheConfig
from cierzo.cache.pool import KVPool
from cierzo.engine.messages import Abort, Submit, ThinkingBudget
from cierzo.engine.worker import grammars
from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.core import EngineCore, Runner
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.engine.worker.grammars import Constraint, Makers
from cierzo.engine.worker.graphs import DecodeGraphs
from cierzo.engine.worker.masks import NOTHING_LEFT
from cierzo.engine.worker.runner import ModelRunner
from cierzo.engine.worker.sampling import Sampler
from cierzo.engine.worker.step_rows import DeviceRows
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import IMPLEMENTATIONS, bound
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.plan import Finish, StepPlan

MODES = ("plain", "overlapped", "staged", "recorded")
BLOCK_TOKENS, MAX_RUNNING, MAX_LEN = 4, 5, 48
STEPS = 20_000
MASKED_AT_THE_THIRD = f"{NOTHING_LEFT} of those that the grammar permits (token 3 of the answer)"
GRAMMARS = [
    "",
    r"start: /a{1,3}b+/",
    r"start: /(foo|bar)[0-9]{3,5}/",
    'start: "yes" | "no"',
    r'start: "\"" /[a-z]*/ "\""',
    'start: item (" " item)*\nitem: /[ab]+/',
    "start: <[38]> /[a-f]{0,4}/ <[38]> /[0-9]+/",
]


@pytest.fixture(autouse=True)
def _bind() -> None:
    rows = [row for row in IMPLEMENTATIONS if row.target.startswith("cierzo.kernels.ref.sampling")]
    vars(bound).update({row.operation: row.load() for row in rows})


class TableModel:
    """Logits are a function of the last token and its position."""

    def logits(self, inputs: StepRows, kv: KVPool, logit_rows: Tensor | None) -> Tensor:
        chosen = slice(None) if logit_rows is None else logit_rows
        return TABLE[(inputs.token_ids[chosen] * 31 + inputs.positions[chosen]) % len(TABLE)]


def make_core(
    mode: str, num_blocks: int = 60, runner: Runner | None = None, *, tells_vocabulary: bool = True
) -> EngineCore:
    limits = SchedulerConfig(budget_tokens=12, max_chunk_tokens=5, max_running=MAX_RUNNING, max_model_len=MAX_LEN)
    cache = CacheConfig(block_tokens=BLOCK_TOKENS, num_blocks=num_blocks, hash_key="00" * 16)
    config = fake_config(limits, cache, vocab_size=VOCAB, eos_token_ids=(EOS,))
    device, model, pool = torch.device("cpu"), TableModel(), cast(KVPool, None)
    graphs = None
    if mode == "recorded":
        graphs = DecodeGraphs(
            model,
            pool,
            max_running=MAX_RUNNING,
            max_model_len=MAX_LEN,
            cached_tokens=num_blocks * BLOCK_TOKENS,
            device=device,
            record=Repeated,
        )
    staged = DeviceRows(device) if mode in ("staged", "recorded") else None
    made = ModelRunner(model, pool, MAX_RUNNING, staged=staged, graphs=graphs, overlap=mode != "plain")
    made.record(-(-MAX_LEN // BLOCK_TOKENS))
    core = EngineCore(config, runner or made)
    if tells_vocabulary:
        core.vocabulary(VOCABULARY)
    return core


Answers = dict[tuple[int, int], tuple[list[int], Finish]]


def run(core: EngineCore, requests: list[Submit], mode: str, seed: int = 0) -> Answers:
    """Tokens and ends of requests that arrive at random."""
    draw, waiting = random.Random(seed), [*requests]
    answers: dict[tuple[int, int], list[int]] = {}
    ended: Answers = {}
    for _ in range(STEPS):
        while waiting and draw.random() < 0.5:
            core.submit(waiting.pop(0))
        for delta in core.step_plain() if mode == "plain" else core.step_overlapped():
            key = (delta.request_id, delta.sample)
            answers.setdefault(key, []).extend(delta.token_ids)
            if delta.finish is not None:
                ended[key] = (answers[key], delta.finish)
        core.check()
        if not waiting and not core.has_work():
            break
    assert len(ended) == sum(request.sampling.n for request in requests)
    return ended


def expected(request: Submit, sample: int) -> tuple[list[int], str, bool, int | None]:
    """Tokens, reason, whether the grammar had not ended, and the token that ended it, of direct sampling."""
    found = directly(request, sample)[0]
    whole, params, grammar = [*request.output_token_ids, *found], request.sampling, request.grammar
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    incomplete = bool(grammar) and not may_end(grammar, whole)
    if whole and whole[-1] in stops and len(whole) >= params.min_tokens:
        return found, "stop", incomplete, whole[-1]
    if grammar and has_ended(grammar, whole):
        return found, "stop", False, None
    return found, "length" if len(whole) == params.max_tokens else "failed", incomplete, None


def told(answer: tuple[list[int], Finish]) -> tuple[list[int], str, bool, int | None]:
    tokens, finish = answer
    return tokens, finish.reason, finish.incomplete, finish.stop_token_id


@st.composite
def asks(draw: st.DrawFn) -> dict[str, Any]:
    grammar = draw(st.sampled_from(GRAMMARS))
    return {
        "prompt": draw(st.lists(st.integers(0, 25), min_size=1, max_size=9)),
        "max_tokens": draw(st.integers(1, 24)),
        "temperature": draw(st.sampled_from([0.0, 1.0])),
        "logit_bias": draw(st.sampled_from([{}, {EOS: 3.0, 0: 2.0}])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "stop_token_ids": draw(st.sampled_from([(), (6,)])),
        "min_tokens": draw(st.sampled_from([0, 5])),
        "ignore_eos": draw(st.booleans()),
        "logprobs": draw(st.sampled_from([None, 2])),
        "n": draw(st.sampled_from([1, 2])),
        "banned": draw(st.sampled_from([[], [[0, 0]], [[1], [26, 27]]])),
        "grammar": FREE + grammar if grammar else "",
        "is_resumed": draw(st.booleans()),
    }


def submits(asked: list[dict[str, Any]]) -> list[Submit]:
    """The requests; those that go on in the middle have what came before from direct sampling."""
    made = []
    for number, ask in enumerate(asked):
        params = {name: value for name, value in ask.items() if name not in ("prompt", "is_resumed")}
        params["min_tokens"] = min(params["min_tokens"], params["max_tokens"])
        request = request_of(number, ask["prompt"], params)
        if ask["is_resumed"] and request.sampling.n == 1 and (known := len(directly(request, 0)[0]) // 2):
            request = request_of(number, ask["prompt"], {**params, "output": directly(request, 0)[0][:known]})
        made.append(request)
    return made


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(asks(), min_size=1, max_size=6),
    num_blocks=st.sampled_from([13, 60]),
    seed=st.integers(0, 1 << 30),
    cuts=st.one_of(st.none(), st.integers(0, 1 << 30)),
    patience_s=st.sampled_from([grammars.MASK_WAIT_S, 0.0]),
)
def test_answers_are_those_of_direct_sampling_whatever_happens_around_them(
    mode: str, asked: list[dict[str, Any]], num_blocks: int, seed: int, cuts: int | None, patience_s: float
) -> None:
    requests = submits(asked)
    with random_cuts(cuts), patch.object(grammars, "MASK_WAIT_S", patience_s):
        answers = run(make_core(mode, num_blocks), requests, mode, seed)
    for request in requests:
        for sample in range(request.sampling.n):
            assert told(answers[request.request_id, sample]) == expected(request, sample), request


@pytest.mark.parametrize("mode", MODES)
def test_texts_are_what_the_grammars_say(mode: str) -> None:
    """Judged by another reader of patterns, which knows nothing of tokens."""
    patterns = [r"a{1,3}b+", r"(foo|bar)[0-9]{3,5}", r'"[a-z]{0,9}"', r"(ab|cd){2,4}e"]
    requests = [
        request_of(number, [1, 2], {"max_tokens": 30, "n": 3, "grammar": f"{FREE}start: /{pattern}/"})
        for number, pattern in enumerate(patterns)
    ]
    answers = run(make_core(mode), requests, mode)
    for (number, _), (tokens, finish) in answers.items():
        assert finish.reason == "stop" or (finish.reason, finish.incomplete) == ("length", True)
        if finish.reason == "stop":
            assert re.fullmatch(patterns[number], spelled([token for token in tokens if token != EOS]))
    assert sum(finish.reason == "stop" for _, finish in answers.values()) > 6


# --- what others have of it --------------------------------------------------------------------------------


class Blocked:
    """A grammar's work in a thread that does not end until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self._gate, self._original = threading.Event(), getattr(owner, name)

        def wait(one: Any, *arguments: Any) -> None:
            assert self._gate.wait(30)
            self._original(one, *arguments)

        monkeypatch.setattr(owner, name, wait)

    def let_go(self) -> None:
        self._gate.set()


def plain_requests(count: int) -> list[Submit]:
    return [request_of(100 + number, [number], {"max_tokens": 8, "temperature": 0.0}) for number in range(count)]


def run_until(core: EngineCore, mode: str, keys: set[tuple[int, int]]) -> tuple[Answers, int]:
    """Answers of some, and the steps that they took."""
    answers: dict[tuple[int, int], list[int]] = {}
    ended: Answers = {}
    for steps in range(1, STEPS):
        for delta in core.step_plain() if mode == "plain" else core.step_overlapped():
            key = (delta.request_id, delta.sample)
            answers.setdefault(key, []).extend(delta.token_ids)
            if delta.finish is not None:
                ended[key] = (answers[key], delta.finish)
        core.check()
        if keys <= set(ended):
            return ended, steps
    raise AssertionError(f"{keys} of {ended}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("owner", "name"), [(Makers, "_make"), (Constraint, "make_mask")])
def test_nobody_waits_for_a_grammar_that_takes_long(
    monkeypatch: pytest.MonkeyPatch, mode: str, owner: type, name: str
) -> None:
    """While its matcher is made, or a mask: the others take the steps that they take alone."""
    monkeypatch.setattr(grammars, "MASK_WAIT_S", 0.0)
    others = plain_requests(3)
    keys = {(request.request_id, 0) for request in others}
    alone = make_core(mode)
    for request in others:
        alone.submit(request)
    expected_answers, expected_steps = run_until(alone, mode, keys)
    held = request_of(1, [4, 4], {"max_tokens": 12, "grammar": FREE + GRAMMARS[2]})
    work = Blocked(monkeypatch, owner, name)
    core = make_core(mode)
    core.submit(held)
    if owner is Constraint:
        deadline = time.monotonic() + 30
        while not core.stats().output_tokens:  # its first mask was made with the matcher
            core.step_plain()
            assert time.monotonic() < deadline
    for request in others:
        core.submit(request)
    answers, steps = run_until(core, mode, keys)
    assert {key: answer[0] for key, answer in answers.items()} == {
        key: answer[0] for key, answer in expected_answers.items()
    }
    assert steps <= expected_steps + 1
    work.let_go()
    answers, _ = run_until(core, mode, {(1, 0)})
    tokens, finish = answers[1, 0]
    whole = expected(held, 0)
    assert (whole[0][len(whole[0]) - len(tokens) :], finish.reason) == (tokens, whole[1])


def test_who_is_held_can_be_cancelled_runs_into_its_deadline_and_counts_as_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = Blocked(monkeypatch, Makers, "_make")
    core = make_core("plain")
    grammar = {"grammar": FREE + GRAMMARS[1], "n": 2}
    core.submit(request_of(1, [1], grammar))
    core.submit(msgspec.structs.replace(request_of(2, [1], grammar), deadline_at_s=time.monotonic() + 0.05))
    assert core.stats().waiting == 4
    core.abort(Abort(request_id=1, sample=1))
    answers, _ = run_until(core, "plain", {(1, 1), (2, 0), (2, 1)})
    assert [answers[key][1].reason for key in ((1, 1), (2, 0), (2, 1))] == ["cancelled", "deadline", "deadline"]
    assert core.stats().waiting == 1
    work.let_go()
    answers, _ = run_until(core, "plain", {(1, 0)})
    assert answers[1, 0][1].reason == "stop"
    assert not core.has_work()


@pytest.mark.parametrize("mode", MODES)
def test_a_matcher_goes_with_its_sequence(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot remembers the rest until another sequence takes it."""
    seen: list[Constraint] = []
    take = Constraint.take

    def noted(one: Constraint, *arguments: Any) -> None:
        take(one, *arguments)
        assert one._matcher is not None
        seen.append(one)

    monkeypatch.setattr(Constraint, "take", noted)
    request = request_of(1, [1], {"grammar": FREE + GRAMMARS[1], "n": 3})
    core = make_core(mode)
    run(core, [request], mode)
    assert [one._matcher for one in seen] == [None] * 3


def test_an_idle_core_does_not_spin_while_a_grammar_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Blocked(monkeypatch, Makers, "_make")
    core = make_core("plain")
    core.submit(request_of(1, [1], {"grammar": FREE + GRAMMARS[1]}))
    begins_s = time.process_time()
    since_s = time.monotonic()
    while time.monotonic() < since_s + 0.2:
        core.step_plain()
    assert time.process_time() - begins_s < 0.1
    work.let_go()
    run_until(core, "plain", {(1, 0)})


# --- ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_who_cannot_go_on_fails_alone_and_says_where(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 makes of a panic."""

    fill = Constraint._fill

    def panics(one: Constraint, matcher: Any) -> None:
        if one.num_followed == 3:
            raise PanicException("index out of bounds")
        fill(one, matcher)

    cases = {
        "start: (": r"(?s)grammar: .*",
        'start: "ab" "É"': r"grammar: no token may come next \(token [23] of the answer\)",  # none has these bytes
        'start: "É"': r"grammar: no token may come next",
    }
    requests = [
        request_of(number, [1], {"max_tokens": 9, "grammar": FREE + grammar})
        for number, grammar in enumerate(cases)
    ]
    forced = {"grammar": FREE + "start: /[a-c]{9}/", "thinking": ThinkingBudget(2, 0, 6, True)}
    masked = {"grammar": FREE + "start: /aaz/", "allowed_token_ids": (0,)}
    requests += [request_of(7, [1], forced), request_of(8, [1], masked), *plain_requests(2)]
    answers = run(make_core(mode), requests, mode)
    for number, pattern in enumerate(cases.values()):
        assert answers[number, 0][1].reason == "failed"
        assert re.fullmatch(pattern, answers[number, 0][1].message), answers[number, 0][1].message
    assert answers[7, 0][1].reason == "failed"
    assert answers[7, 0][1].message.endswith("(token 3 of the answer)")
    assert answers[7, 0][1].incomplete
    tokens, finish = answers[8, 0]
    assert (tokens, finish.reason, finish.message) == ([0, 0], "failed", MASKED_AT_THE_THIRD)
    for request in plain_requests(2):
        assert told(answers[request.request_id, 0]) == expected(request, 0)
    monkeypatch.setattr(Constraint, "_fill", panics)
    long = request_of(1, [1], {"max_tokens": 9, "grammar": FREE + "start: /[a-c]{9}/"})
    tokens, finish = run(make_core(mode), [long], mode)[1, 0]
    assert len(tokens) == 3
    assert (finish.reason, finish.message) == (
        "failed",
        "grammar: PanicException: index out of bounds (token 4 of the answer)",
    )


def test_a_core_without_a_vocabulary_says_so() -> None:
    core = make_core("plain", tells_vocabulary=False)
    answers = run(core, [request_of(1, [1], {"grammar": FREE + GRAMMARS[1], "n": 2})], "plain")
    for _, finish in answers.values():
        assert (finish.reason, finish.message) == ("failed", "invalid: grammar: the core knows no vocabulary")


@pytest.mark.parametrize("mode", MODES)
def test_following_is_bounded_for_each_step_and_each_token(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        request_of(number, [number], {"max_tokens": 8, "repetition_penalty": 1.2, "grammar": FREE + GRAMMARS[2]})
        for number in range(4)
    ]
    monkeypatch.setattr(grammars, "FOLLOWING_S", 0.0)  # one a step: all advance, and nothing is told twice
    answers = run(make_core(mode), requests, mode)
    for request in requests:
        assert told(answers[request.request_id, 0]) == expected(request, 0)
    monkeypatch.setattr(grammars, "FOLLOWED_WITHIN_S", 0.0)
    for tokens, finish in run(make_core(mode), requests[:1], mode).values():
        assert (tokens, finish.reason) == ([], "failed")
        assert re.fullmatch(r"grammar: a token took \d+ ms to follow, more than 0 \(token 2 .*", finish.message)


def test_a_long_chain_of_rules_is_made_on_a_deep_stack() -> None:
    """The compiler calls itself for each of them: a thread with the usual stack would take the process with it."""
    chain = "".join(f'r{number}: "a" r{number + 1}\n' for number in range(3000))
    text = f'start: r0\n{chain}r3000: "b"'
    answers = run(make_core("plain"), [request_of(1, [1], {"max_tokens": 2, "grammar": FREE + text})], "plain")
    assert answers[1, 0][1].reason == "length"


def test_threads_end_with_their_core() -> None:
    core = make_core("plain")
    run(core, [request_of(1, [1], {"grammar": FREE + GRAMMARS[1]})], "plain")
    mine = [thread for thread in threading.enumerate() if thread.name.startswith(("grammar-", "mask-"))]
    assert mine
    del core
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith(("grammar-", "mask-")):
            thread.join(10)
            assert not thread.is_alive()


def test_a_recorded_step_chooses_in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without a grammar when it is launched, the others once the step before is collected."""
    parts: list[tuple[int, bool]] = []
    launch = Sampler.launch

    def noted(one: Sampler, logits: Tensor, slots: list[int], *arguments: Any, **more: Any) -> Any:
        parts.append((len(slots), more.get("later", False)))
        return launch(one, logits, slots, *arguments, **more)

    monkeypatch.setattr(Sampler, "launch", noted)
    held = [request_of(number, [1], {"max_tokens": 9, "grammar": FREE + "start: /[a-z]{9}/"}) for number in (1, 2)]
    replays = Repeated.replays
    answers = run(make_core("recorded"), [*held, *plain_requests(2)], "recorded", seed=3)
    assert Repeated.replays > replays
    assert {(2, False), (2, True)} <= {*parts}
    for request in [*held, *plain_requests(2)]:
        assert told(answers[request.request_id, 0]) == expected(request, 0)


# --- the fake runner ---------------------------------------------------------------------------------------


class Failing(FakeRunner):
    """Raises in some steps once they are launched."""

    def __init__(self, num_blocks: int, fails: set[int]) -> None:
        super().__init__(
            vocab_size=VOCAB, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS, max_running=MAX_RUNNING
        )
        self._fails, self._count = fails, 0

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        self._count += 1
        super().launch(plan, batch)
        if self._count in self._fails:
            self._results.pop()
            raise RuntimeError("broken")


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(asks(), min_size=1, max_size=6),
    num_blocks=st.sampled_from([13, 60]),
    seed=st.integers(0, 1 << 30),
    patience_s=st.sampled_from([grammars.MASK_WAIT_S, 0.0]),
    fails=st.sets(st.integers(1, 20), max_size=4),
)
def test_a_model_that_is_made_up_keeps_to_grammars_too(
    asked: list[dict[str, Any]], num_blocks: int, seed: int, patience_s: float, fails: set[int]
) -> None:
    """With steps one by one or overlapped, with masks that come late, and steps that are run again."""
    names = ("max_tokens", "temperature", "n", "banned", "grammar")
    requests = [
        request_of(number, ask["prompt"], {name: ask[name] for name in names}) for number, ask in enumerate(asked)
    ]
    found = []
    for mode, failing in (("plain", set()), ("overlapped", set()), ("overlapped", {*fails})):
        with patch.object(grammars, "MASK_WAIT_S", patience_s):
            found.append(run(make_core(mode, num_blocks, Failing(num_blocks, failing)), requests, mode, seed))
    broken = [key for key, (_, finish) in found[2].items() if "broken" in finish.message]
    for request in requests:
        for sample in range(request.sampling.n):
            key = request.request_id, sample
            assert told(found[0][key]) == told(found[1][key])
            assert key in broken or told(found[0][key]) == told(found[2][key])
            tokens, finish = found[0][key]
            for at, token in enumerate(tokens):
                assert token in permitted(request, tokens[:at])
            if request.grammar:
                assert finish.incomplete == (not may_end(request.grammar, tokens))


def test_a_model_that_is_made_up_says_where_masks_and_grammar_agree_on_no_token() -> None:
    masked = request_of(1, [1], {"grammar": FREE + "start: /aaz/", "allowed_token_ids": (0,)})
    tokens, finish = run(make_core("plain", 60, Failing(60, set())), [masked], "plain")[1, 0]
    assert (tokens, finish.reason, finish.message) == ([0, 0], "failed", MASKED_AT_THE_THIRD)
