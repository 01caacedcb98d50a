"""`LLM` on tiny random checkpoints: the whole path from prompt to text, in one process."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import tokenizers
import torch
from marked import bare, ids

from cierzo.engine import LLM, SamplingParams
from cierzo.engine.errors import ConfigError, CoreFailed, InvalidRequest
from cierzo.engine.messages import ChatMessage, Part, Tool
from cierzo.engine.testing.words import TEMPLATE, marked_level
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import FakeRunner
from cierzo.engine.worker.masks import NOTHING_LEFT
from cierzo.kernels.fault import DeviceFault

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, logprobs=3, seed=1)
SETTINGS = {"dtype": "float32", "threads": 1, "max_model_len": 128, "kv_cache_gib": 0.02, "block_tokens": 8}
PROMPTS = [[1, 2, 3], [7] * 30, list(range(100, 150)), [9]]


@pytest.fixture(scope="module", params=["small4", "small3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llm") / request.param, like=request.param, dtype="float32")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """An engine without a model: arguments are the matter."""
    return LLM(make_checkpoint(tmp_path_factory.mktemp("llm") / "fake", like="small3"), runner="fake", **SETTINGS)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token id = byte, up to 255; the others have no text."""
    folder = make_checkpoint(tmp_path_factory.mktemp("llm") / "bytes", like="small3", dtype="float32")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {chr(byte): byte for byte in printable}
    spelled |= {
        chr(256 + rank): byte for rank, byte in enumerate(byte for byte in range(256) if byte not in printable)
    }
    assert set(spelled) == set(alphabet)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=spelled, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    return folder


def says(folder: Path, text: str | list[int]) -> LLM:
    """An engine whose every answer is `text`, byte by byte, or these tokens."""
    llm = LLM(folder, runner="fake", **SETTINGS)
    config = llm.config
    answer = text.encode() if isinstance(text, str) else text
    runner = FakeRunner(
        vocab_size=config.model.vocab_size,
        num_blocks=config.cache.num_blocks,
        block_tokens=config.cache.block_tokens,
        max_running=config.scheduler.max_running,
        script=lambda key, index: answer[index % len(answer)],
    )
    llm._core = EngineCore(config, runner)
    return llm


def test_answers_are_the_same_alone_batched_chunked_and_from_the_cache(checkpoint: Path) -> None:
    with LLM(checkpoint, prefix_caching=False, **SETTINGS) as llm:
        alone = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    with LLM(checkpoint, budget_tokens=8, max_running=3, **SETTINGS) as llm:
        together = llm.generate(PROMPTS, GREEDY)
        again = llm.generate(PROMPTS, GREEDY)
        assert again[2].usage.cached_tokens > 0
    for one, two, three in zip(alone, together, again, strict=True):
        # Torch's matmul changes last bits with the number of rows, so a near tie may flip; before one, all agree.
        for number, entry in enumerate(one.logprobs):
            top = entry.top_logprobs
            for other in (two, three):
                assert entry.logprob == pytest.approx(other.logprobs[number].logprob, abs=1e-4)
            if top[0] - top[1] < 1e-3:
                break
            assert one.token_ids[number] == two.token_ids[number] == three.token_ids[number]
        assert len(one.token_ids) == 10
        assert one.finish_reason == "length"


def test_samples_and_seeds(checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=6, n=3, ignore_eos=True, temperature=1.0)
    with LLM(checkpoint, **SETTINGS) as llm:
        (first,) = llm.generate([[5, 6]], params)
        assert len({tuple(sample.token_ids) for sample in first.samples}) == 3
        assert first.token_ids == first.samples[0].token_ids
        assert first.logprobs is None
        assert first.usage.output_tokens == 18
        other = llm.generate([[5, 6]], params)[0]
        assert other.seed != first.seed


@pytest.mark.parametrize(
    "prompts",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        iter([1, 2, 3]),
        np.array([1, 2, 3]),
        torch.tensor([1, 2, 3]),
        list(np.array([1, 2, 3])),
        list(torch.tensor([1, 2, 3])),
        [np.array([1, 2, 3])],
        [torch.tensor([1, 2, 3])],
        np.array([[1, 2, 3]]),
        (prompt for prompt in [(1, 2, 3)]),
        [iter([1, 2, 3])],
    ],
    ids=lambda prompts: type(prompts).__name__,
)
def test_a_prompt_may_stand_alone_and_be_of_any_kind(fake: LLM, prompts: object) -> None:
    (output,) = fake.generate(prompts, GREEDY)
    assert (output.prompt_token_ids, len(output.token_ids)) == ([1, 2, 3], 10)
    assert {type(token) for token in output.prompt_token_ids} == {int}


def test_several_prompts_may_be_of_any_kind(fake: LLM) -> None:
    for prompts in (np.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]]), ([i, i + 1] for i in (1, 3))):
        assert [output.prompt_token_ids for output in fake.generate(prompts, GREEDY)] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("prompts", [{"a": [1]}, {1, 2}, b"abc", 5, None, np.array(5), object()])
def test_what_holds_no_prompts_is_refused_by_name(fake: LLM, prompts: object) -> None:
    with pytest.raises(InvalidRequest, match=r"^(the )?prompts ") as caught:
        fake.generate(prompts, GREEDY)
    assert caught.value.field == "prompts"
    assert caught.value.value == type(prompts).__name__.replace("ndarray", "int")


def test_sampling_of_any_kind(fake: LLM) -> None:
    def lengths(*arguments: object, **keywords: object) -> list[int]:
        return [len(output.token_ids) for output in fake.generate([[1], [2]], *arguments, **keywords)]

    assert lengths(SamplingParams(max_tokens=3, ignore_eos=True)) == [3, 3]
    assert lengths({"max_tokens": np.int64(3), "ignore_eos": True}) == [3, 3]
    assert lengths(max_tokens=3, ignore_eos=True) == [3, 3]
    assert lengths({"max_tokens": 3, "ignore_eos": True}, max_tokens=4) == [4, 4]
    assert lengths(({"max_tokens": n} for n in (3, 4)), ignore_eos=True) == [3, 4]
    wrongs = (5, "sampling"), ("greedy", "sampling"), (np.array(5), "sampling"), ({"max_token": 3}, "max_token")
    for wrong, field in (*wrongs, ([5], "sampling")):
        with pytest.raises(InvalidRequest) as caught:
            fake.generate([1], wrong)
        assert caught.value.field == field
    for name in ("max_token", "deadline_s", "text"):  # what belongs to no prompt of this call
        with pytest.raises(InvalidRequest, match=f"unknown argument '{name}'"):
            fake.generate([1], **{name: 3})


def test_prompts_and_their_outputs(checkpoint: Path) -> None:
    with LLM(checkpoint, runner="fake", **SETTINGS) as llm:
        assert llm.generate([], GREEDY) == llm.generate(np.array([]), GREEDY) == []
        several = llm.generate([[1, 2, 3], [1, 2, 3]], [GREEDY, SamplingParams(max_tokens=2)])
        assert [len(output.token_ids) for output in several] == [10, 2]


def test_more_prompts_than_the_queue_holds(checkpoint: Path) -> None:
    with LLM(checkpoint, runner="fake", max_waiting=3, max_running=2, **SETTINGS) as llm:
        outputs = llm.generate([[i] for i in range(20)], SamplingParams(max_tokens=3, n=2, ignore_eos=True))
        assert all(sample.finish_reason == "length" for output in outputs for sample in output.samples)
        assert [output.prompt_token_ids for output in outputs] == [[i] for i in range(20)]


def test_text_is_cut_at_the_token_that_completes_a_stop_string(with_tokenizer: Path) -> None:
    with says(with_tokenizer, "über alle Berge") as llm:
        params = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=0)
        assert llm.generate("Wohin?", params)[0].text == "über alle Berge"
        output = llm.generate(
            "Wohin?", SamplingParams(max_tokens=16, ignore_eos=True, logprobs=0, stop=("lle", "erg"))
        )[0]
        assert (output.text, output.finish_reason, output.samples[0].stop) == ("über a", "stop", "lle")
        assert bytes(output.token_ids).decode() == "über alle"
        assert len(output.logprobs) == len(output.token_ids)
        assert output.usage.prompt_tokens == 6
        llm._core.check()
        assert not llm._core.has_work()
        before = llm._core.stats().output_tokens
        llm.generate("Wohin?", SamplingParams(max_tokens=100, ignore_eos=True, stop=("lle",)))
        assert llm._core.stats().output_tokens == before + 10


HI = ChatMessage(role="user", content="Hi")
HI_DICT = {"role": "user", "content": "Hi"}


def test_messages_of_any_kind(with_tokenizer: Path) -> None:
    with says(with_tokenizer, "Salut") as llm:
        for messages in (HI, HI_DICT, [HI], (HI_DICT,), iter([HI]), [{**HI_DICT, "tool_calls": None}]):
            output = llm.chat(messages, {"ignore_eos": True}, max_tokens=5)
            assert bytes(output.prompt_token_ids) == b"[user]Hi"
            assert output.text == "Salut"
        assert llm.chat(HI, max_tokens=9, ignore_eos=True, stop="lu").text == "Sa"
        assert llm.generate("Hi", SamplingParams(max_tokens=9, ignore_eos=True, stop="lu"))[0].text == "Sa"
        for messages, field in (
            ("Hi", "messages"),
            (3, "messages"),
            (None, "text"),
            ([], "messages"),
            (["Hi"], "messages[0]"),
            ([{**HI_DICT, "content": "a\ud800b"}], "messages[0].content"),
            ([{**HI_DICT, "nmae": "x"}], "messages[0].nmae"),
            ([{**HI_DICT, "role": "robot"}], "messages[0].role"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                llm.chat(messages)
            assert caught.value.field == field
        for wrong in ({"sampling": 3}, {"reasoning_effort": 3}, {"max_token": 3}):
            with pytest.raises(InvalidRequest) as caught:
                llm.chat(HI, **wrong)
            assert caught.value.field in wrong


@pytest.fixture(scope="module")
def marking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model that marks its thoughts and calls."""
    folder = make_checkpoint(tmp_path_factory.mktemp("llm") / "marking", like="small3", dtype="float32")
    marked_level().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


CALLING = '[THINK]hm[/THINK]So: [TOOL_CALLS]wind[ARGS]{"at":  1}[TOOL_CALLS]rain[ARGS]{"at"'


def test_thoughts_and_calls_are_parts_of_an_output(marking: Path) -> None:
    with says(marking, ids(CALLING)) as llm:
        output = llm.chat(HI, max_tokens=len(ids(CALLING)), ignore_eos=True, logprobs=0, seed=1, n=2)
        assert (output.thinking, output.text) == ("hm", "So: ")
        assert bare(output.samples[0].parts) == [
            ("thinking", "", "hm"),
            ("text", "", "So: "),
            ("call", "wind", '{"at":  1}'),
            ("call", "rain", '{"at"'),
        ]
        assert (output.finish_reason, output.samples[0].broken_calls) == ("length", [1])
        (call,) = output.tool_calls
        assert (call.name, call.arguments) == ("wind", '{"at":  1}')
        assert call.id != output.samples[1].tool_calls[0].id
        assert sum(part.num_tokens for part in output.samples[0].parts) == len(output.logprobs)
        assert output.parts == output.samples[0].parts
        turn = output.turn
        assert (turn.reasoning, turn.content, turn.tool_calls) == ("hm", "So: ", [call])
        result = {"role": "tool", "content": "yes", "tool_call_id": call.id, "name": "wind"}
        again = llm.chat([HI, turn, result], max_tokens=1)
        prompt = "[user]Hi[assistant]" + CALLING.rpartition("[TOOL_CALLS]")[0] + "[tool]yes"
        assert again.prompt_token_ids == ids(prompt)


def test_one_call_alone_and_how_it_ends(marking: Path) -> None:
    with says(marking, ids(CALLING)) as llm:
        output = llm.chat(
            HI,
            tools=[Tool(name="wind")],
            max_tokens=100,
            ignore_eos=True,
            parallel_tool_calls=False,
            stop="nowhere",
        )
        assert (output.finish_reason, output.samples[0].stop) == ("tool_calls", "[TOOL_CALLS]")
        assert output.token_ids == ids(CALLING.rpartition("[TOOL_CALLS]")[0])
        llm._core.check()
        assert not llm._core.has_work()


def test_an_output_of_text_alone_is_one_part(with_tokenizer: Path) -> None:
    with says(with_tokenizer, "Salut") as llm:
        output = llm.generate("Hi", max_tokens=5, ignore_eos=True)[0]
        assert output.samples[0].parts == [Part(kind="text", text="Salut", num_tokens=5)]
        assert (output.thinking, output.tool_calls, output.turn.content) == ("", [], "Salut")


def test_an_interrupted_call_leaves_nothing_behind(with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = says(with_tokenizer, "abc")
    steps = iter(range(100))
    plain = llm._core.step

    def interrupted() -> list:
        if next(steps) == 2:
            raise KeyboardInterrupt
        return plain()

    monkeypatch.setattr(llm._core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], SamplingParams(max_tokens=50))
    assert not llm._core.has_work()
    assert llm.generate([[1]], SamplingParams(max_tokens=3))[0].text == "abc"


def test_after_a_fault_of_the_device_it_does_not_pretend_to_live_on(
    with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = says(with_tokenizer, "abc")

    def fails() -> None:
        raise DeviceFault(
            "step 1: CUDA error: unspecified launch failure; one of the last 2 launches: rms_norm (2)"
        )

    monkeypatch.setattr(llm._core._runner, "collect", fails)
    monkeypatch.setattr(llm._core, "reset", lambda: pytest.fail("there is nothing to use again"))
    for _ in range(2):
        with pytest.raises(
            CoreFailed, match=r"cannot use its device any more: step 1: CUDA error.* rms_norm \(2\)"
        ):
            llm.generate([[1], [2]], SamplingParams(max_tokens=5))
    monkeypatch.undo()
    with pytest.raises(CoreFailed, match="cannot use its device any more"):
        llm.generate([[1]], SamplingParams(max_tokens=5))
    assert llm._core is None  # model and cache are let go


def test_what_was_in_flight_is_forgotten(with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapped, a step is always under way when Ctrl-C comes."""
    llm = LLM(with_tokenizer, runner="fake", overlap="on", **SETTINGS)
    params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True)
    (expected,) = llm.generate([[1, 2]], params)
    plain, steps = llm._core.step, iter(range(100))

    def interrupted() -> list:
        if next(steps) == 4:
            raise KeyboardInterrupt
        return plain()

    monkeypatch.setattr(llm._core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[7, 7, 7], [8]], params)
    monkeypatch.undo()
    assert llm.generate([[1, 2]], params)[0].token_ids == expected.token_ids


def test_an_interruption_at_any_line_leaves_a_usable_engine(with_tokenizer: Path) -> None:
    """Ctrl-C comes between two lines of the scheduler as well, where its books do not balance."""
    llm = LLM(with_tokenizer, runner="fake", **(SETTINGS | {"kv_cache_gib": 0.002, "max_running": 4}))
    prompts, params = [[i, *([5] * 20)] for i in range(6)], SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    expected = [output.token_ids for output in llm.generate(prompts, params)]
    rng = random.Random(0)
    for _ in range(40):
        with pytest.raises(KeyboardInterrupt), interruption_after(rng.randrange(4000)):
            llm.generate(prompts, params)
        llm._core.check()
        assert not llm._core.has_work()
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected


@contextmanager
def interruption_after(lines: int) -> Iterator[None]:
    """Raise KeyboardInterrupt before some line of scheduler or cache."""
    left = lines

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal left
        if "/scheduler/" not in frame.f_code.co_filename and "/cache/" not in frame.f_code.co_filename:
            return None
        left -= event == "line"
        if left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ("text", {}, "text"),  # no tokenizer
        ([], {}, "token_ids"),
        ([1, 10**6], {}, "token_ids"),
        ([1] * 128, {}, "token_ids"),
        ([1.5], {}, "token_ids[0]"),
        ([True], {}, "token_ids[0]"),
        ([2**70], {}, "token_ids"),
        (["a"], {}, "token_ids[0]"),
        ("a\ud800", {}, "text"),
        (None, {}, "prompt"),
        (1.5, {}, "prompt"),
        (b"abc", {}, "prompt"),
        ({1, 2}, {}, "prompt"),
        ({"prompt": "text"}, {}, "prompt"),
        ([1], {"temperature": float("nan")}, "sampling.temperature"),
        ([1], {"top_p": -1.0}, "sampling.top_p"),
        ([1], {"max_tokens": "3"}, "sampling.max_tokens"),
        ([1], {"max_tokens": 2**70}, "sampling.max_tokens"),
        ([1], {"logit_bias": {"5": 1.0}}, "sampling.logit_bias"),
        ([1], {"stop": "x"}, "sampling.stop"),  # no tokenizer
        ([1], {"n": 10**6}, "sampling.n"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    fake: LLM, prompt: object, params: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fake.generate([[1], prompt], SamplingParams(**params))
    assert caught.value.field == field
    assert caught.value.message.startswith("prompt 0: " if params else "prompt 1: ")
    with pytest.raises(InvalidRequest) as caught:
        fake.generate([prompt], SamplingParams(**params))
    assert not caught.value.message.startswith("prompt ")
    assert not fake._core.has_work()


def test_what_a_token_may_be(with_tokenizer: Path) -> None:
    llm = says(with_tokenizer, "abab")
    for params, text in (
        ({"bad_words": ["b"]}, "acac"),
        ({"bad_words": "ba"}, "abbb"),
        ({"allowed_token_ids": [97]}, "aaaa"),
    ):
        assert llm.generate("x", max_tokens=4, **params)[0].text == text
    with pytest.raises(InvalidRequest, match="marks its thoughts") as caught:
        llm.generate("x", max_thinking_tokens=3)
    assert caught.value.field == "sampling.max_thinking_tokens"
    failed = llm.generate("x", allowed_token_ids=[97, 98], bad_words=["b", "aa"])[0].samples[0]
    assert (failed.text, failed.finish_reason, failed.message) == ("a", "failed", NOTHING_LEFT)


def test_bad_settings_and_a_closed_engine(checkpoint: Path) -> None:
    for settings in ({"colour": "red"}, {"threads": "many"}, {"max_model_len": 0}):
        with pytest.raises(ConfigError):
            LLM(checkpoint, **settings)
    llm = LLM(checkpoint, runner="fake", **SETTINGS)
    with pytest.raises(InvalidRequest, match="2 sampling parameters for 1"):
        llm.generate([[1]], [GREEDY, GREEDY])
    with pytest.raises(InvalidRequest):
        llm.chat([{"role": "user", "content": "hello"}])
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([[1]])


def test_the_package_is_lazy() -> None:
    code = (
        "import sys, cierzo.engine as e; e.SamplingParams; sys.exit('torch' in sys.modules or hasattr(e, 'nope'))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_demo_is_a_name_for_the_demo_model(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cierzo.engine.weights.gguf.prepare_demo", lambda cache_dir: smollm2)
    with LLM("demo", runner="fake", kv_cache_gib=0.02) as llm:
        assert llm.config.checkpoint == str(smollm2.resolve())
