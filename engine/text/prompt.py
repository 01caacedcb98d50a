"""Prompts as clients send them, made into token ids; and a reader for the tokens that follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate, ModelInfo, SamplingParams, Submit, TextChunk
from cierzo.engine.text.chat import ChatTemplate, load_chat_template, read_chat_templates
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.masks import masked
from cierzo.engine.text.syntax import Syntax
from cierzo.engine.text.tokenizer import Tokenizer, load_tokenizer
from cierzo.engine.text.vocabulary import TEKKEN_FILE, Chat, refuse_unfit

if TYPE_CHECKING:
    from cierzo.engine.text.tekken import TekkenVocabulary

PART_CHARS = 64  # a turn, or a call in it, takes a template as long as so many characters
WORD_CHARS = 16  # a text of its own takes a tokenizer as long as so many characters more
TOOL_CHARS = 1024  # a tool whose schema is checked


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """A prompt that is encoded. `in_thinking`: it ends within a thought, which the answer goes on with."""

    token_ids: list[int]
    in_thinking: bool = False


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Tokenizer and chat template of what is served; either may be missing, then only `token_ids` (or no
    `messages`) can be asked. `other_templates`: names of chat templates where none is the default."""

    tokenizer: Tokenizer | TekkenVocabulary | None = None
    template: ChatTemplate | Chat | None = None
    other_templates: tuple[str, ...] = ()
    syntax: Syntax | None = None

    @classmethod
    def load(cls, checkpoint_dir: Path, tokenizer: str = "auto", vocab_size: int | None = None) -> PromptEncoder:
        """Read tokenizer and chat template from a checkpoint's folder; raises CheckpointError.

        tokenizer: "mistral" reads tekken.json, "tokenizers" tokenizer.json, "auto" the first of them that is there.
        vocab_size: of the model.
        """
        if reads_tekken(checkpoint_dir, tokenizer):
            from cierzo.engine.text.mistral import load_mistral  # takes half a second, and memory

            return cls(*load_mistral(checkpoint_dir, vocab_size))
        return cls._load_tokenizers(checkpoint_dir)

    @classmethod
    def _load_tokenizers(cls, checkpoint_dir: Path) -> PromptEncoder:
        tokenizer = load_tokenizer(checkpoint_dir)
        if tokenizer is None:
            return cls()
        template = load_chat_template(checkpoint_dir)
        return cls(tokenizer, template, () if template else tuple(sorted(read_chat_templates(checkpoint_dir))))

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Special tokens, which have no text in an output, by how they are spelled."""
        return {} if self.tokenizer is None else self.tokenizer.special_ids

    def encode(self, message: Generate, max_tokens: int | None = None) -> Prompt:
        """Encode the prompt; raises InvalidRequest, before it encodes, if a text cannot fit `max_tokens`.

        Takes time in proportion to `weight`.
        """
        if message.token_ids is not None:
            return Prompt(message.token_ids)
        if self.tokenizer is None:
            raise InvalidRequest("the served checkpoint has no tokenizer: send token_ids", field=_field(message))
        if message.text is not None:
            refuse_unfit(self.tokenizer, "text", message.text, max_tokens)
            if message.suffix is None:
                return Prompt(self.tokenizer.encode(message.text))
            refuse_unfit(self.tokenizer, "suffix", message.suffix, max_tokens)
            if isinstance(self.tokenizer, Tokenizer):
                raise InvalidRequest("the served model does not fill in the middle", field="suffix")
            return Prompt(self.tokenizer.encode_middle(message.text, message.suffix))
        if self.template is None:
            named = f"default chat template, only {', '.join(self.other_templates)}"
            known = named if self.other_templates else "chat template"
            raise InvalidRequest(f"the served checkpoint has no {known}: send text", field="messages")
        if not isinstance(self.template, ChatTemplate):
            return Prompt(*self.template.encode(message, max_tokens))
        assert isinstance(self.tokenizer, Tokenizer)  # what is beside a template
        rendered = self.template.render(message.messages or [], message.reasoning_effort)
        refuse_unfit(self.tokenizer, "messages", rendered, max_tokens)
        return Prompt(self.tokenizer.encode_rendered(rendered))

    def max_text_bytes(self, max_tokens: int) -> int | None:
        """UTF-8 bytes of the longest text that fits so many tokens; None if only its reader can tell."""
        if self.tokenizer is None or self.tokenizer.lost_bytes or self.tokenizer.longest_token_bytes is None:
            return None
        return max_tokens * self.tokenizer.longest_token_bytes

    def detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        """A reader of one sample's tokens; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        stop_tokens = {self.special_ids[string]: string for string in params.stop if string in self.special_ids}
        return Detokenizer(self.tokenizer, params.stop, params.min_tokens, stop_tokens)

    def masked(self, submit: Submit, message: Generate, model: ModelInfo, *, in_thinking: bool) -> Submit:
        """`submit` with what its message says that a token may be; see masks.py. Raises InvalidRequest."""
        return masked(submit, message, self.tokenizer, self.syntax, model, in_thinking=in_thinking)

    def weight(self, message: Generate) -> int:
        """The work to encode a message, in characters of text that take as long. Token ids take none."""
        weight = len(message.output_token_ids)
        weight += sum(2 * (WORD_CHARS + len(word)) for word in message.sampling.bad_words)
        if message.text is not None:
            return weight + len(message.text) + len(message.suffix or "")
        if message.tools:
            weight += TOOL_CHARS * len(message.tools) + len(msgspec.msgpack.encode(message.tools))
        for turn in message.messages or ():
            weight += PART_CHARS + content_chars(turn) + len(turn.reasoning)
            weight += sum(PART_CHARS + len(call.arguments) for call in turn.tool_calls)
        return weight


def reads_tekken(checkpoint_dir: Path, tokenizer: str) -> bool:
    """Whether the words of a folder are those of its tekken.json, by this setting. Raises CheckpointError where
    they are to be, and there is none."""
    path = checkpoint_dir / TEKKEN_FILE
    if tokenizer == "mistral" and not path.is_file():
        raise CheckpointError(
            f"tokenizer is mistral, which reads {TEKKEN_FILE}, and {checkpoint_dir} has none",
            field="tokenizer",
            limit="auto, tokenizers",
            value=tokenizer,
        )
    return tokenizer != "tokenizers" and path.is_file()


def content_chars(turn: ChatMessage) -> int:
    """Characters of a turn's content."""
    if isinstance(turn.content, str):
        return len(turn.content)
    return sum(
        PART_CHARS + len(chunk.text if isinstance(chunk, TextChunk) else chunk.thinking) for chunk in turn.content
    )


def _field(message: Generate) -> str:
    return "text" if message.text is not None else "messages"
