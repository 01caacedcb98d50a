"""What a digest distinguishes."""

from __future__ import annotations

import itertools

import pytest

from cierzo.cache.hashing import DIGEST_BYTES, ROOT_DIGEST, BlockHasher, pack_tokens


def test_each_ingredient_changes_the_digest() -> None:
    hasher = BlockHasher(b"key")
    packed = pack_tokens([1, 2])
    other_parent = hasher.digest(ROOT_DIGEST, packed, 2, b"")
    digests = {
        BlockHasher(b"other key").digest(ROOT_DIGEST, packed, 2, b""),
        *(
            hasher.digest(*inputs)
            for inputs in itertools.product(
                (ROOT_DIGEST, other_parent), (packed, pack_tokens([2, 1])), (0, 1, 2), (b"", b"\0", b"image")
            )
        ),
    }
    assert len(digests) == 1 + 2 * 2 * 3 * 3
    assert {len(digest) for digest in digests} == {DIGEST_BYTES}


def test_no_byte_moves_between_salt_and_tokens() -> None:
    hasher = BlockHasher(b"")
    one = hasher.digest(ROOT_DIGEST, pack_tokens([7, 8]), 0, b"")
    other = hasher.digest(ROOT_DIGEST, pack_tokens([8]), 0, pack_tokens([7]))
    assert one != other


def test_a_key_that_is_too_long_is_refused_at_once() -> None:
    with pytest.raises(ValueError):
        BlockHasher(bytes(65))
