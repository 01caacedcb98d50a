"""tokenizer_config.json in all its forms: prompts get the ids, and templates the tokens, that transformers'
AutoTokenizer gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate
from cierzo.engine.text.chat import load_chat_template
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.tokenizer import _BYTE_OF, load_tokenizer
from cierzo.engine.text.tokenizer_config import read_chat_templates

SPECIAL = ("<unk>", "<s>", "</s>")
TEXTS = ("hi", "", "a</s>b <|im_end|> <tool>h</tool>", "é\n🙂  <new> x", "<s>", "</s>")
TURNS = [ChatMessage(role="user", content="hi")]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _write(folder: Path, *, adds_bos: bool = True, **files: object) -> Path:
    """A byte-level tokenizer in which <|im_end|> is an added token that is not special, and <tool> an ordinary one
    of the vocabulary; and other files by their names without suffix. A value that is text is written as it is."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *_BYTE_OF, "<tool>"))}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    inner.add_tokens([tokenizers.AddedToken("<|im_end|>", special=False, normalized=False, rstrip=True)])
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", vocabulary["<s>"])])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def _added(content: str, **options: bool) -> dict[str, object]:
    fields = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return {"__type": "AddedToken", "content": content, **dict.fromkeys(fields, False), **options}


CONFIGS: dict[str, dict[str, object]] = {
    "missing": {},
    "empty": {"tokenizer_config": {}},
    "plain": {"tokenizer_config": NAMED},
    "without a post-processor": {"tokenizer_config": NAMED, "adds_bos": False},
    "add_bos_token null": {"tokenizer_config": NAMED | {"add_bos_token": None}},
    "add_bos_token false": {"tokenizer_config": NAMED | {"add_bos_token": False}},
    "add_bos_token true": {"tokenizer_config": NAMED | {"add_bos_token": True}},
    "add_bos_token true, without a post-processor": {
        "tokenizer_config": NAMED | {"add_bos_token": True, "add_eos_token": True},
        "adds_bos": False,
    },
    "add_bos_token true, bos_token null": {
        "tokenizer_config": NAMED | {"add_bos_token": True, "bos_token": None},
        "adds_bos": False,
    },
    "add_eos_token": {"tokenizer_config": NAMED | {"add_eos_token": True}},
    "add_eos_token null": {"tokenizer_config": NAMED | {"add_eos_token": None}},
    "LlamaTokenizerFast": {"tokenizer_config": NAMED | {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}},
    "nulls": {
        "tokenizer_config": {
            **dict.fromkeys((*NAMED, "pad_token", "chat_template", "extra_special_tokens", "tokenizer_class")),
            "additional_special_tokens": None,
            "image_token": None,
        }
    },
    "unknown fields": {
        "tokenizer_config": NAMED
        | {"model_max_length": 1000000000000000019884624838656, "x_token": 3, "y": {"z": []}, "add_z_token": True}
    },
    "numbers that JSON lacks": {"tokenizer_config": '{"eos_token": "</s>", "model_max_length": Infinity}'},
    "eos_token as an object": {"tokenizer_config": NAMED | {"eos_token": _added("</s>", special=True)}},
    "eos_token is an added token": {"tokenizer_config": NAMED | {"eos_token": "<|im_end|>"}},
    "eos_token is of the vocabulary": {"tokenizer_config": NAMED | {"eos_token": "<tool>"}},
    "pad_token strips": {"tokenizer_config": NAMED | {"pad_token": _added("<tool>", lstrip=True, rstrip=True)}},
    "a role of its own": {"tokenizer_config": NAMED | {"image_token": "<tool>", "audio_token": _added("</s>")}},
    "extra": {"tokenizer_config": NAMED | {"extra_special_tokens": ["<tool>", "<s>"]}},
    "extra is an added token": {"tokenizer_config": NAMED | {"extra_special_tokens": ["<|im_end|>"]}},
    "extra by role": {"tokenizer_config": NAMED | {"extra_special_tokens": {"x": "<tool>", "y_token": "</s>"}}},
    "additional": {"tokenizer_config": NAMED | {"additional_special_tokens": ["<tool>", _added("</s>")]}},
    "model specific": {"tokenizer_config": NAMED | {"model_specific_special_tokens": {"zed": "<tool>"}}},
    "declared": {"tokenizer_config": NAMED | {"added_tokens_decoder": {"259": _added("<tool>", special=True)}}},
    "declared as special": {
        "tokenizer_config": NAMED | {"added_tokens_decoder": {"260": _added("<|im_end|>", special=True)}}
    },
    "declared as not special": {
        "tokenizer_config": {"added_tokens_decoder": {"2": {"content": "</s>", "normalized": False}}}
    },
    "declared as not special, but with a role": {
        "tokenizer_config": NAMED | {"added_tokens_decoder": {"2": {"content": "</s>"}}}
    },
    "declared new": {
        "tokenizer_config": NAMED
        | {"added_tokens_decoder": {"262": _added("<x>"), "261": _added("<new>", special=True)}}
    },
    "split_special_tokens": {"tokenizer_config": NAMED | {"split_special_tokens": True}},
    "special_tokens_map alone": {
        "special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    },
    "special_tokens_map beside": {
        "tokenizer_config": NAMED,
        "special_tokens_map": {"eos_token": "<|im_end|>", "bos_token": None, "pad_token": "<tool>"},
    },
    "special_tokens_map beside declared tokens": {
        "tokenizer_config": NAMED | {"added_tokens_decoder": {}},
        "special_tokens_map": {"eos_token": "<|im_end|>", "pad_token": "<tool>"},
    },
    "special_tokens_map, additional": {
        "tokenizer_config": NAMED,
        "special_tokens_map": {"additional_special_tokens": ["<tool>"]},
    },
    "added_tokens": {"tokenizer_config": NAMED, "added_tokens": {"<new>": 261, "<tool>": 259}},
}


@pytest.mark.parametrize("files", CONFIGS.values(), ids=CONFIGS)
def test_prompts_and_tokens_are_those_of_transformers(tmp_path, files):
    _write(tmp_path, **files)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.spellings == theirs.special_tokens_map
    assert ours.eos_token_id == theirs.eos_token_id
    added = {token.content: i for i, token in theirs.added_tokens_decoder.items()}
    without_text = {content: i for content, i in added.items() if not theirs.decode(i, skip_special_tokens=True)}
    assert ours.special_ids == without_text
    for text in TEXTS:
        token_ids = theirs(text)["input_ids"]
        if not any(token in text for token in ours.control_ids):  # which are text there
            assert ours.encode(text) == token_ids
        assert ours.encode_rendered(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


def test_the_oracle_tells_the_forms_apart(tmp_path):
    seen = set()
    for number, files in enumerate(CONFIGS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        theirs = AutoTokenizer.from_pretrained(_write(folder, **files))
        seen.add(json.dumps([theirs(text)["input_ids"] for text in TEXTS] + [theirs.special_tokens_map]))
    assert len(seen) > 12


@pytest.mark.parametrize("token", ["<zz>", "", {"content": "</s>", "lstrip": False}])
def test_forms_that_transformers_reads_otherwise(tmp_path, token):
    """It invents an id for an unknown token, and refuses an object that does not say that it is an AddedToken."""
    ours = load_tokenizer(_write(tmp_path, tokenizer_config=NAMED | {"eos_token": token}))
    assert ours.eos_token_id == (2 if isinstance(token, dict) else None)
    assert max(ours.encode("<zz>")) < 260


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config", "{"),
        ("tokenizer_config", "[]"),
        ("tokenizer_config", "\ufeff{}"),
        ("tokenizer_config", "[" * 100_000),
        ("tokenizer_config", {"eos_token": 3}),
        ("tokenizer_config", {"eos_token": False}),
        ("tokenizer_config", {"eos_token": ["</s>"]}),
        ("tokenizer_config", {"pad_token": {"text": "</s>"}}),
        ("tokenizer_config", {"eos_token": "\ud800"}),
        ("tokenizer_config", {"extra_special_tokens": 3}),
        ("tokenizer_config", {"extra_special_tokens": [3]}),
        ("tokenizer_config", {"added_tokens_decoder": ["</s>"]}),
        ("tokenizer_config", {"added_tokens_decoder": {"two": {"content": "</s>"}}}),
        ("tokenizer_config", {"chat_template": 3}),
        ("tokenizer_config", {"chat_template": [{"name": "default"}]}),
        ("tokenizer_config", {"chat_template": {"default": 3}}),
        ("special_tokens_map", "nonsense"),
        ("special_tokens_map", '"</s>"'),
        ("added_tokens", "[3]"),
        ("chat_template", "{"),
        ("chat_template", "null"),
        ("chat_template", {"chat_template": ["x"]}),
        ("processor_config", {"chat_template": {"default": None}}),
    ],
)
def test_broken_files_are_named(tmp_path, name, content):
    with pytest.raises(CheckpointError, match=f"{name}.json") as caught:
        PromptEncoder.load(_write(tmp_path, **{name: content}))
    assert caught.value.field == f"{name}.json"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    _write(tmp_path, tokenizer_config="\xff").joinpath("tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


# --- chat templates -----------------------------------------------------------------------------------------

NAMES = {"default": "d", "tool_use": "t"}
LISTED = [{"name": name, "template": text} for name, text in NAMES.items()]
PLACES: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "nowhere": ({}, {}),
    "null": ({"tokenizer_config": {"chat_template": None}}, {}),
    "no text": ({"tokenizer_config": {"chat_template": ""}}, {}),
    "one": ({"tokenizer_config": {"chat_template": "c{{ bos_token }}", **NAMED}}, {}),
    "by name": ({"tokenizer_config": {"chat_template": NAMES}}, {}),
    "a list": ({"tokenizer_config": {"chat_template": LISTED}}, {}),
    "no default": ({"tokenizer_config": {"chat_template": {"rag": "r", "tool_use": "t"}}}, {}),
    "no default in a list": ({"tokenizer_config": {"chat_template": LISTED[1:]}}, {}),
    "a file": ({}, {"chat_template.jinja": "j"}),
    "an empty file": ({"tokenizer_config": {"chat_template": "c"}}, {"chat_template.jinja": ""}),
    "a file before the config": ({"tokenizer_config": {"chat_template": NAMES}}, {"chat_template.jinja": "j"}),
    "a folder": ({}, {"chat_template.jinja": "j", "additional_chat_templates/tool_use.jinja": "u"}),
    "a folder before the config": (
        {"tokenizer_config": {"chat_template": "c"}},
        {"additional_chat_templates/tool_use.jinja": "u", "additional_chat_templates/readme.txt": "no"},
    ),
    "a default in the folder": (
        {},
        {"chat_template.jinja": "j", "additional_chat_templates/default.jinja": "other"},
    ),
    "the config before the processor's": (
        {"tokenizer_config": {"chat_template": "c"}, "chat_template": {"chat_template": "p"}},
        {},
    ),
}


def _files(folder: Path, files: dict[str, object], texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return _write(folder, **files)


@pytest.mark.parametrize(("files", "texts"), PLACES.values(), ids=PLACES)
def test_templates_are_found_where_transformers_finds_them(tmp_path, files, texts):
    _files(tmp_path, files, texts)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), PromptEncoder.load(tmp_path)
    named = theirs.chat_template if isinstance(theirs.chat_template, dict) else {"default": theirs.chat_template}
    assert read_chat_templates(tmp_path) == {name: text for name, text in named.items() if text is not None}
    try:
        expected = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    except ValueError:
        expected = None
    assert (ours.template and ours.template.template.render(TURNS)) == expected
    if expected is None:
        names = ", ".join(name for name, text in sorted(named.items()) if text is not None)
        with pytest.raises(InvalidRequest, match=names or "no chat template") as caught:
            ours.encode(Generate(stream=0, messages=TURNS))
        assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template": {"chat_template": "p{{ bos_token }}"}, "tokenizer_config": NAMED}, "p<s>"),
        ({"chat_template": {"chat_template": NAMES}}, "d"),
        ({"chat_template": {"chat_template": LISTED}}, "d"),
        ({"chat_template": {"chat_template": {"tool_use": "t"}}}, None),
        ({"chat_template": {"chat_template": None}}, None),
        ({"processor_config": {"chat_template": "q"}, "chat_template": {"chat_template": "p"}}, "q"),
        ({"processor_config": {"processor_class": "X"}, "chat_template": {"chat_template": "p"}}, "p"),
    ],
)
def test_templates_of_processors_are_read_where_the_tokenizer_has_none(tmp_path, files, expected):
    """As ProcessorMixin.get_processor_dict reads them."""
    template = load_chat_template(_write(tmp_path, **files))
    assert (template and template.render(TURNS)) == expected
