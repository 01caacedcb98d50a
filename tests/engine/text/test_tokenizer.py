"""Our reading of tokenizer.json against the tokenizers library itself."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.tokenizer import _BYTE_OF, LONG_TEXT_CHARS, Tokenizer, load_tokenizer

CORPUS = ["the quick brown fox, naïve café €5 🙂 日本語 and the lazy dog\n\tthe end  of the day"] * 3


def _byte_level():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_tokens(["<two words>", "plain€"])
    return inner


def _shape(inner, **parts):
    """The same tokenizer with other parts."""
    changed = tokenizers.Tokenizer.from_str(inner.to_str())
    for name, part in parts.items():
        setattr(changed, name, part)
    return changed


def _sentence_piece():
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "é",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>", "</s>", "<unk>"])
    return inner


INNERS = {"byte level": _byte_level(), "sentence piece": _sentence_piece()}
OURS = {name: Tokenizer(_shape(inner)) for name, inner in INNERS.items()}


@pytest.mark.parametrize("kind", INNERS)
@given(text=st.text("ab né€🙂\n the quick", max_size=30))
def test_text_comes_back(kind, text):
    inner, ours = INNERS[kind], OURS[kind]
    token_ids = ours.encode(text)
    assert token_ids == inner.encode(text).ids
    assert ours.decode(token_ids) == inner.decode(token_ids) == text


@given(st.lists(st.integers(0, 331), max_size=20))
def test_any_tokens_read_as_the_library_reads_them(token_ids):
    """Broken characters, special and added tokens included."""
    inner, ours = INNERS["byte level"], OURS["byte level"]
    expected = inner.decode(token_ids, skip_special_tokens=True)
    assert ours.decode(token_ids) == expected
    detokenizer = Detokenizer(ours)
    assert "".join([detokenizer.push([token_id]) for token_id in token_ids]) + detokenizer.flush() == expected


def test_long_texts_are_encoded_alike():
    text = CORPUS[0] * (LONG_TEXT_CHARS // len(CORPUS[0]) + 1)
    assert OURS["byte level"].encode(text) == INNERS["byte level"].encode(text).ids
    assert OURS["byte level"].encode_rendered("<s>" + text)[0] == INNERS["byte level"].token_to_id("<s>")


def test_a_beginning_of_text_is_put_once(tokenizer):
    assert tokenizer.encode("ab") == [256, 97, 98]
    assert tokenizer.encode("<s>ab") == [256, 97, 98]
    assert tokenizer.encode("<s><s>ab") == [256, *b"<s>ab"]
    assert 0 not in OURS["byte level"].encode("<s><s>a")  # it puts none itself
    assert tokenizer.encode_rendered("ab") == [97, 98]
    assert tokenizer.encode("") == [256]


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer):
    assert tokenizer.token_bytes(131_000) == b""
    assert tokenizer.decode([256, 104, 105, 258, 257]) == "hi<two words>"


def test_loading(tmp_path):
    assert load_tokenizer(tmp_path) is None
    assert PromptEncoder.load(tmp_path) == PromptEncoder(None, None)
    INNERS["byte level"].save(str(tmp_path / "tokenizer.json"))
    bos = INNERS["byte level"].token_to_id("<s>")
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ bos_token }}x"}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.spellings == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (loaded.eos_token, loaded.eos_token_id) == ("</s>", INNERS["byte level"].token_to_id("</s>"))
    encoder = PromptEncoder.load(tmp_path)
    message = Generate(stream=0, messages=[ChatMessage(role="user", content="Hi")])
    assert encoder.encode(message).token_ids == [bos, *loaded.encode_rendered("x")]


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{}"), ("tokenizer_config.json", '{"bos_token": 3}')]
)
def test_broken_files_are_named(tmp_path, name, text):
    INNERS["byte level"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.field == name


def test_an_unknown_decoder_is_refused():
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="unknown kind"):
        Tokenizer(inner)


@pytest.mark.parametrize("kind", INNERS)
@given(text=st.text("ab né€🙂\n the quick\u2581<s>", max_size=60))
def test_no_token_stands_for_more_bytes_than_the_longest(kind, text):
    tokenizer = OURS[kind]
    assert tokenizer.longest_token_bytes is not None
    ids = tokenizer.encode_rendered(text)
    assert len(text.encode()) <= len(ids) * tokenizer.longest_token_bytes


def test_the_longest_token_is_counted_in_bytes_of_text():
    added = [*tokenizers.Tokenizer.get_vocab(INNERS["byte level"], with_added_tokens=False)]
    spelled = max(len(OURS["byte level"].token_bytes(i)) for i in range(len(added)))
    assert OURS["byte level"].longest_token_bytes == max(spelled, len("<two words>"))
    assert OURS["sentence piece"].longest_token_bytes == len("<0x00>")


byte_level, sentence_piece = INNERS["byte level"], INNERS["sentence piece"]
swallowing = _shape(byte_level)
swallowing.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
removing = pre_tokenizers.Split(" ", "removed")
UNKNOWN = {
    "a token takes the spaces beside it": swallowing,
    "a text may get shorter": _shape(byte_level, normalizer=normalizers.NFKC()),
    "characters are replaced by none": _shape(byte_level, normalizer=normalizers.Replace("a", "")),
    "characters of a class are replaced": _shape(
        byte_level, normalizer=normalizers.Replace(tokenizers.Regex("a+"), "a")
    ),
    "spaces are removed": _shape(
        byte_level, pre_tokenizer=pre_tokenizers.Sequence([removing, pre_tokenizers.ByteLevel()])
    ),
    "bytes are not spelled": _shape(byte_level, pre_tokenizer=pre_tokenizers.Split(" ", "isolated")),
    "no bytes to fall back to": _shape(
        sentence_piece, model=models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True)
    ),
}


@pytest.mark.parametrize("why", UNKNOWN)
def test_where_a_token_may_stand_for_any_number_of_bytes_there_is_no_bound(why):
    tokenizer = Tokenizer(_shape(UNKNOWN[why]))
    assert tokenizer.longest_token_bytes is None
    assert PromptEncoder(tokenizer).max_text_bytes(10) is None
    assert PromptEncoder(tokenizer).encode(Generate(stream=0, text="a" * 1000), 10) is not None


def _without(*lost):
    """Single bytes without some."""
    chars = [char for char, byte in _BYTE_OF.items() if byte not in lost]
    return _shape(byte_level, model=models.BPE({char: number for number, char in enumerate(chars)}, []))


@given(st.text("ab\x04\U00050000\u20ac", max_size=50))
def test_bytes_that_no_token_has_do_not_count(text):
    tokenizer = LOSSY
    assert tokenizer.lost_bytes == b"\x04\xf1"
    kept = len(text.encode().translate(None, tokenizer.lost_bytes))
    num_tokens = len(tokenizer.encode_rendered(text))
    assert kept <= num_tokens * tokenizer.longest_token_bytes
    encoder = PromptEncoder(tokenizer)
    assert encoder.max_text_bytes(10) is None
    encoder.encode(Generate(stream=0, text=text), num_tokens)


def test_a_byte_that_no_text_has_may_be_in_no_token():
    tokenizer = Tokenizer(_without(0xC0, 0xFF))
    assert tokenizer.lost_bytes == b""
    assert PromptEncoder(tokenizer).max_text_bytes(1) == tokenizer.longest_token_bytes
    with pytest.raises(InvalidRequest, match="cannot fit"):
        PromptEncoder(LOSSY).encode(Generate(stream=0, text="a" * 200), 10)
    assert PromptEncoder(LOSSY).encode(Generate(stream=0, text="\x04" * 200), 10).token_ids == []


LOSSY = Tokenizer(_without(0x04, 0xF1))


def test_metaspace_and_digits_only_split():
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace()])
    assert Tokenizer(_shape(sentence_piece, normalizer=None, pre_tokenizer=splitter)).longest_token_bytes
