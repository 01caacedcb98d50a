"""The two things that a checkpoint's words come from, whatever library reads them; and the bound of a text's length
that both hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import Generate
from cierzo.engine.text.detok import MAX_CHAR_BYTES

TEKKEN_FILE = "tekken.json"  # of a folder in Mistral's layout; some folders have both
TOKENIZER_FILE = "tokenizer.json"


class TokenSizes(Protocol):
    """The part of a tokenizer that bounds what a text can come to."""

    longest_token_bytes: int | None  # UTF-8 bytes that a token stands for at the most; None for any number
    lost_bytes: bytes  # bytes of a text that come into no token


class Vocabulary(TokenSizes, Protocol):
    """A tokenizer, as the rest of the house sees it. Without a state: encoding one text changes nothing."""

    strip_leading_space: bool
    eos_token: str
    eos_token_id: int | None

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Control tokens, which have no text, by how they are spelled."""
        ...

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


def refuse_unfit(sizes: TokenSizes, field: str, text: str, max_tokens: int | None) -> None:
    """Raise InvalidRequest, quickly, for a text that has more bytes than `max_tokens` tokens can have."""
    if sizes.longest_token_bytes is None or max_tokens is None:
        return
    most = max_tokens * sizes.longest_token_bytes
    if MAX_CHAR_BYTES * len(text) <= most:
        return
    num_bytes = len(text.encode(errors="surrogatepass").translate(None, sizes.lost_bytes))
    if num_bytes > most:
        raise InvalidRequest(
            f"a text of {num_bytes} bytes cannot fit a context of {max_tokens} tokens",
            field=field,
            limit=f"{most} bytes",
            value=num_bytes,
        )
