"""Facts about a checkpoint's tokenizer and chats, read from its files without making a tokenizer: which one speaks,
what its chats know. `cierzo info` prints them; whether it can be served is up to `PromptEncoder`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from cierzo.engine.errors import CheckpointError
from cierzo.engine.text.tokenizer_config import read_chat_templates, read_object, read_tokenizer_config
from cierzo.engine.text.vocabulary import TEKKEN_FILE, TOKENIZER_FILE

MISTRAL_COMMON: Literal["mistral-common"] = "mistral-common"
# What a chat can do, and the marks of it: one of them is in the template, or among the control tokens.
_ABILITIES = {
    "thinking": ("[THINK]", "<think>"),
    "tool calls": ("[TOOL_CALLS]", "<tool_call>", "<|python_tag|>", "tool_calls"),
    "fill in the middle": ("[SUFFIX]",),
}
_OF_TEMPLATES = ("thinking", "tool calls")
_USUAL = {"[INST]", "[TOOL_CALLS]", "[SUFFIX]"}  # among mistral-common's own, where a tekken.json lists none


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """The tokenizer of a folder and its chats. library: what reads `file`; "" where the folder has none.

    num_tokens: ids that it may give; 0 where the file cannot be read. unused: files of others. chat: where
    prompts of conversations come from, "" for nowhere. efforts: what `reasoning_effort` may say; None where that is
    up to the template.
    """

    library: Literal["", "mistral-common", "tokenizers"] = ""
    file: str = ""
    version: str = ""
    num_tokens: int = 0
    unused: tuple[str, ...] = ()
    chat: str = ""
    abilities: tuple[str, ...] = ()
    efforts: tuple[str, ...] | None = ()

    def rows(self, vocab_size: int | None) -> Iterator[tuple[str, str]]:
        """Labels and what `cierzo info` prints beside them. vocab_size: the model's."""
        if not self.library:
            yield "tokenizer", "none: prompts are token ids"
            return
        if not self.num_tokens:
            yield "tokenizer", f"{self.file}, read by {self.library}: REFUSED, see below"
            return
        version = f" {self.version}" if self.version else ""
        of_model = "" if vocab_size is None else f" for the model's {vocab_size:,}"
        yield "tokenizer", f"{self.file}{version}, read by {self.library}: {self.num_tokens:,} tokens{of_model}"
        if self.unused:
            yield "", f"not used beside it: {', '.join(self.unused)}"
        if not self.chat:
            yield "chat", "none: prompts are texts or token ids"
            return
        yield "chat", ", ".join((self.chat, *self.abilities))
        if self.efforts is None:
            yield "", "the chat template reads reasoning_effort"
        elif self.efforts:
            yield "", f"reasoning_effort {' or '.join(self.efforts)}"


class _TekkenConfig(msgspec.Struct):
    version: str = ""
    default_vocab_size: int = 0


class _Special(msgspec.Struct):
    token_str: str = ""


class _Effort(msgspec.Struct):
    values: list[str] = []


class _Settings(msgspec.Struct):
    reasoning_effort: _Effort | None = None


class _Tekken(msgspec.Struct):
    """The parts of tekken.json that are not its vocabulary."""

    config: _TekkenConfig = msgspec.field(default_factory=_TekkenConfig)
    special_tokens: list[_Special] | None = None
    model_settings_builder: _Settings | None = None


class _Added(msgspec.Struct):
    id: int = -1


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[Any] | None = None


class _TokenizerFile(msgspec.Struct):
    """The parts of tokenizer.json that tell how many tokens there are."""

    model: _Model = msgspec.field(default_factory=_Model)
    added_tokens: list[_Added] = []


def read_words(folder: Path, tokenizer: str = "auto") -> Words:
    """Facts of a folder, as far as its files can be read. tokenizer: the setting of this name."""
    found = [name for name in (TEKKEN_FILE, TOKENIZER_FILE) if (folder / name).is_file()]
    asked = {"mistral": TEKKEN_FILE, "tokenizers": TOKENIZER_FILE}.get(tokenizer)
    file = asked or next(iter(found), None)
    unused = tuple(name for name in found if name != file)
    if file == TEKKEN_FILE:
        words, read = Words(library=MISTRAL_COMMON, file=file, unused=unused), _mistral
    elif file is not None:
        words, read = Words(library="tokenizers", file=file, unused=unused), _tokenizers
    else:
        return Words()
    try:
        return read(folder, words)
    except CheckpointError:
        return words


def _mistral(folder: Path, words: Words) -> Words:
    """tekken.json wins wherever there is one; mistral-common makes its prompts, and no template does."""
    file = _decoded(folder / TEKKEN_FILE, _Tekken)
    listed = file.special_tokens
    spelled = _USUAL if listed is None else {token.token_str for token in listed}
    settings = file.model_settings_builder
    effort = None if settings is None else settings.reasoning_effort
    return msgspec.structs.replace(
        words,
        version=file.config.version,
        num_tokens=file.config.default_vocab_size,
        chat=MISTRAL_COMMON if "[INST]" in spelled else "",
        abilities=tuple(name for name, marks in _ABILITIES.items() if spelled.intersection(marks)),
        efforts=() if effort is None else tuple(effort.values),
    )


def _tokenizers(folder: Path, words: Words) -> Words:
    file = _decoded(folder / TOKENIZER_FILE, _TokenizerFile)
    vocab = file.model.vocab or {}
    ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    template = read_chat_templates(folder).get("default")
    return msgspec.structs.replace(
        words,
        num_tokens=1 + max((*ids, *(token.id for token in file.added_tokens)), default=-1),
        chat="" if template is None else _origin(folder),
        abilities=tuple(
            name for name in _OF_TEMPLATES if any(mark in (template or "") for mark in _ABILITIES[name])
        ),
        efforts=None if "reasoning_effort" in (template or "") else (),
    )


def _origin(folder: Path) -> str:
    """The file that the default chat template is in (`read_chat_templates` has the order)."""
    if (folder / "chat_template.jinja").exists() or any((folder / "additional_chat_templates").glob("*.jinja")):
        return "chat_template.jinja"
    if read_tokenizer_config(folder).chat_templates is not None:
        return "tokenizer_config.json"
    names = ("processor_config.json", "chat_template.json")
    return next(name for name in names if read_object(folder / name).get("chat_template") is not None)


def _decoded(path: Path, type: Any) -> Any:
    """The file's content. Raises CheckpointError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=type)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field=path.name) from error
