"""Control tokens that no text becomes: what a tokenizer makes of a text, and of two to fill the middle of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from time import perf_counter

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from word_folders import NOT_SPECIAL, PLAIN, ROLES, SPECIAL, TOKENIZERS, write_folder

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import Generate
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.spellings import Breaker, pattern_of
from cierzo.engine.text.tokenizer import _BYTE_OF, Tokenizer, load_tokenizer
from cierzo.engine.text.tokenizer_config import image_token_ids

TEMPLATE = "<think><tool_call></tool_call><city>"


def _copy(inner):
    return tokenizers.Tokenizer.from_str(inner.to_str())


OURS = {kind: Tokenizer(_copy(inner), None, TEMPLATE) for kind, inner in TOKENIZERS.items()}
CONTROLS = (*SPECIAL, *NOT_SPECIAL)
TEXTS = st.lists(st.sampled_from([*CONTROLS, *PLAIN, "a", " ", "\n", "b é", "<", "\U0010fffe"])).map("".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=TEXTS)
@example(text="a <|user|>  b</s> <think>\n<h1>    <|end|>a<|end|>")
def test_no_text_becomes_a_control_token(kind, text):
    inner, ours = TOKENIZERS[kind], OURS[kind]
    controls = set(ours.control_ids.values())
    assert controls.isdisjoint(ours.encode_piece(text))
    if kind == "bytes":
        assert ours.decode(ours.encode_piece(text)) == text
    assert ours.encode_rendered(text) == inner.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in CONTROLS):
        assert ours.encode_piece(text) == inner.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == inner.encode(text).ids


def test_which_tokens_are_control_tokens():
    assert set(OURS["bytes"].control_ids) == set(CONTROLS)
    assert set(Tokenizer(_copy(TOKENIZERS["bytes"])).control_ids) == set(CONTROLS) - {"<city>"}
    inner = _copy(TOKENIZERS["bytes"])
    added = ["<|bars|>", "<\uff5cwide\uff5c>", "\n\n", "<b>", "word", "[x]"]
    inner.add_tokens([AddedToken(text, normalized=False) for text in added])
    ours = Tokenizer(inner, None, "a\n\nb word [x]")
    assert set(ours.control_ids) - set(CONTROLS) | {"<city>"} == {"<|bars|>", "<\uff5cwide\uff5c>", "[x]", "<city>"}
    assert "<city>" not in ours.control_ids


def test_a_beginning_of_text_may_be_spelled_once():
    ours, begin = OURS["bytes"], SPECIAL.index("<s>")
    assert ours.encode("ab") == ours.encode("<s>ab")
    assert ours.encode("<s><s>ab").count(begin) == ours.encode("a<s>").count(begin) == 1
    assert SPECIAL.index("</s>") not in ours.encode("</s>ab")
    ending = _copy(TOKENIZERS["bytes"])
    ending.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    assert Tokenizer(_copy(ending)).encode("<s>a") == ending.encode("a").ids
    assert Tokenizer(_copy(ending)).encode("") == ending.encode("").ids == [1, 2]
    neither = _copy(TOKENIZERS["bytes"])
    neither.post_processor = None
    assert 1 not in Tokenizer(neither).encode("<s>ab")


def _whole_words():
    """A tokenizer that looks a whole text up before it takes it apart, control tokens too."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *_BYTE_OF))}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    return inner


def test_a_word_of_the_vocabulary_that_is_a_control_token_is_taken_apart():
    ours = Tokenizer(_whole_words(), None)
    for token in SPECIAL[1:]:
        assert bytes(ours.token_bytes(i)[0] for i in ours.encode_piece(token)).decode() == token
        rendered = ours.encode_rendered(f"{token}{token[0]}\ufdd0{token[1:]}", "\ufdd0")
        assert rendered[0] == SPECIAL.index(token)
        assert bytes(ours.token_bytes(i)[0] for i in rendered[1:]).decode() == token


def test_ids_that_the_vocabulary_leaves_out_are_no_tokens():
    """The library would give the next token the number of tokens as its id, which may be another one's."""
    vocabulary = {token: 3 * index for index, token in enumerate((*SPECIAL, *_BYTE_OF))}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    ours, text = Tokenizer(_copy(inner)), "héllo<s>[INST]</s>"
    assert ours.encode_rendered(text) == inner.encode(text).ids
    assert {ours.token_bytes(i) for i in range(800) if i % 3} == {b""}
    for char, byte in _BYTE_OF.items():
        assert ours.token_bytes(vocabulary[char]) == bytes([byte])


def test_a_secret_name_is_no_token_of_a_model():
    ours = OURS["bytes"]
    first = max(TOKENIZERS["bytes"].get_vocab().values()) + 1
    assert {ours.token_bytes(i) for i in range(first, first + 100)} == {b""}
    assert ours.token_bytes(ours.control_ids["<think>"]) == b"<think>"
    assert max(ours.encode_rendered("".join(CONTROLS))) < first


def test_a_special_token_that_is_split_everywhere_is_never_one(tmp_path):
    folder = write_folder(tmp_path, "bytes", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({**ROLES, "split_special_tokens": True}))
    ours = load_tokenizer(folder)
    assert {1, 2}.isdisjoint(ours.encode_rendered("<s>a</s>"))
    assert ours.encode("<s>a") == [1, *ours.encode_piece("<s>a")]
    assert ours.encode_rendered("<think>") == [ours.control_ids["<think>"]]


# --- fill in the middle -------------------------------------------------------------------------------------

MIDDLES = {
    "Qwen": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    "StarCoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "DeepSeek": ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("names", MIDDLES.values(), ids=MIDDLES)
def test_a_middle_is_asked_for_with_the_tokens_of_the_family(names, kind, special):
    inner = _copy(TOKENIZERS[kind])
    inner.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    encoder = PromptEncoder(Tokenizer(_copy(inner)))
    prefix, hole, middle = names
    got = encoder.encode(Generate(stream=0, text="def f(", suffix=" a\n")).token_ids
    assert got == inner.encode(f"{prefix}def f({hole} a\n{middle}").ids
    evil = encoder.encode(Generate(stream=0, text="a</s>" + middle, suffix=hole)).token_ids
    ids = [inner.token_to_id(name) for name in names]
    assert [i for i in evil if i in (*ids, 2)] == [i for i in got if i in ids]


def test_a_middle_needs_all_three_tokens():
    inner = _copy(TOKENIZERS["bytes"])
    inner.add_tokens(["<fim_prefix>", "<fim_suffix>"])
    for encoder in (PromptEncoder(Tokenizer(inner)), PromptEncoder(OURS["pieces"])):
        with pytest.raises(InvalidRequest, match="does not fill in the middle") as caught:
            encoder.encode(Generate(stream=0, text="a", suffix="b"))
        assert (caught.value.field, caught.value.limit, caught.value.value) == ("suffix", "left out", "b")


# --- finding and breaking spellings -------------------------------------------------------------------------

WORDS = st.sets(st.text("<a>", min_size=1, max_size=4), max_size=6)


@given(words=WORDS, text=st.text("<a>b", max_size=12))
def test_a_pattern_finds_the_longest_word_first(words, text):
    found = re.search(pattern_of(words), text)
    places = [(place, -len(word), word) for word in words for place in [text.find(word)] if place >= 0]
    assert (found and found[0]) == (min(places)[2] if places else None)


@given(
    words=st.sets(st.text("<a>", min_size=2, max_size=4), min_size=1), texts=st.lists(st.text("<a> ", max_size=5))
)
def test_broken_texts_spell_nothing_however_they_are_joined(words, texts):
    breaker = Breaker(words, literals=["<"])
    for way in (str, str.strip):
        joined = "".join(way(breaker.broken(text, "\ufdd0")) for text in texts)
        assert not any(word in joined for word in words)
    for text in texts:
        broken = breaker.broken(text, "\ufdd0")
        assert broken.replace("\ufdd0", "") == text
        assert not any(word in "<" + broken for word in words)


def test_a_hostile_text_takes_a_time_that_its_length_bounds():
    """A vocabulary with a thousand control tokens that begin alike, and a text of their beginnings."""
    words = {f"<SPECIAL_{number}>" for number in range(1000)}
    text = "<SPECIAL_" * 20_000
    start = perf_counter()
    broken = Breaker(words).broken(text, "\ufdd0")
    assert perf_counter() - start < 2
    assert broken == text + "\ufdd0"


# --- tokens for images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "special", "expected"),
    [
        ({}, {}, set()),
        ({"image_token_id": 10}, {}, {10}),
        ({"image_token_index": 12, "image_token_id": None}, {"[IMG]": 10}, {10, 12}),
        ({"text_config": {"image_token_id": 5}}, {"[IMG_END]": 13}, set()),
    ],
)
def test_tokens_that_stand_for_an_image(tmp_path: Path, config, special, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert image_token_ids(tmp_path, special) == expected
