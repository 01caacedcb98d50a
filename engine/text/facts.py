"""Facts about a checkpoint's tokenizer and chats, read from its files without making a tokenizer: which one speaks,
what its chats know. `cierzo info` prints them; what a server does is up to `PromptEncoder`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from cierzo.engine.errors import CheckpointError
from cierzo.engine.text.tokenizer_config import read_chat_templates, read_object, read_tokenizer_config

TEKKEN, TOKENIZERS = "tekken.json", "tokenizer.json"
MISTRAL_COMMON = "mistral-common"
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

    num_tokens: ids that it may give. unused: files of other tokenizers. chat: where prompts of conversations come
    from, "" for nowhere. efforts: what `reasoning_effort` may say; None where that is up to the template.
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


def read_words(folder: Path, vocab_size: int | None) -> tuple[Words, list[CheckpointError]]:
    """Facts of a folder, as far as they can be read, and what is wrong with its files. vocab_size: the model's."""
    found = tuple(name for name in (TEKKEN, TOKENIZERS) if (folder / name).exists())
    wrong: list[CheckpointError] = []
    words = Words(unused=found[1:])
    if not found:
        return words, wrong
    try:
        if found[0] == TEKKEN:
            words = _mistral(folder / TEKKEN, words)
        else:
            words = _tokenizers(folder, words)
    except CheckpointError as error:
        wrong.append(error)
    if vocab_size is not None and words.library == MISTRAL_COMMON and words.num_tokens > vocab_size:
        wrong.append(
            CheckpointError(
                f"{folder / TEKKEN} is not this model's: it has {words.num_tokens} tokens, the model's vocabulary "
                f"{vocab_size}",
                field="vocab_size",
                limit=f"at least {words.num_tokens}",
                value=vocab_size,
            )
        )
    return words, wrong


def _mistral(path: Path, words: Words) -> Words:
    """tekken.json wins wherever there is one; mistral-common makes its prompts, and no template does."""
    file = _decoded(path, _Tekken)
    listed = file.special_tokens
    spelled = _USUAL if listed is None else {token.token_str for token in listed}
    settings = file.model_settings_builder
    effort = None if settings is None else settings.reasoning_effort
    return msgspec.structs.replace(
        words,
        library=MISTRAL_COMMON,
        file=TEKKEN,
        version=file.config.version,
        num_tokens=file.config.default_vocab_size,
        chat=MISTRAL_COMMON if "[INST]" in spelled else "",
        abilities=tuple(name for name, marks in _ABILITIES.items() if spelled.intersection(marks)),
        efforts=() if effort is None else tuple(effort.values),
    )


def _tokenizers(folder: Path, words: Words) -> Words:
    file = _decoded(folder / TOKENIZERS, _TokenizerFile)
    vocab = file.model.vocab or {}
    ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    template = read_chat_templates(folder).get("default")
    return msgspec.structs.replace(
        words,
        library="tokenizers",
        file=TOKENIZERS,
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
