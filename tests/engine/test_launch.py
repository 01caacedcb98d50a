"""A tokenizer beside a model: its own eos_token and its special tokens end generations, in `LLM` as in a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers

from cierzo.engine import LLM, SamplingParams
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.errors import InvalidRequest
from cierzo.engine.launch import load_prompts, model_info, with_flight_folder
from cierzo.engine.text import chat
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.tokenizer import _BYTE_OF
from cierzo.engine.weights.make import make_checkpoint

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>", "<|call|>")
END, CALL = 3, 4  # ids; config.json's eos_token_id is 2
VOCAB_SIZE = 1024
USER = {"role": "user", "content": "Hi"}
CALLED = {"name": "f", "arguments": "\ud800"}
SETTINGS = {"dtype": "float32", "threads": 1, "max_model_len": 128, "kv_cache_gib": 0.02, "block_tokens": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, whose tokenizer has special tokens, one beyond the model's vocabulary."""
    folder = make_checkpoint(tmp_path_factory.mktemp("launch") / "chatml", like="small3", dtype="float32")
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *_BYTE_OF))} | {"<far>": VOCAB_SIZE}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([*SPECIAL, "<far>"])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages | tojson }}")
    return folder


@pytest.fixture
def configured(model: Path) -> Iterator[Callable[[dict[str, object]], Path]]:
    """Give the model this tokenizer_config.json."""
    path = model / "tokenizer_config.json"

    def write(config: dict[str, object]) -> Path:
        path.write_text(json.dumps(config))
        return model

    yield write
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("template", "efforts", "marks"),
    [
        ("{{ messages }}", [], (False, False)),
        ("{{ messages }}{{ reasoning_effort }}", ["none", "low", "medium", "high"], (False, False)),
        ("{{ messages }}{% if reasoning_effort == 'high' %}<think>{% endif %}", ["high"], (True, False)),
        ("{{ messages }}<tool_call>", [], (False, True)),
    ],
)
def test_a_model_tells_its_efforts_and_what_it_marks(
    configured: Callable[[dict[str, object]], Path], template: str, efforts: list[str], marks: tuple[bool, bool]
) -> None:
    folder = configured({"chat_template": template})
    (folder / "chat_template.jinja").rename(folder / "aside")
    try:
        info = model_info(*_load(folder))
    finally:
        (folder / "aside").rename(folder / "chat_template.jinja")
    assert (info.reasoning_efforts, (info.marks_thinking, info.marks_calls)) == (efforts, marks)


def _load(model: Path) -> tuple[EngineConfig, PromptEncoder]:
    return load_prompts(resolve(EngineOptions(model=str(model), **SETTINGS)))


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({}, [2]),
        ({"eos_token": None}, [2]),
        ({"eos_token": ""}, [2]),
        ({"eos_token": "</s>"}, [2]),
        ({"eos_token": "<|im_end|>"}, [2, END]),
        ({"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}, [2, END]),
        ({"eos_token": "!"}, [2, len(SPECIAL)]),
    ],
)
def test_the_tokenizers_eos_token_joins_those_of_the_config(configured, caplog, config, ids):
    resolved, prompts = _load(configured(config))
    assert list(resolved.model.eos_token_ids) == model_info(resolved, prompts).eos_token_ids == ids
    assert not caplog.records


@pytest.mark.parametrize(("token", "why"), [("<far>", "id 1024"), ("<zz>", "not in tokenizer.json")])
def test_an_eos_token_that_the_model_cannot_say_is_told_and_does_no_harm(configured, caplog, token, why):
    caplog.set_level("INFO")
    resolved, _ = _load(configured({"eos_token": token}))
    assert resolved.model.eos_token_ids == (2,)
    (message,) = caplog.messages
    assert all(part in message for part in (token, why, "a vocabulary of 1024 lacks it"))
    with LLM(resolved.checkpoint, **SETTINGS) as llm:
        params = SamplingParams(max_tokens=3, min_tokens=2, temperature=0.0, stop=("<far>",))
        assert llm.generate("a", params)[0].finish_reason == "length"


def test_a_template_that_makes_control_tokens_of_texts_is_told_at_the_start(model, monkeypatch, caplog):
    for change, told in (("lower", True), ("trim", False)):
        template = "{% for m in messages %}<s>{{ m.content | " + change + " }}{% endfor %}"
        monkeypatch.setattr(chat, "read_chat_templates", lambda folder, text=template: {"default": text})
        _load(model)
        assert bool(caplog.messages) == told
        assert all("the content of a user's turn" in message for message in caplog.messages)
        caplog.clear()


def test_a_model_without_a_tokenizer_keeps_the_configs_ids(tmp_path):
    folder = make_checkpoint(tmp_path / "bare", like="small3", dtype="float32")
    resolved, prompts = _load(folder)
    assert (resolved.model.eos_token_ids, prompts) == ((2,), PromptEncoder())


@pytest.mark.parametrize(
    ("params", "token_ids", "stop"),
    [
        ({}, [END], END),
        ({"ignore_eos": True, "max_tokens": 3}, [END] * 3, None),
        ({"ignore_eos": True, "stop": ("<|im_end|>",)}, [END], "<|im_end|>"),
        ({"stop": ("<|im_end|>",)}, [END], "<|im_end|>"),
        ({"stop": ("<|im_end|>",), "stop_token_ids": (END,)}, [END], "<|im_end|>"),
        ({"min_tokens": 3, "stop": ("<|call|>",)}, [CALL + 1, CALL + 1, END], END),
    ],
)
def test_a_fine_tunes_turn_ends_at_its_eos_token(configured, params, token_ids, stop):
    """The model is made to say <|im_end|>; before `min_tokens`, where that is masked, the token after <|call|>."""
    bias = {END: 100.0, CALL: 90.0, CALL + 1: 80.0}
    with LLM(configured({"eos_token": "<|im_end|>"}), **SETTINGS) as llm:
        settings = {"max_tokens": 9, "temperature": 0.0, "logprobs": 0, "n": 2, "logit_bias": bias, **params}
        (output,) = llm.generate("a", SamplingParams(**settings))
        for sample in output.samples:
            assert (sample.token_ids, sample.stop) == (token_ids, stop)
            assert sample.text == "!" * token_ids.count(CALL + 1)
            assert sample.finish_reason == ("length" if stop is None else "stop")
            assert [entry.token_id for entry in sample.logprobs] == token_ids
        with pytest.raises(InvalidRequest, match="special token") as caught:
            llm.generate("a", SamplingParams(stop=("!<|call|>",)))
        assert caught.value.field == "sampling.stop[0]"


def test_what_is_no_unicode_is_refused_by_its_place(model):
    with LLM(model, runner="fake", **SETTINGS) as llm:
        for field, ask in (
            ("text", lambda: llm.generate("a\ud800b")),
            ("messages[1].content", lambda: llm.chat([USER, {"role": "user", "content": "a\ud800b"}])),
            ("messages[0].tool_calls[0].arguments", lambda: llm.chat([{"role": "user", "tool_calls": [CALLED]}])),
            ("sampling.stop[0]", lambda: llm.generate("a", SamplingParams(stop=("\ud800",)))),
        ):
            with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
                ask()
            assert caught.value.field == field
        assert llm.chat([USER], SamplingParams(max_tokens=1)).finish_reason


def test_a_flight_folder_that_cannot_be_written_is_told_before_anything_is_served(
    model: Path, tmp_path: Path
) -> None:
    config = resolve(EngineOptions(model=str(model), flight_folder=str(tmp_path / "new"), **SETTINGS))
    assert with_flight_folder(config) == (config, "")
    (tmp_path / "file").touch()
    config = resolve(EngineOptions(model=str(model), flight_folder=str(tmp_path / "file" / "new"), **SETTINGS))
    without, line = with_flight_folder(config)
    assert without.flight_folder == ""
    assert line == f"\nflight record  off: {tmp_path}/file/new: Not a directory"
    assert with_flight_folder(without) == (without, "")


def test_a_fake_runner_is_told_apart(model: Path) -> None:
    config, prompts = load_prompts(resolve(EngineOptions(model=str(model), runner="fake", **SETTINGS)))
    assert model_info(config, prompts).device == "simulated:fake runner"
    config, prompts = load_prompts(resolve(EngineOptions(model=str(model), **SETTINGS)))
    assert model_info(config, prompts).device == "cpu"
