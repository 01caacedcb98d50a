"""The two things that a checkpoint's words come from, whatever library reads them; and what both of them refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, Content, Generate, ImageChunk, TextChunk, ThinkingChunk
from cierzo.engine.text.detok import MAX_CHAR_BYTES
from cierzo.engine.text.image_tokens import Images

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
    kind: str  # whose file it was read from, and of what version, as clients are told
    spellings: dict[str, str]  # of tokens with a role, by its name, such as "bos_token"

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

    def encode_spelled(self, text: str, *, alone: bool) -> list[int]:
        """Token ids of a text whose spellings of control tokens are those tokens; `alone`, or behind a beginning-
        of-text token as `encode` gives them."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes in the text; empty for control tokens and unknown ids."""
        ...


class Chat(Protocol):
    """Prompts of conversations. `efforts`: what `reasoning_effort` may say; `thinks_unasked`: where it says
    nothing, the model may think. `writes_images`: a conversation may have some."""

    efforts: tuple[str, ...]
    thinks_unasked: bool
    writes_images: bool

    def encode(self, message: Generate, max_tokens: int | None, images: Images) -> tuple[list[int], bool]:
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


def refuse_marker_at_end(field: str, turn: ChatMessage, markers: tuple[str, ...]) -> None:
    """Raise InvalidRequest for an answer that is to go on behind a marker: it would be read as the text that it is,
    and not as what it says."""
    if not turn.prefix:
        return
    end = open_text(turn.content).rstrip()
    if not end.endswith(markers):
        return
    marker = max((marker for marker in markers if end.endswith(marker)), key=len)
    place = f"{field}.content" if isinstance(turn.content, str) else f"{field}.content[{len(turn.content) - 1}]"
    instead = "send a thinking chunk" if "think" in marker.lower() else "leave it out"
    raise InvalidRequest(
        f"{place} ends in the marker {marker}, which would be read as text: {instead}",
        field=place,
        limit="text that does not end in a marker",
        value=marker,
    )


def open_text(content: Content) -> str:
    """The text that a model goes on with behind this content: none behind a thought that is closed."""
    if isinstance(content, str):
        return content
    end = ""
    for chunk in reversed(content):
        if isinstance(chunk, ImageChunk):
            return end
        if not isinstance(chunk, TextChunk):
            return end if end or chunk.closed else chunk.thinking
        end = chunk.text + end
    return end


def words_of(chunk: TextChunk | ThinkingChunk | ImageChunk) -> str:
    """Words of a part of a content; an image says nothing."""
    match chunk:
        case TextChunk():
            return chunk.text
        case ThinkingChunk():
            return chunk.thinking
    return ""
