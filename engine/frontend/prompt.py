"""Prompts as clients send them, made into token ids; and a reader for the tokens that follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.chat import ChatTemplate, load_chat_template, read_chat_templates
from cierzo.engine.frontend.detok import Detokenizer
from cierzo.engine.frontend.tokenizer import Tokenizer, load_tokenizer
from cierzo.engine.messages import Generate, SamplingParams


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Tokenizer and chat template of what is served; either may be missing, then only `token_ids` (or no
    `messages`) can be asked. `other_templates`: names of chat templates where none is the default."""

    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    other_templates: tuple[str, ...] = ()

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

    def encode(self, message: Generate) -> list[int]:
        """The prompt's token ids; raises InvalidRequest. Takes time in proportion to `num_chars`."""
        if message.token_ids is not None:
            return message.token_ids
        if self.tokenizer is None:
            raise InvalidRequest("the served checkpoint has no tokenizer: send token_ids", field=_field(message))
        if message.text is not None:
            return self.tokenizer.encode(message.text)
        if self.template is None:
            named = f"default chat template, only {', '.join(self.other_templates)}"
            known = named if self.other_templates else "chat template"
            raise InvalidRequest(f"the served checkpoint has no {known}: send text", field="messages")
        return self.tokenizer.encode_rendered(
            self.template.render(message.messages or [], message.reasoning_effort)
        )

    def detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        """A reader of one sample's tokens; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        stop_tokens = {self.special_ids[string]: string for string in params.stop if string in self.special_ids}
        return Detokenizer(self.tokenizer, params.stop, params.min_tokens, stop_tokens)

    def num_chars(self, message: Generate) -> int:
        """Characters to encode; 0 for token ids."""
        if message.text is not None:
            return len(message.text)
        turns = message.messages or []
        calls = sum(len(call.arguments) for turn in turns for call in turn.tool_calls)
        return calls + sum(len(turn.content) + len(turn.reasoning) for turn in turns)


def _field(message: Generate) -> str:
    return "text" if message.text is not None else "messages"
