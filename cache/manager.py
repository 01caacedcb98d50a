"""`KVCacheManager`: the only door to the KV blocks.

A sequence's blocks, from the left (S tokens each)::

    | shared: found in the index | own, full and indexed | own, being filled | not allocated
    |<------------- num_indexed blocks ---------------->|                   |
    |<------------------------ block_ids --------------------------------->|

Only full blocks whose tokens have all been computed enter the index, at `index`, never before.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from cierzo.cache.block_pool import BlockPool
from cierzo.cache.config import CacheConfig
from cierzo.cache.hashing import ROOT_DIGEST, TOKEN_BYTES, BlockHasher, pack_tokens
from cierzo.cache.images import ImageSpan, marks
from cierzo.cache.prefix import ROOT_UID, BlockContent, PrefixIndex, PrefixNode

HASHED_AT_ONCE = 64  # blocks, if so many are full: a lookup may stop at the first


@dataclass(slots=True, eq=False)
class SequenceBlocks:
    """The blocks of one sequence, written by the manager alone.

    `tokens` is the owner's list of known tokens (it only ever appends); the first `num_prompt_tokens` are the
    prompt, `images` those in it, in order. `contents` outlives `free`: a sequence that waits or was preempted is
    never hashed twice.
    """

    tokens: list[int]
    num_prompt_tokens: int
    salt: bytes
    images: Sequence[ImageSpan] = ()
    block_ids: list[int] = field(default_factory=list)
    capacity_tokens: int = 0  # len(block_ids) * S
    num_indexed: int = 0  # leading blocks whose content has a place in the index, in this block or in its twin
    next_index_tokens: int = 0  # computed tokens at which the next block is due for `index`
    tail_uid: int = ROOT_UID  # node of the last of them
    contents: list[BlockContent] = field(default_factory=list)  # of the leading full blocks, as far as asked for
    refused_blocks: int = 0  # free blocks the last refused `admit` asked for; 0: none was refused
    refused_matched: int = 0  # blocks it found in the index
    coming: bytes | None = None  # digest of the block that it computes next, if all tokens of that are known
    num_found: int = 0  # leading blocks that `is_coming` found in the index


class CacheStats(msgspec.Struct, frozen=True, gc=False):
    """Gauges, in blocks. `free` can be taken, of which `cached` still hold a prefix; `indexed` also counts held."""

    total: int
    free: int
    cached: int
    indexed: int


class KVCacheManager:
    """Gives blocks to sequences, shares equal prefixes, evicts the least recently used."""

    def __init__(self, config: CacheConfig) -> None:
        if config.block_tokens < 1 or config.num_blocks < 1:
            raise ValueError(f"block_tokens={config.block_tokens} and num_blocks={config.num_blocks} must be >= 1")
        self.block_tokens = config.block_tokens
        self.num_blocks = config.num_blocks
        self.prefix_caching = config.prefix_caching
        self._hasher = BlockHasher(bytes.fromhex(config.hash_key))
        self._pool = BlockPool(config.num_blocks)
        self._index = PrefixIndex(config.num_blocks)
        self._coming: Counter[bytes] = Counter()  # of all handles that hold blocks

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def open(
        self, tokens: list[int], num_prompt_tokens: int, salt: bytes = b"", images: Sequence[ImageSpan] = ()
    ) -> SequenceBlocks:
        """A handle without blocks. `tokens` stays the caller's: it appends, the manager reads. images: that tokens
        of it stand for, in order; blocks that hold such tokens are shared if the images are the same too."""
        blocks = SequenceBlocks(tokens, num_prompt_tokens, salt, images)
        self._reset(blocks)
        return blocks

    def admit(
        self, blocks: SequenceBlocks, reserve_blocks: int = 0, findable_tokens: int = sys.maxsize
    ) -> int | None:
        """Give an empty handle the blocks of all its known tokens: how many tokens are computed already, or None.

        Takes the longest indexed prefix of at most `findable_tokens`, but leaves at least one token to compute, and
        allocates the rest. None (nothing changed) if fewer than `reserve_blocks` would stay free.
        """
        assert not blocks.block_ids, "admit on a handle that holds blocks"
        room = self._pool.num_free - reserve_blocks
        if blocks.refused_blocks > room and not self._match_may_have_grown(blocks, findable_tokens):
            return None
        matched = self._match(blocks, findable_tokens)
        total = self.blocks_for(len(blocks.tokens))
        need = total - sum(1 for node in matched if self._pool.is_held(node.block_id))
        if need > room:
            blocks.refused_blocks, blocks.refused_matched = need, len(matched)
            return None
        for node in matched:
            self._pool.share(node.block_id)
            blocks.block_ids.append(node.block_id)
        if matched:
            self._advance(blocks, len(matched), matched[-1].uid)
        self._extend(blocks, total - len(matched))
        self._announce(blocks)
        return len(matched) * self.block_tokens

    def is_coming(self, blocks: SequenceBlocks, findable_tokens: int = sys.maxsize) -> bool:
        """Whether the first block that an empty handle would not find is the next one that another computes.

        Then it is worth waiting for; whoever is admitted now computes it a second time. Digests alone are compared:
        a collision costs a wait. O(1), but for what the index has gained since the last call.
        """
        last = self._findable_blocks(blocks, findable_tokens) if self._coming else 0
        position = blocks.num_found
        while position < last and self._content(blocks, position).digest in self._index:
            position += 1
        blocks.num_found = position
        return position < last and self._content(blocks, position).digest in self._coming

    def allocate(self, blocks: SequenceBlocks, num_tokens: int) -> list[int] | None:
        """Make room for the first `num_tokens` tokens: the new block ids, or None (nothing changed: no room)."""
        need = self.blocks_for(num_tokens) - len(blocks.block_ids)
        if need > self._pool.num_free:
            return None
        return self._extend(blocks, max(need, 0))

    def index(self, blocks: SequenceBlocks, num_computed_tokens: int) -> None:
        """Index every block that is full now: all its tokens are known and computed."""
        if not self.prefix_caching:
            return
        for position in range(blocks.num_indexed, num_computed_tokens // self.block_tokens):
            content = self._content(blocks, position)
            node, displaced = self._index.insert(blocks.tail_uid, content, blocks.block_ids[position])
            if displaced is not None:
                self._pool.discard(displaced)
            self._advance(blocks, position + 1, node.uid)
        self._announce(blocks)

    def free(self, blocks: SequenceBlocks) -> None:
        """Give all blocks back. The tail goes first, so that it is evicted before the prefix it stands on."""
        for block_id in reversed(blocks.block_ids):
            self._pool.release(block_id, keep=self._index.holds(block_id))
        self._reset(blocks)

    def stats(self) -> CacheStats:
        """Gauges of this moment."""
        return CacheStats(self.num_blocks, self._pool.num_free, self._pool.num_cached, len(self._index))

    def check(self, handles: Iterable[SequenceBlocks]) -> None:
        """Assert every invariant, given all handles that hold blocks. O(blocks): for tests and idle moments."""
        references: Counter[int] = Counter()
        coming: Counter[bytes] = Counter()
        for blocks in handles:
            held = blocks.block_ids
            if blocks.coming is not None:
                coming[blocks.coming] += 1
                assert blocks.coming == blocks.contents[blocks.num_indexed].digest, blocks
            assert len(set(held)) == len(held), f"a sequence holds a block twice: {held}"
            assert blocks.capacity_tokens == len(held) * self.block_tokens, blocks
            assert blocks.num_indexed <= min(len(held), len(blocks.contents)), blocks
            references.update(held)
        expected = [references[block_id] for block_id in range(self.num_blocks)]
        assert coming == self._coming
        self._pool.check(expected, self._index.indexed_blocks())

    # --- inside ------------------------------------------------------------------------------------------------

    def _findable_blocks(self, blocks: SequenceBlocks, findable_tokens: int) -> int:
        """Leading blocks that may be found; at least one known token is left to compute."""
        return min(len(blocks.tokens) - 1, findable_tokens) // self.block_tokens

    def _match(self, blocks: SequenceBlocks, findable_tokens: int) -> list[PrefixNode]:
        """Nodes of the longest indexed prefix that may be found."""
        matched: list[PrefixNode] = []
        if not self.prefix_caching:
            return matched
        parent_uid = ROOT_UID
        for position in range(self._findable_blocks(blocks, findable_tokens)):
            node = self._index.find(parent_uid, self._content(blocks, position))
            if node is None:
                break
            matched.append(node)
            parent_uid = node.uid
        return matched

    def _match_may_have_grown(self, blocks: SequenceBlocks, findable_tokens: int) -> bool:
        """Whether a refused sequence finds more now: O(1), since it is asked again at every step.

        What it lacks is (free blocks it needs) - (free blocks there are). Sharing, releasing and evicting the
        blocks it matched change both alike, so only frees and a longer match can help; `admit` sees the frees.
        """
        position = blocks.refused_matched
        if not self.prefix_caching or position >= self._findable_blocks(blocks, findable_tokens):
            return False
        return self._content(blocks, position).digest in self._index

    def _announce(self, blocks: SequenceBlocks) -> None:
        """Say which block this handle computes next. What generated tokens will fill, nobody knows yet."""
        self._withdraw(blocks)
        position = blocks.num_indexed
        if self.prefix_caching and (position + 1) * self.block_tokens <= len(blocks.tokens):
            blocks.coming = self._content(blocks, position).digest
            self._coming[blocks.coming] += 1

    def _withdraw(self, blocks: SequenceBlocks) -> None:
        if blocks.coming is not None:
            self._coming[blocks.coming] -= 1
            if not self._coming[blocks.coming]:
                del self._coming[blocks.coming]
            blocks.coming = None

    def _extend(self, blocks: SequenceBlocks, num_blocks: int) -> list[int]:
        new, num_evicted = self._pool.take(num_blocks)
        for block_id in new[num_blocks - num_evicted :]:
            self._index.forget(block_id)
        blocks.block_ids += new
        blocks.capacity_tokens = len(blocks.block_ids) * self.block_tokens
        return new

    def _reset(self, blocks: SequenceBlocks) -> None:
        blocks.block_ids = []
        blocks.capacity_tokens = 0
        blocks.refused_blocks = blocks.refused_matched = blocks.num_found = 0
        self._withdraw(blocks)
        self._advance(blocks, 0, ROOT_UID)

    def _advance(self, blocks: SequenceBlocks, num_indexed: int, tail_uid: int) -> None:
        blocks.num_indexed = num_indexed
        blocks.tail_uid = tail_uid
        blocks.next_index_tokens = (num_indexed + 1) * self.block_tokens if self.prefix_caching else sys.maxsize

    def _content(self, blocks: SequenceBlocks, position: int) -> BlockContent:
        """The contents of full block number `position`."""
        if len(blocks.contents) <= position:
            num_full = len(blocks.tokens) // self.block_tokens
            self._hash_until(blocks, min(position + HASHED_AT_ONCE, num_full))
        return blocks.contents[position]

    def _hash_until(self, blocks: SequenceBlocks, num_blocks: int) -> None:
        """Pack and hash the leading `num_blocks` full blocks, as far as they are not yet."""
        size, contents = self.block_tokens, blocks.contents
        start = len(contents) * size
        packed = pack_tokens(blocks.tokens[start : num_blocks * size])
        digest = contents[-1].digest if contents else ROOT_DIGEST
        for offset in range(0, len(packed), size * TOKEN_BYTES):
            block = packed[offset : offset + size * TOKEN_BYTES]
            num_prompt_tokens = min(max(blocks.num_prompt_tokens - start, 0), size)
            images = marks(blocks.images, start, start + size) if blocks.images else b""
            digest = self._hasher.digest(digest, block, num_prompt_tokens, blocks.salt, images)
            contents.append(BlockContent(digest, block, num_prompt_tokens, blocks.salt, images))
            start += size
