"""What a client sends as a prompt, made into token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.chat import ChatTemplate, load_chat_template
from cierzo.engine.frontend.tokenizer import Tokenizer, load_tokenizer
from cierzo.engine.messages import Generate


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Tokenizer and chat template of what is served; either may be missing, then only `token_ids` (or no
    `messages`) can be asked."""

    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None

    @classmethod
    def load(cls, checkpoint_dir: Path) -> PromptEncoder:
        """Both from a checkpoint's folder; raises CheckpointError."""
        tokenizer = load_tokenizer(checkpoint_dir)
        return cls(tokenizer, load_chat_template(checkpoint_dir) if tokenizer is not None else None)

    def encode(self, message: Generate) -> list[int]:
        """The prompt's token ids; raises InvalidRequest. Takes time in proportion to `num_chars`."""
        if message.token_ids is not None:
            return message.token_ids
        if self.tokenizer is None:
            raise InvalidRequest("the served checkpoint has no tokenizer: send token_ids", field=_field(message))
        if message.text is not None:
            return self.tokenizer.encode(message.text)
        if self.template is None:
            raise InvalidRequest("the served checkpoint has no chat template: send text", field="messages")
        return self.tokenizer.encode_rendered(
            self.template.render(message.messages or [], message.reasoning_effort)
        )

    def num_chars(self, message: Generate) -> int:
        """Characters to encode; 0 for token ids."""
        if message.text is not None:
            return len(message.text)
        turns = message.messages or []
        calls = sum(len(call.arguments) for turn in turns for call in turn.tool_calls)
        return calls + sum(len(turn.content) + len(turn.reasoning) for turn in turns)


def _field(message: Generate) -> str:
    return "text" if message.text is not None else "messages"
