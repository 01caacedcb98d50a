"""The tokenizer inside a GGUF file -> tokenizer.json, tokenizer_config.json and chat_template.jinja.

Only SmolLM's kind is known: byte-level BPE in GPT-2's manner, with every digit split off by itself first. (The
`gguf_file=` of transformers 5.23 leaves the digit split out, so it cuts white space before a digit differently:
"  7" is one token for two spaces and one for the digit here, as the model was trained.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from cierzo.engine.errors import CheckpointError
from cierzo.engine.weights.writer import write_json

if TYPE_CHECKING:
    from gguf import GGUFReader

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type, llama.cpp's enum llama_token_type


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the special tokens; None where the file names none."""

    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None


def write_tokenizer(folder: Path, reader: GGUFReader) -> SpecialIds:
    """Write the tokenizer's files into `folder`; raises CheckpointError for a tokenizer of another kind."""
    kind = (_field(reader, "model"), _field(reader, "pre"))
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"GGUF tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r} is not supported, only gpt2 with smollm",
            field="tokenizer.ggml.pre",
            value=kind[1],
        )
    tokens: list[str] = _field(reader, "tokens")
    special = SpecialIds(
        bos=_field(reader, "bos_token_id"),
        eos=_field(reader, "eos_token_id"),
        unk=_field(reader, "unknown_token_id"),
        pad=_field(reader, "padding_token_id"),
    )
    leading = special.bos if _field(reader, "add_bos_token") else None
    tokenizer = build_tokenizer(tokens, _field(reader, "merges"), _field(reader, "token_type"), leading)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos": special.bos, "eos": special.eos, "unk": special.unk, "pad": special.pad}
    spelled = {f"{role}_token": tokens[index] for role, index in named.items() if index is not None}
    flags = {"add_bos_token": leading is not None, "add_prefix_space": False}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **flags, **spelled},
    )
    template = reader.get_field("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template.contents(), encoding="utf-8")
    return special


def build_tokenizer(
    tokens: list[str], merges: list[str], token_types: list[int], leading: int | None = None
) -> Tokenizer:
    """Byte-level BPE with single digits; control tokens are special, user-defined ones plain added tokens.

    leading: the id that is put before every text. It is part of tokenizer.json, as readers of that file pass over
    the `add_bos_token` of tokenizer_config.json.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, token_types, strict=True))
    tokenizer.add_special_tokens([_added(token, special=True) for token, kind in typed if kind == _CONTROL])
    tokenizer.add_tokens([_added(token, special=False) for token, kind in typed if kind == _USER_DEFINED])
    if leading is not None:
        token = tokens[leading]
        tokenizer.post_processor = processors.TemplateProcessing(f"{token}:0 $A:0", None, [(token, leading)])
    return tokenizer


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, normalized=False, special=special)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(f"tokenizer.ggml.{key}")
    return None if field is None else field.contents()
