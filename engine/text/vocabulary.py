"""The two things that a checkpoint's words come from, whatever library reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from cierzo.engine.messages import Generate


class Vocabulary(Protocol):
    """A tokenizer, as the rest of the house sees it. Without a state: encoding one text changes nothing."""

    strip_leading_space: bool
    special_ids: Mapping[str, int]  # control tokens, which have no text, by how they are spelled
    eos_token: str
    eos_token_id: int | None
    longest_token_bytes: int | None  # UTF-8 bytes that a token stands for at the most; None for any number
    lost_bytes: bytes  # bytes of a text that come into no token

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text, in which no text becomes a control token, behind a beginning-of-text token
        where the checkpoint wants one. Raises InvalidRequest for what is no Unicode text."""
        ...

    def encode_piece(self, text: str) -> list[int]:
        """Token ids of a text alone: nothing is put around it, and nothing in it becomes a control token."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes in the text; empty for control tokens and unknown ids."""
        ...


class Chat(Protocol):
    """Prompts of conversations. `efforts`: what `reasoning_effort` may say."""

    efforts: tuple[str, ...]

    def encode(self, message: Generate, max_tokens: int | None) -> tuple[list[int], bool]:
        """Token ids of the prompt of `message.messages`, up to where the assistant begins to speak, or goes on in
        its last turn; and whether that is within a thought. Raises InvalidRequest, with the field that is wrong."""
        ...
