"""Images as prompts hold them, and what a model says of the images that it takes."""

from __future__ import annotations

import msgspec


class PromptImage(msgspec.Struct, frozen=True):
    """An image of a prompt, decoded and resized. `messages.Submit.images` has them in the order of the prompt.

    offset: index in `prompt_token_ids` of its first token. rows, columns: H and W, its size in merged tokens; it
    takes (W + 1) H tokens, each row W image tokens and a break, the last of which is the end token. digest:
    blake2b, 16 bytes, of pixels, rows and columns. pixels: float32, little-endian, [H unit, W unit, 3], normalised
    RGB, where unit is VisionInfo's patch times merge; empty where they travel ahead, in pieces (`Pixels`).
    """

    offset: int
    rows: int
    columns: int
    digest: bytes
    pixels: bytes = b""

    @property
    def num_tokens(self) -> int:
        """Tokens that it takes in the prompt."""
        return (self.columns + 1) * self.rows


class VisionInfo(msgspec.Struct, frozen=True):
    """Images that a model takes: patches of patch x patch pixels, of which merge x merge make a token; the longest
    side; what is taken off each channel of R, G, B in [0, 1], and what it is divided by; the ids of the tokens that
    stand for an image, for the end of a row of it, and for its end."""

    patch: int
    merge: int
    max_side_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_token_id: int
    break_token_id: int
    end_token_id: int
