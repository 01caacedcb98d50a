"""Blocks that hold tokens of images: shared if the image is the same, and never else."""

from __future__ import annotations

import pytest

from cierzo.cache.config import CacheConfig
from cierzo.cache.hashing import BlockHasher
from cierzo.cache.images import ImageSpan, first_behind, marks
from cierzo.cache.manager import KVCacheManager

IMAGE = [10, 10, 12, 10, 10, 13]  # two rows of two tokens
A, B = b"A" * 16, b"B" * 16


def manager() -> KVCacheManager:
    return KVCacheManager(CacheConfig(num_blocks=64, block_tokens=4, hash_key="ab"))


def span(offset: int, digest: bytes, num_tokens: int = len(IMAGE)) -> ImageSpan:
    return ImageSpan(offset=offset, num_tokens=num_tokens, digest=digest)


def found(cache: KVCacheManager, tokens: list[int], *images: ImageSpan) -> int:
    """Tokens that a newcomer finds; it goes again."""
    blocks = cache.open([*tokens], len(tokens), images=images)
    cached = cache.admit(blocks)
    assert cached is not None
    cache.free(blocks)
    return cached


def compute(cache: KVCacheManager, tokens: list[int], *images: ImageSpan) -> None:
    blocks = cache.open([*tokens], len(tokens), images=images)
    cache.admit(blocks)
    cache.index(blocks, len(tokens))
    cache.free(blocks)


PROMPT = [1, 2, *IMAGE, 3, 4, 5, 6, 7]  # blocks: 1 2 I I | I I I I | 3 4 5 6 | 7


def test_the_same_image_and_text_share_all_blocks() -> None:
    cache = manager()
    compute(cache, PROMPT, span(2, A))
    assert found(cache, PROMPT, span(2, A)) == 12


def test_the_same_tokens_of_another_image_or_of_none_share_what_stands_before_it() -> None:
    cache = manager()
    prompt = [9, 9, 9, 9, *PROMPT]
    compute(cache, prompt, span(6, A))
    assert found(cache, prompt, span(6, B)) == 4
    assert found(cache, prompt) == 4


def test_a_prefix_may_end_inside_an_image() -> None:
    cache = manager()
    compute(cache, PROMPT[:7], span(2, A))  # as of a prompt that was cut there
    assert found(cache, PROMPT, span(2, A)) == 4


def test_an_image_is_not_taken_for_a_later_part_of_itself() -> None:
    """Both blocks hold four image tokens, behind equal tokens; the picture is another."""
    cache = manager()
    compute(cache, [10] * 9, span(0, A, 8))
    assert found(cache, [10] * 9, span(0, A, 8)) == 8
    assert found(cache, [10] * 9, span(1, A, 8)) == 0


def test_where_one_image_ends_and_the_next_begins_within_a_block_counts() -> None:
    cache = manager()
    tokens = [10] * 5
    compute(cache, tokens, span(0, A, 2), span(2, B, 2))
    assert found(cache, tokens, span(0, A, 2), span(2, B, 2)) == 4
    for others in (
        [span(0, A, 2), span(2, A, 2)],
        [span(0, B, 2), span(2, B, 2)],
        [span(0, A, 1), span(1, B, 3)],
        [span(0, A, 2)],
    ):
        assert found(cache, tokens, *others) == 0


def test_text_behind_another_image_is_another_text() -> None:
    cache = manager()
    prompt = [*IMAGE, 1, 2, 3, 4, 5, 6, 7]
    compute(cache, prompt, span(0, A))
    assert found(cache, prompt, span(0, A)) == 12
    assert found(cache, prompt, span(0, B)) == 0


def test_a_collision_of_two_images_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockHasher, "digest", lambda self, *inputs: bytes(16))
    cache = manager()
    compute(cache, PROMPT[:5], span(2, A))
    assert found(cache, PROMPT[:5], span(2, B)) == 0
    assert found(cache, PROMPT[:5], span(2, A)) == 4


def test_marks_say_nothing_of_text_and_tell_images_apart_by_place_and_offset() -> None:
    images = [span(2, A), span(20, B)]
    assert marks(images, 0, 2) == marks(images, 8, 20) == marks(images, 26, 30) == b""
    seen = {marks(images, start, start + 4) for start in (0, 1, 2, 3, 4, 5, 6, 7, 18, 20)}
    assert len(seen) == 10
    assert [first_behind(images, position) for position in (0, 7, 8, 25, 26)] == [0, 0, 1, 1, 2]
