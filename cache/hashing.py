"""Digests of token blocks: a keyed chain, so that equal digests mean equal prefixes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct

DIGEST_BYTES = 16
TOKEN_BYTES = array("I").itemsize
ROOT_DIGEST = bytes(DIGEST_BYTES)  # the parent of a sequence's first block
_HEAD = Struct("<III")  # prompt tokens in the block, bytes of salt, bytes of images


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as consecutive native words of TOKEN_BYTES (4): what is hashed, and what a hit is compared with."""
    return array("I", token_ids).tobytes()


class BlockHasher:
    """Hashes one block at a time; a digest covers everything before its block through `parent`.

    `key` (0 to 64 bytes) makes digests unpredictable to clients, who must not be able to craft collisions.
    """

    def __init__(self, key: bytes) -> None:
        self._keyed = blake2b(key=key, digest_size=DIGEST_BYTES)  # refuses a key that is too long, now

    def digest(
        self, parent: bytes, packed: bytes, num_prompt_tokens: int, salt: bytes, images: bytes = b""
    ) -> bytes:
        """Digest of a full block.

        `packed` are its tokens by `pack_tokens`. `num_prompt_tokens` says how many of them, from the left, are
        prompt tokens: those are computed in another form than generated ones and differ in bits, so the same
        tokens in the other form are another block. `salt` separates sequences that must not share; `images`: what
        images.marks says of the block.
        """
        # Every field but the last has a fixed width, or a length before it: no two inputs spell the same bytes.
        head = _HEAD.pack(num_prompt_tokens, len(salt), len(images))
        state = self._keyed.copy()  # has the key's block behind it, half of the work
        state.update(parent + head + salt + images + packed)
        return state.digest()
