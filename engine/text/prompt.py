"""Prompts as clients send them, made into token ids; and a reader for the tokens that follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate, ModelInfo, SamplingParams, Submit, TextChunk
from cierzo.engine.text.chat import ChatTemplate, load_chat_template, read_chat_templates
from cierzo.engine.text.detok import MAX_CHAR_BYTES, Detokenizer
from cierzo.engine.text.masks import Markers, masked
from cierzo.engine.text.tokenizer import Tokenizer, load_tokenizer

PART_CHARS = 64  # a turn, or a call in it, takes a template as long as so many characters
WORD_CHARS = 16  # a text of its own takes a tokenizer as long as so many characters more


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """A prompt that is encoded. `in_thinking`: it ends within a thought, which the answer goes on with."""

    token_ids: list[int]
    in_thinking: bool = False


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Tokenizer and chat template of what is served; either may be missing, then only `token_ids` (or no
    `messages`) can be asked. `other_templates`: names of chat templates where none is the default."""

    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    other_templates: tuple[str, ...] = ()
    syntax: Markers | None = None

    @classmethod
    def load(cls, checkpoint_dir: Path) -> PromptEncoder:
        """Read tokenizer and chat template from a checkpoint's folder; raises CheckpointError."""
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
            self._refuse_unfit("text", message.text, max_tokens)
            return Prompt(self.tokenizer.encode(message.text))
        if self.template is None:
            named = f"default chat template, only {', '.join(self.other_templates)}"
            known = named if self.other_templates else "chat template"
            raise InvalidRequest(f"the served checkpoint has no {known}: send text", field="messages")
        rendered = self.template.render(message.messages or [], message.reasoning_effort)
        self._refuse_unfit("messages", rendered, max_tokens)
        return Prompt(self.tokenizer.encode_rendered(rendered))

    def max_text_bytes(self, max_tokens: int) -> int | None:
        """UTF-8 bytes of the longest text that fits so many tokens; None if only its reader can tell."""
        if self.tokenizer is None or self.tokenizer.lost_bytes or self.tokenizer.longest_token_bytes is None:
            return None
        return max_tokens * self.tokenizer.longest_token_bytes

    def _refuse_unfit(self, field: str, text: str, max_tokens: int | None) -> None:
        tokenizer = self.tokenizer
        if tokenizer is None or tokenizer.longest_token_bytes is None or max_tokens is None:
            return
        most = max_tokens * tokenizer.longest_token_bytes
        if MAX_CHAR_BYTES * len(text) <= most:
            return
        num_bytes = len(text.encode(errors="surrogatepass").translate(None, tokenizer.lost_bytes))
        if num_bytes > most:
            raise InvalidRequest(
                f"a text of {num_bytes} bytes cannot fit a context of {max_tokens} tokens",
                field=field,
                limit=f"{most} bytes",
                value=num_bytes,
            )

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
            return weight + len(message.text)
        for turn in message.messages or ():
            weight += PART_CHARS + content_chars(turn) + len(turn.reasoning)
            weight += sum(PART_CHARS + len(call.arguments) for call in turn.tool_calls)
        return weight


def content_chars(turn: ChatMessage) -> int:
    """Characters of a turn's content."""
    if isinstance(turn.content, str):
        return len(turn.content)
    return sum(
        PART_CHARS + len(chunk.text if isinstance(chunk, TextChunk) else chunk.thinking) for chunk in turn.content
    )


def _field(message: Generate) -> str:
    return "text" if message.text is not None else "messages"
