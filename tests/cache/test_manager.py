"""The manager by exact block ids: sharing, eviction order, forms, collisions."""

from __future__ import annotations

import msgspec
import pytest

from cierzo.cache.config import CacheConfig
from cierzo.cache.hashing import BlockHasher
from cierzo.cache.manager import KVCacheManager, SequenceBlocks


def manager(num_blocks: int, block_tokens: int = 2, *, prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(
        CacheConfig(num_blocks=num_blocks, block_tokens=block_tokens, prefix_caching=prefix_caching, hash_key="ab")
    )


def computed(cache: KVCacheManager, tokens: list[int], num_prompt_tokens: int | None = None) -> SequenceBlocks:
    """A sequence all of whose tokens are computed and indexed."""
    blocks = cache.open(tokens, len(tokens) if num_prompt_tokens is None else num_prompt_tokens)
    assert cache.admit(blocks) is not None
    cache.index(blocks, len(tokens))
    return blocks


def test_admit_gives_blocks_for_all_known_tokens() -> None:
    cache = manager(4)
    blocks = cache.open([1, 2, 3], 3)
    assert cache.admit(blocks) == 0
    assert blocks.block_ids == [0, 1]
    assert blocks.capacity_tokens == 4
    cache.check([blocks])


def test_a_prefix_is_shared_in_whole_blocks_and_one_token_is_left_to_compute() -> None:
    cache = manager(8)
    first = computed(cache, [1, 2, 3, 4, 5])
    longer, equal, shorter = (cache.open(t, len(t)) for t in ([1, 2, 3, 4, 9, 9], [1, 2, 3, 4], [1, 2, 3]))
    assert cache.admit(longer) == 4
    assert longer.block_ids == [0, 1, 3]
    assert cache.admit(equal) == 2  # block 1 holds its last token, which must be computed
    assert equal.block_ids == [0, 4]
    assert cache.admit(shorter) == 2
    cache.check([first, longer, equal, shorter])


def test_only_full_computed_blocks_are_indexed() -> None:
    cache = manager(8)
    blocks = cache.open([1, 2, 3, 4, 5], 5)
    cache.admit(blocks)
    cache.index(blocks, 3)
    assert cache.stats().indexed == 1
    other = cache.open([1, 2, 3, 4, 5], 5)
    assert cache.admit(other) == 2
    cache.index(blocks, 4)
    assert cache.stats().indexed == 2


def test_a_block_is_coming_while_another_sequence_computes_it() -> None:
    """Its next one, and no later one: what it shares with the waiting sequence ends where it differs."""
    cache = manager(16)
    first = cache.open([1, 2, 3, 4, 5, 6, 7], 7)
    same, other, short = (cache.open(t, len(t)) for t in ([1, 2, 3, 4, 9, 9, 9], [9, 2, 3], [1, 2]))
    assert not cache.is_coming(same)
    cache.admit(first)
    assert [cache.is_coming(blocks) for blocks in (same, other, short)] == [True, False, False]
    cache.index(first, 3)
    assert cache.is_coming(same)
    cache.index(first, 4)
    assert not cache.is_coming(same)
    assert cache.admit(same) == 4
    cache.check([first, same])
    cache.free(first)
    cache.check([same])


def test_nothing_is_coming_from_those_who_left_or_without_a_prefix_cache() -> None:
    for prefix_caching in (True, False):
        cache = manager(16, prefix_caching=prefix_caching)
        first, second = cache.open([1, 2, 3], 3), cache.open([1, 2, 3], 3)
        cache.admit(first)
        assert cache.is_coming(second) == prefix_caching
        cache.free(first)
        assert not cache.is_coming(second)


def test_a_refusal_changes_nothing() -> None:
    cache = manager(4)
    first = computed(cache, [1, 2, 3, 4])
    cache.free(first)
    before = cache.stats()
    blocks = cache.open([1, 2, 3, 4, 5, 6, 7, 8, 9], 9)
    assert cache.admit(blocks) is None
    assert (cache.stats(), blocks.block_ids) == (before, [])
    small = cache.open([1, 2, 3], 3)
    assert cache.admit(small, reserve_blocks=3) is None
    assert cache.admit(small, reserve_blocks=2) == 2
    assert cache.allocate(small, 11) is None
    assert cache.allocate(small, 4) == []
    assert len(cache.allocate(small, 8) or []) == 2
    cache.check([small])


def test_shared_blocks_cost_nothing_when_held_and_count_when_free() -> None:
    cache = manager(3)
    first = computed(cache, [1, 2, 3, 4])
    second = cache.open([1, 2, 3, 4, 5], 5)
    assert cache.admit(second) == 4  # two blocks are held by the first, one is free
    cache.free(second)
    cache.free(first)
    third = cache.open([1, 2, 3, 4, 5], 5)
    assert cache.admit(third, reserve_blocks=1) is None  # all three are free, and all three are needed
    assert cache.admit(third) == 4


def test_a_refused_sequence_is_asked_again_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = manager(4)
    first = computed(cache, [1, 2])
    filler = computed(cache, [9, 9, 9, 9])
    waiting = cache.open([1, 2, 3, 4, 5], 5)
    assert cache.admit(waiting) is None
    with monkeypatch.context() as patch:
        patch.delattr(KVCacheManager, "_match")
        assert cache.admit(waiting) is None
    cache.free(filler)
    assert cache.admit(waiting) == 2
    cache.check([first, waiting])


def test_a_longer_match_lets_a_refused_sequence_in_without_any_block_being_freed() -> None:
    cache = manager(4)
    first = cache.open([1, 2, 3, 4, 5], 5)
    cache.admit(first)
    waiting = cache.open([1, 2, 3, 4, 6], 5)
    assert cache.admit(waiting) is None
    cache.index(first, 4)
    assert cache.admit(waiting) == 4
    assert waiting.block_ids == [0, 1, 3]


def test_digests_are_computed_once_and_survive_a_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    digest = BlockHasher.digest

    def counted(self: BlockHasher, *inputs: object) -> bytes:
        nonlocal calls
        calls += 1
        return digest(self, *inputs)

    monkeypatch.setattr(BlockHasher, "digest", counted)
    cache = manager(8)
    blocks = computed(cache, [1, 2, 3, 4, 5, 6])
    cache.free(blocks)
    assert cache.admit(blocks) == 4
    cache.index(blocks, 6)
    assert calls == 3


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    cache = manager(4)
    first = computed(cache, [1, 2, 3, 4, 5, 6])
    assert first.block_ids == [0, 1, 2]
    cache.free(first)
    second = cache.open([9] * 4, 4)
    cache.admit(second)
    assert second.block_ids == [3, 2]  # the blank one, then the tail
    again = cache.open([1, 2, 3, 4, 5], 5)
    cache.free(second)
    assert cache.admit(again) == 4
    assert again.block_ids[:2] == [0, 1]
    cache.check([again])


def test_an_evicted_block_is_no_longer_found() -> None:
    cache = manager(2)
    first = computed(cache, [1, 2, 3])
    cache.free(first)
    second = computed(cache, [5, 6, 7])
    cache.free(second)
    third = cache.open([1, 2, 3], 3)
    assert cache.admit(third) == 0
    cache.check([third])


def test_of_two_blocks_with_one_content_the_first_stays_indexed() -> None:
    cache = manager(6)
    tokens = [1, 2, 3, 4]
    first, second = cache.open(tokens, 4), cache.open(list(tokens), 4)
    cache.admit(first)
    cache.admit(second)
    cache.index(first, 4)
    cache.index(second, 4)
    assert cache.stats().indexed == 2
    second.tokens += [5, 6]
    assert cache.allocate(second, 6) == [4]
    cache.index(second, 6)  # behind the first one's blocks
    cache.free(second)
    assert cache.stats().cached == 1  # its twins were blank at once
    third = cache.open([1, 2, 3, 4, 5, 6, 7], 4)
    assert cache.admit(third) == 6
    assert third.block_ids[:3] == [0, 1, 4]
    cache.check([first, third])


def test_generated_tokens_are_not_served_to_a_prompt_but_to_their_own_request() -> None:
    cache = manager(8)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    first = computed(cache, tokens, num_prompt_tokens=3)
    cache.free(first)
    prompt = cache.open(list(tokens), 7)
    assert cache.admit(prompt) == 2  # block 1 holds a generated token
    cache.free(prompt)
    resumed = cache.open(list(tokens), 3)
    assert cache.admit(resumed) == 6
    cache.check([resumed])


def test_salt_separates() -> None:
    cache = manager(8)
    blocks = cache.open([1, 2, 3], 3, salt=b"a")
    cache.admit(blocks)
    cache.index(blocks, 3)
    assert cache.admit(cache.open([1, 2, 3], 3)) == 0
    assert cache.admit(cache.open([1, 2, 3], 3, salt=b"a")) == 2


def test_a_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockHasher, "digest", lambda self, *inputs: bytes(16))
    cache = manager(12)
    first = computed(cache, [1, 2])
    others = [
        cache.open(tokens, prompt) for tokens, prompt in (([3, 4, 5], 3), ([1, 2, 1, 2, 3], 5), ([1, 2, 3], 1))
    ]
    assert [cache.admit(blocks) for blocks in others] == [0, 2, 0]
    cache.index(others[0], 2)  # takes the place of the first
    assert cache.admit(cache.open([1, 2, 3], 3)) == 0
    cache.free(first)
    assert cache.stats().cached == 0


def test_equal_tokens_behind_another_parent_are_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash forgets the parent: the index must not."""
    digest = BlockHasher.digest
    monkeypatch.setattr(BlockHasher, "digest", lambda self, parent, *others: digest(self, bytes(16), *others))
    cache = manager(12)
    computed(cache, [1, 1, 5, 5])
    computed(cache, [2, 2])
    blocks = cache.open([2, 2, 5, 5, 5], 5)
    assert cache.admit(blocks) == 2


def test_an_orphan_is_replaced_when_its_chain_is_computed_again() -> None:
    cache = manager(6)
    first, twin = cache.open([1, 2], 2), cache.open([1, 2, 3, 4], 4)
    cache.admit(first)
    cache.admit(twin)
    cache.index(first, 2)
    cache.index(twin, 4)  # its second block stands behind the first one's block
    cache.free(first)
    filler = cache.open([9] * 6, 6)
    cache.admit(filler)  # evicts block 0
    cache.free(filler)
    cache.free(twin)
    again = computed(cache, [1, 2, 3, 4])
    cache.check([again])
    assert cache.admit(cache.open([1, 2, 3, 4, 5], 5)) == 4


def test_without_prefix_caching_nothing_is_kept() -> None:
    cache = manager(4, prefix_caching=False)
    blocks = computed(cache, [1, 2, 3])
    cache.free(blocks)
    assert msgspec.structs.astuple(cache.stats()) == (4, 4, 0, 0)
    assert cache.admit(cache.open([1, 2, 3], 3)) == 0


def test_check_sees_a_handle_that_was_forgotten() -> None:
    cache = manager(4)
    computed(cache, [1, 2, 3])
    with pytest.raises(AssertionError, match="reference counts"):
        cache.check([])


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0)])
def test_sizes_must_be_positive(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        manager(*sizes)
