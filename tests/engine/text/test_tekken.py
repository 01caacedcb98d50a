"""tekken.json as a tokenizer: what it encodes and spells, which folders' words it is, and what is refused.

A pitfall is a fault that other engines had with these models, by its number in the list that was gathered.
"""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_speakers import speaker
from tekken_folders import CONTROL, NUM_SPECIAL, VERSIONS, tekken, write_tekken

from cierzo.engine import LLM
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.errors import CheckpointError, ConfigError, InvalidRequest
from cierzo.engine.launch import load_prompts
from cierzo.engine.messages import ChatMessage, Generate, Tool
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.mistral import MistralChat
from cierzo.engine.text.prompt import TOOL_CHARS, PromptEncoder
from cierzo.engine.text.tekken import TekkenVocabulary
from cierzo.engine.text.tokenizer import _BYTE_OF, Tokenizer
from cierzo.engine.weights.make import make_checkpoint

SETTINGS = {"dtype": "float32", "threads": 1, "max_model_len": 128, "kv_cache_gib": 0.02, "block_tokens": 8}
TEXTS = st.text(st.sampled_from("ab <s>[]\n\u00e9\u65e5\U0001f642\u0301")) | st.text(max_size=20)
BYTES = [
    {"rank": rank, "token_bytes": base64.b64encode(bytes([rank])).decode(), "token_str": None}
    for rank in range(256)
]


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_texts_come_back_and_are_cut_as_mistral_common_cuts_them(text: str) -> None:
    ours = speaker("v15")
    vocabulary, inner = ours.vocabulary, ours.theirs.instruct_tokenizer.tokenizer
    ids = vocabulary.encode(text)
    assert ids == inner.encode(text, bos=True, eos=False) == [1, *vocabulary.encode_piece(text)]
    assert ours.spell(ids) == "<s>" + text
    streamed = Detokenizer(vocabulary)
    assert "".join([streamed.push([token_id]) for token_id in ids]) + streamed.flush() == text
    assert len(text.encode()) <= len(ids[1:]) * vocabulary.longest_token_bytes


@pytest.mark.parametrize("version", VERSIONS)
def test_pitfall_20_control_tokens_have_names_and_no_text(version: str) -> None:
    """Marks of thoughts and calls are known by their ids, and never by a text."""
    vocabulary = speaker(version).vocabulary
    known = [text for text in CONTROL if text in vocabulary.special_ids]
    assert [vocabulary.special_ids[text] for text in known] == [CONTROL.index(text) for text in known]
    assert ("[THINK]" in known, "[ARGS]" in known) == (version in ("v13", "v15"), version not in ("v3", "v7"))
    assert (vocabulary.version, len(vocabulary.special_ids)) == (version, NUM_SPECIAL)
    assert (vocabulary.eos_token, vocabulary.eos_token_id) == ("</s>", 2)
    assert {vocabulary.token_bytes(token_id) for token_id in range(NUM_SPECIAL)} == {b""}
    beyond = (-1, vocabulary.num_tokens, 1 << 40)
    assert {vocabulary.token_bytes(token_id) for token_id in beyond} == {b""}
    assert vocabulary.token_bytes(NUM_SPECIAL + 65) == b"A"


def test_a_text_that_spells_the_beginning_has_one() -> None:
    assert speaker("v7").vocabulary.encode("<s>hola").count(1) == 1


def test_what_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
        speaker("v7").vocabulary.encode("a\ud800")
    assert caught.value.field == "text"


# --- folders -----------------------------------------------------------------------------------------------


def test_pitfall_19_tekken_speaks_where_both_are_there(tmp_path: Path) -> None:
    """A tokenizer.json beside it may cut words otherwise."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(dict(_BYTE_OF), []))
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.save(str(tmp_path / "tokenizer.json"))
    assert isinstance(PromptEncoder.load(tmp_path).tokenizer, Tokenizer)
    with pytest.raises(CheckpointError, match=r"has none") as caught:
        PromptEncoder.load(tmp_path, "mistral")
    assert (caught.value.field, caught.value.value) == ("tokenizer", "mistral")
    write_tekken(tmp_path)
    for setting, vocabulary, chat in (
        ("auto", TekkenVocabulary, MistralChat),
        ("mistral", TekkenVocabulary, MistralChat),
        ("tokenizers", Tokenizer, type(None)),
    ):
        prompts = PromptEncoder.load(tmp_path, setting)
        assert (type(prompts.tokenizer), type(prompts.template)) == (vocabulary, chat)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"which reads tokenizer\.json, and .* has none; it may be auto or m"
    ) as caught:
        PromptEncoder.load(tmp_path, "tokenizers")
    assert (caught.value.field, caught.value.limit) == ("tokenizer", "auto or mistral")
    (tmp_path / "tekken.json").unlink()
    assert PromptEncoder.load(tmp_path) == PromptEncoder()


def test_prompts_of_a_folder_with_tekken(tmp_path: Path) -> None:
    prompts, ours = PromptEncoder.load(write_tekken(tmp_path, "v13")), speaker("v13")
    turn = ChatMessage(role="user", content="hola")
    chat = Generate(stream=0, messages=[turn])
    assert prompts.encode(chat).token_ids == ours.encode_theirs(turn)
    assert prompts.encode(Generate(stream=0, text="hola")).token_ids == ours.vocabulary.encode("hola")
    assert prompts.encode(Generate(stream=0, text="a", suffix="b")).token_ids[:2] == [1, 16]
    assert prompts.special_ids["[INST]"] == 3
    assert prompts.max_text_bytes(2) == 2 * ours.vocabulary.longest_token_bytes


def test_a_file_of_bytes_and_few_control_tokens_is_text_alone(tmp_path: Path) -> None:
    """A chat is told to be missing at start, not when the first one comes."""
    few = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(CONTROL[:3])]
    config = tekken("v7")["config"] | {"default_vocab_size": 272, "default_num_special_tokens": 16}
    prompts = PromptEncoder.load(write_tekken(tmp_path, "v7", vocab=BYTES, special_tokens=few, config=config))
    assert prompts.encode(Generate(stream=0, text="hola")).token_ids == [1, 120, 127, 124, 113]
    (said,) = prompts.notes()
    assert "conversations are not: Unknown control token [INST]" in said
    for field, ask in (
        ("messages", Generate(stream=0, messages=[ChatMessage(role="user", content="x")])),
        ("suffix", Generate(stream=0, text="x", suffix="y")),
    ):
        with pytest.raises(InvalidRequest, match=r"the served (checkpoint|model)") as caught:
            prompts.encode(ask)
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("version", "changes", "why"),
    [
        ("v15", {"model_settings_builder": None}, "no model_settings_builder"),
        ("v15", {"special_tokens": tekken("v13")["special_tokens"]}, "Unknown control token [MODEL_SETTINGS]"),
        ("v11", {"special_tokens": tekken("v7")["special_tokens"]}, "Unknown control token [ARGS]"),
        (
            "v3",
            {"config": tekken("v3")["config"] | {"version": "v2"}},
            "its version is v2, known: v3, v7, v11, v13, v15",
        ),
    ],
)
def test_pitfall_25_a_chat_that_cannot_be_written_is_told_at_start(tmp_path, version, changes, why) -> None:
    """Markers are looked up before a request comes."""
    prompts = PromptEncoder.load(write_tekken(tmp_path, version, **changes))
    assert prompts.template is None
    assert why in prompts.notes()[0]


def test_pitfall_25_a_model_that_thinks_needs_both_markers(tmp_path: Path) -> None:
    """Mistral-common fails an assertion in the request's midst."""
    prompts = PromptEncoder.load(write_tekken(tmp_path, "v13", special_tokens=tekken("v11")["special_tokens"]))
    thought = ChatMessage(role="assistant", reasoning="so", content="a", prefix=True)
    with pytest.raises(InvalidRequest, match="cannot have with this model's tokenizer") as caught:
        prompts.encode(Generate(stream=0, messages=[ChatMessage(role="user", content="x"), thought]))
    assert caught.value.field == "messages[1].reasoning"


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"version": "v99"}},
        {"config": {}},
        {"vocab": BYTES[:255]},
        {"vocab": [{"rank": 0}]},
        {"special_tokens": None, "vocab": BYTES},
        {"config": tekken("v15")["config"] | {"pattern": "("}},
        {"model_settings_builder": {"reasoning_effort": {"values": ["little"]}}},
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_tekken(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=r"tekken\.json cannot be read") as caught:
        PromptEncoder.load(tmp_path)
    assert caught.value.field == "tekken.json"
    assert len(caught.value.message) < 700


def test_a_control_token_stands_at_its_rank(tmp_path: Path) -> None:
    special = tekken("v15")["special_tokens"]
    special[3], special[4] = special[4], special[3]
    with pytest.raises(CheckpointError, match="stands at place 3") as caught:
        PromptEncoder.load(write_tekken(tmp_path, special_tokens=special))
    assert (caught.value.field, caught.value.value) == ("special_tokens", "4")


def test_a_vocabulary_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    num_tokens = speaker("v15").vocabulary.num_tokens
    write_tekken(tmp_path)
    for vocab_size in (num_tokens, num_tokens + 5, None):
        assert PromptEncoder.load(tmp_path, vocab_size=vocab_size).tokenizer is not None
    with pytest.raises(CheckpointError, match=f"{num_tokens} tokens, the model {num_tokens - 1}") as caught:
        PromptEncoder.load(tmp_path, vocab_size=num_tokens - 1)
    assert (caught.value.field, caught.value.value) == ("vocab_size", str(num_tokens - 1))


# --- a model with it ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose vocabulary is larger than its tekken.json."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tekken") / "tiny", like="small3", dtype="float32")
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"eos_token_id": 2', '"eos_token_id": 5')
    )
    config = tekken("v15")["config"] | {"default_vocab_size": 256 + NUM_SPECIAL}
    return write_tekken(folder, vocab=BYTES, config=config)


def test_a_model_speaks_and_ends_with_tekken(model: Path) -> None:
    config, prompts = load_prompts(resolve(EngineOptions(model=str(model), **SETTINGS)))
    assert (config.tokenizer, config.model.eos_token_ids) == ("mistral", (5, 2))
    turn = ChatMessage(role="user", content="</s>[INST]")
    greedy = {"max_tokens": 4, "temperature": 0.0}
    with LLM(model, **SETTINGS) as llm:
        output = llm.chat([turn], **greedy, logit_bias={NUM_SPECIAL + ord("A"): 100.0})
        assert output.text == "AAAA"
        assert output.prompt_token_ids == prompts.encode(Generate(stream=0, messages=[turn])).token_ids
        assert llm.chat([turn], **greedy, logit_bias={2: 100.0}).finish_reason == "stop"
        assert llm.generate("<s>A", **greedy)[0].prompt_token_ids[:2] == [1, NUM_SPECIAL + ord("<")]


def test_a_setting_says_what_speaks_for_a_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer must be one of auto, mistral, tokenizers"):
        LLM(model, tokenizer="tekken", **SETTINGS)
    with pytest.raises(CheckpointError, match=r"tokenizer is tokenizers, which reads tokenizer\.json"):
        LLM(model, tokenizer="tokenizers", **SETTINGS)
    other = write_tekken(shutil.copytree(model, tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"it has 2113 tokens, the model 1024") as caught:
        LLM(other, **SETTINGS)
    assert caught.value.field == "vocab_size"


def test_tools_weigh_as_their_schemas_take_to_check() -> None:
    prompts, turn = PromptEncoder(), ChatMessage(role="user", content="x")
    bare = prompts.weight(Generate(stream=0, messages=[turn]))
    many = Generate(stream=0, messages=[turn], tools=[Tool(name="f")] * 3)
    assert prompts.weight(many) - bare >= 3 * TOOL_CHARS
    assert prompts.weight(Generate(stream=0, text="ab", suffix="cde")) == 5
