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
from cierzo.engine.fields import Fields
from cierzo.engine.weights.writer import write_json

if TYPE_CHECKING:
    from gguf import GGUFReader

TOKENIZER = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type, llama.cpp's enum llama_token_type
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # each ends a generation
# What would change the tokens of a text, and is off in SmolLM's kind.
_OFF = ("add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces")
# Keys without a bearing on the tokens of a text: other kinds' scores, and ids that nobody asks for by these names.
_IDLE = ("scores", "token_type_count", "seperator_token_id", "cls_token_id", "mask_token_id")
_INFILL = ("fim_", "prefix_token_id", "suffix_token_id", "middle_token_id")


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """A tokenizer out of a GGUF file. special: role ("bos") -> id, None where the file names none; ends: all ids
    that end a generation."""

    tokens: list[str]
    merges: list[str]
    token_types: list[int]
    special: dict[str, int | None]
    ends: tuple[int, ...]
    add_bos_token: bool
    chat_template: str | None

    @property
    def ids(self) -> dict[str, object]:
        """Special tokens' ids, under the names that config.json and generation_config.json give them."""
        ids = dict(self.special, eos=None if not self.ends else self.ends[0])
        named: dict[str, object] = {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad")}
        return named | ({"eos_token_id": list(self.ends)} if len(self.ends) > 1 else {})

    def write(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja."""
        leading = self.special["bos"] if self.add_bos_token else None
        tokenizer = build_tokenizer(self.tokens, self.merges, self.token_types, leading)
        tokenizer.save(str(folder / "tokenizer.json"))
        spelled = {f"{role}_token": self.tokens[i] for role, i in self.special.items() if i is not None}
        flags = {"add_bos_token": leading is not None, "add_prefix_space": False}
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **flags,
                **spelled,
            },
        )
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def read_tokenizer(reader: GGUFReader, ggml: Fields) -> GgufTokenizer:
    """The tokenizer that the metadata describe. ggml: those below `TOKENIZER`. Raises CheckpointError naming the
    key for a tokenizer of another kind, and for what this kind does not do."""
    kind = (ggml.string("model"), ggml.get("pre", None))
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"GGUF tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r} is not supported, only gpt2 with smollm",
            field=f"{TOKENIZER}pre",
            value=kind[1],
        )
    tokens = _listed(ggml, "tokens", str)
    special = {role: _id(ggml, name, len(tokens)) for role, name in _ROLES.items()}
    ends = [_id(ggml, name, len(tokens)) for name in _ENDS]
    for name in _OFF:
        ggml.only(name, (False,), default=False)
    template = reader.get_field("tokenizer.chat_template")
    found = GgufTokenizer(
        tokens=tokens,
        merges=_listed(ggml, "merges", str),
        token_types=_listed(ggml, "token_type", int),
        special=special,
        ends=tuple(dict.fromkeys(end for end in ends if end is not None)),
        add_bos_token=ggml.boolean("add_bos_token", False),
        chat_template=None if template is None else template.contents(),
    )
    if len(found.token_types) != len(tokens):
        raise ggml.error("token_type", f"{len(found.token_types)} types", f"one for each of {len(tokens)} tokens")
    for name in ggml.unread():
        if name not in _IDLE and not name.startswith(_INFILL):
            raise ggml.error(name, ggml.get(name), "left out: it is not known here")
    return found


def _listed(ggml: Fields, name: str, kind: type) -> list[Any]:
    values = ggml.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, kind) for value in values):
        raise ggml.error(name, type(values).__name__, f"a list of {kind.__name__}")
    return values


def _id(ggml: Fields, name: str, num_tokens: int) -> int | None:
    token_id = ggml.optional_integer(name, default=None, minimum=0)
    if token_id is not None and token_id >= num_tokens:
        raise ggml.error(name, token_id, f"below the number of tokens, {num_tokens}")
    return token_id


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
