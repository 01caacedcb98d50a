"""The checkpoint's tokenizer.json, without transformers: text to token ids, and the bytes of each token id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import tokenizers

from cierzo.engine.checkpoint_file import require_file
from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.text.control_tokens import ControlTokens, is_control
from cierzo.engine.text.tokenizer_config import TokenizerConfig, read_chat_templates, read_tokenizer_config
from cierzo.engine.text.unicode import refuse_surrogates

NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
LONG_TEXT_CHARS = 4096  # from here on the interpreter lock is released while encoding
# Tokens of families of models that fill in the middle: before the text, before its suffix, before the answer.
FIM_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)


class _Step(msgspec.Struct, frozen=True):
    """A node of tokenizer.json's "decoder"."""

    type: str
    decoders: list[_Step] = []
    content: str | None = None
    start: int = 0


class _Model(msgspec.Struct, frozen=True):
    """The rest of tokenizer.json's "model"."""

    type: str = ""
    byte_fallback: bool = False
    unk_token: str | None = None
    unk_id: int | None = None


class _Normalizer(msgspec.Struct, frozen=True):
    """A node of tokenizer.json's "normalizer"."""

    type: str = ""
    normalizers: list[_Normalizer] = []
    pattern: dict[str, str] = {}
    content: str = ""


class _PreTokenizer(msgspec.Struct, frozen=True):
    """A node of tokenizer.json's "pre_tokenizer"."""

    type: str = ""
    pretokenizers: list[_PreTokenizer] = []
    behavior: str = ""


class _File(msgspec.Struct, frozen=True):
    decoder: _Step | None = None
    model: _Model = _Model()
    normalizer: _Normalizer | None = None
    pre_tokenizer: _PreTokenizer | None = None


class Tokenizer:
    """Encodes and decodes. Knows the two ways in which tokens spell bytes: byte-level BPE (GPT-2, Tekken) and
    SentencePiece with byte fallback (Llama 2, older Mistral).

    control_ids: the tokens that no text of a client becomes, by how they are spelled: all special ones, and others
    that the checkpoint's chat templates, or everyone, use as markers.
    """

    kind = "tokenizers"

    def __init__(
        self, inner: tokenizers.Tokenizer, config: TokenizerConfig | None = None, templates: str = ""
    ) -> None:
        """Take `inner` over, and change it. templates: the sources of the chat templates.

        Raises CheckpointError for a decoder of another kind.
        """
        config = config or TokenizerConfig()
        file = msgspec.json.decode(inner.to_str(), type=_File)
        steps = _flat(file.decoder)
        kinds = {step.type for step in steps}
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and "ByteFallback" not in kinds:
            raise CheckpointError(
                "tokenizer.json has a decoder of unknown kind",
                field="decoder",
                limit="ByteLevel, ByteFallback",
                value=", ".join(sorted(kinds)) or None,
            )
        self.strip_leading_space = any(step.type == "Strip" and step.start > 0 for step in steps)
        self._inner = inner
        self._bytes: dict[int, bytes] = {}
        added = inner.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special and token.content}
        self.special_ids: Mapping[str, int] = special
        self._special = set(special.values())
        self.spellings = config.spellings
        self.eos_token = self.spellings.get("eos_token", "")
        self.eos_token_id: int | None = inner.token_to_id(self.eos_token) if self.eos_token else None
        self.longest_token_bytes = _longest_token_bytes(inner, file, self._byte_level)
        self.lost_bytes = _lost_bytes(inner) if self._byte_level else b""
        self._before, self._after = _put_around(inner)
        controls = {index: token for index, token in added.items() if is_control(token, templates)}
        self.control_ids: Mapping[str, int] = {token.content: index for index, token in controls.items()}
        unknown = file.model.unk_id if file.model.unk_token is None else inner.token_to_id(file.model.unk_token)
        self._controls = ControlTokens(inner, controls, config.split_special_tokens)
        self._never = set(controls) - {unknown}

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text, in which no text becomes a control token, behind a beginning-of-text token
        where the checkpoint wants one; the text may begin by spelling that one itself. Raises InvalidRequest for
        what is no Unicode text."""
        refuse_surrogates("text", text)
        controls = self._controls
        begins = self._before == [controls.leading_id(text)]
        ids = self._ids(controls.call_leading(text) if begins else text, "text")
        return [*([] if begins else self._before), *ids, *self._after]

    def encode_piece(self, text: str) -> list[int]:
        """Token ids of a text alone: nothing is put around it, and nothing in it becomes a control token."""
        refuse_surrogates("text", text)
        return self._ids(text, "text")

    def encode_spelled(self, text: str, *, alone: bool) -> list[int]:
        """Token ids of a text whose spellings of control tokens are those tokens; `alone`, or with what is put
        around a text, unless it begins with that itself."""
        refuse_surrogates("text", text)
        ids = self._ids(self._controls.call_all(text), "text")
        if alone:
            return ids
        before = [] if ids[: len(self._before)] == self._before else self._before
        return [*before, *ids, *self._after]

    def encode_middle(self, text: str, suffix: str) -> list[int]:
        """Token ids of the prompt for what comes between two texts. Raises InvalidRequest where the vocabulary has
        no tokens to ask for it, and for what is no Unicode text."""
        markers = next((names for names in FIM_TOKENS if all(name in self.control_ids for name in names)), None)
        if markers is None:
            raise InvalidRequest(
                "the served model does not fill in the middle: its vocabulary has no tokens for it",
                field="suffix",
                limit="left out",
                value=suffix,
            )
        refuse_surrogates("text", text)
        refuse_surrogates("suffix", suffix)
        prefix, hole, middle = map(self._controls.call, markers)
        return [*self._before, *self._ids(f"{prefix}{text}{hole}{suffix}{middle}", "text")]

    def encode_rendered(self, text: str, mark: str = "") -> list[int]:
        """Token ids of a rendered chat, which spells out its control tokens itself; but not where `mark` breaks the
        spelling. Raises InvalidRequest for what is no Unicode text."""
        refuse_surrogates("messages", text)
        return self._ids(self._controls.call_all(text, mark), "messages")

    def spelled_controls(self, text: str) -> list[str]:
        """The control tokens that a rendered chat spells, in order, also where one beside a letter is none."""
        return self._controls.spelled(text)

    def _ids(self, text: str, field: str) -> list[int]:
        """Token ids of a text that calls control tokens by their secret names."""
        controls = self._controls
        ids = self._encode(text)
        if not self._never.isdisjoint(ids):  # a word of the vocabulary is spelled like a control token
            ids = controls.without_cuts(self._encode(controls.cut(text)))
            if found := self._never.intersection(ids):
                value = self._inner.id_to_token(found.pop())
                raise InvalidRequest(
                    f"{field} spells {value}, which the tokenizer can only write as a control token",
                    field=field,
                    value=value,
                )
        return controls.real(ids) if controls.secret in text else ids

    def _encode(self, text: str) -> list[int]:
        if len(text) < LONG_TEXT_CHARS:
            ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
            return ids
        # `encode` keeps the interpreter lock: a long text would stall the front end even from a thread.
        return list(self._inner.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, without special tokens."""
        text = b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strip_leading_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes in the text; empty for special tokens and for ids the tokenizer does not have."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spelled(token_id)
        return known

    def _spelled(self, token_id: int) -> bytes:
        without_text = token_id in self._special or token_id >= self._controls.first_id
        hidden, named = self._controls.hidden, self._inner.id_to_token
        token: str | None = None if without_text else hidden.get(token_id, named(token_id))
        if token is None:
            return b""
        if self._byte_level:
            # Added tokens may hold characters that stand for no byte: then they are plain text.
            spelled = [_BYTE_OF.get(char) for char in token]
            return token.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()


def load_tokenizer(checkpoint_dir: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint, None where there is no tokenizer.json; raises CheckpointError."""
    path = checkpoint_dir / "tokenizer.json"
    require_file(path)
    if not path.exists():
        return None
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} cannot be read: {error}", field="tokenizer.json") from error
    inner.no_padding()
    inner.no_truncation()
    config = read_tokenizer_config(checkpoint_dir)
    _apply(config, inner)
    return Tokenizer(inner, config, "\n".join(read_chat_templates(checkpoint_dir).values()))


def _put_around(inner: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The token ids that come before and after each text."""
    whole = inner.encode("a", add_special_tokens=True)
    places = [place for place, sequence in enumerate(whole.sequence_ids) if sequence is not None]
    return (whole.ids[: places[0]], whole.ids[places[-1] + 1 :]) if places else (whole.ids, [])


def _apply(config: TokenizerConfig, inner: tokenizers.Tokenizer) -> None:
    """Make the tokens that the configuration names match whole, and those with a role special, as transformers
    does.

    Transformers gives a name that tokenizer.json lacks a new id, for which no model was trained. Here it is a token
    only if the configuration declares this very id for it.
    """
    declared = sorted(config.declared.items())
    added = {token.content: token for token in inner.get_added_tokens_decoder().values()}
    tokens = added | {token.content: token for _, token in declared}
    for token in (*config.named.values(), *config.extra):
        tokens.setdefault(token.content, token)
    for token in (*config.named.values(), *(token for token in added.values() if token.special)):
        tokens[token.content].special = True
    known = {content for content in tokens if inner.token_to_id(content) is not None}
    next_id = inner.get_vocab_size()
    for index, token in declared:
        if token.content not in known and index == next_id:
            known.add(token.content)
            next_id += 1
    inner.add_tokens([token for content, token in tokens.items() if content in known])
    inner.encode_special_tokens = config.split_special_tokens


def _longest_token_bytes(inner: tokenizers.Tokenizer, file: _File, byte_level: bool) -> int | None:
    """UTF-8 bytes of a text that a token stands for at the most, but for `lost_bytes`; None for any number.

    That is so where spaces beside an added token belong to it, and where parts of a text come into no token.
    """
    vocabulary = inner.get_vocab(with_added_tokens=False)
    added = inner.get_added_tokens_decoder().values()
    if byte_level:
        keeps_all = _is_byte_level(file)
    else:
        keeps_all = file.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if (
        not keeps_all
        or file.model.type != "BPE"
        or not _keeps_bytes(file.normalizer)
        or not _splits_only(file.pre_tokenizer)
        or any(token.lstrip or token.rstrip for token in added)
    ):
        return None
    spelled = (len(token) if byte_level else len(token.encode()) for token in vocabulary)
    return max(max(spelled), max((len(token.content.encode()) for token in added), default=0))


def _lost_bytes(inner: tokenizers.Tokenizer) -> bytes:
    """Bytes that a text may have and no token has: the library drops them in silence."""
    vocabulary = inner.get_vocab(with_added_tokens=False)
    lost = {byte for char, byte in _BYTE_OF.items() if char not in vocabulary}
    return bytes(sorted(lost - NEVER_IN_UTF8))


def _is_byte_level(file: _File) -> bool:
    """Whether texts are spelled in the alphabet of bytes before they are looked up."""
    normalizer, splitter = file.normalizer or _Normalizer(), file.pre_tokenizer or _PreTokenizer()
    kinds = {node.type for node in (normalizer, *normalizer.normalizers)}
    return "ByteLevel" in kinds | {node.type for node in (splitter, *splitter.pretokenizers)}


def _keeps_bytes(node: _Normalizer | None) -> bool:
    """Whether a text never gets shorter by this: SentencePiece's marks for spaces are longer than spaces."""
    if node is None or node.type in ("Prepend", "ByteLevel"):
        return True
    if node.type == "Sequence":
        return all(map(_keeps_bytes, node.normalizers))
    return node.type == "Replace" and 0 < len(node.pattern.get("String", "").encode()) <= len(node.content.encode())


def _splits_only(node: _PreTokenizer | None) -> bool:
    """Whether all of a text is in some piece of it."""
    if node is None or node.type in ("ByteLevel", "Metaspace", "Digits"):
        return True
    if node.type == "Sequence":
        return all(map(_splits_only, node.pretokenizers))
    return node.type == "Split" and node.behavior != "Removed"


def _flat(step: _Step | None) -> list[_Step]:
    if step is None:
        return []
    return [step, *(inner for child in step.decoders for inner in _flat(child))]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the others for 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
