"""Block ids: who holds them, and which free one is taken next. Knows nothing of tokens or tensors."""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """Reference counts and the free order of `num_blocks` blocks; every operation is O(1) per block.

    A block is in exactly one of three places::

        held    references >= 1
        blank   references == 0, nothing worth keeping: taken first (the last one released, or the least id)
        cached  references == 0, still in the prefix index: taken when no blank is left, least recently used first
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give: blank and cached."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that still hold an indexed prefix."""
        return len(self._cached)

    def is_held(self, block_id: int) -> bool:
        """Whether any sequence refers to the block."""
        return self._references[block_id] > 0

    def take(self, num_blocks: int) -> tuple[list[int], int]:
        """Take free blocks, each with one reference: (ids, how many of the last ones were evicted from the cache).

        The caller has checked `num_free` and forgets the evicted ones' prefixes.
        """
        num_blank = min(num_blocks, len(self._blank))
        taken = [self._blank.pop() for _ in range(num_blank)]
        taken += [self._cached.popitem(last=False)[0] for _ in range(num_blocks - num_blank)]
        for block_id in taken:
            self._references[block_id] = 1
        return taken, num_blocks - num_blank

    def share(self, block_id: int) -> None:
        """Add a reference to a block that is held or cached."""
        if self._references[block_id] == 0:
            del self._cached[block_id]
        self._references[block_id] += 1

    def release(self, block_id: int, *, keep: bool) -> None:
        """Drop one reference; the last one frees the block, into the cached order if it is to be kept."""
        references = self._references[block_id] - 1
        assert references >= 0, f"block {block_id} released more often than taken"
        self._references[block_id] = references
        if references == 0:
            if keep:
                self._cached[block_id] = None
            else:
                self._blank.append(block_id)

    def discard(self, block_id: int) -> None:
        """The block's content is no longer of use: if it is free, it becomes blank."""
        if self._references[block_id] == 0:
            del self._cached[block_id]
            self._blank.append(block_id)

    def check(self, references: list[int], indexed: set[int]) -> None:
        """Assert that counts are those expected, and that each free block lies in the one right place."""
        assert self._references == references, f"reference counts {self._references}, expected {references}"
        free = {block_id for block_id, count in enumerate(references) if count == 0}
        blank, cached = set(self._blank), set(self._cached)
        assert len(blank) == len(self._blank), f"blank blocks listed twice: {self._blank}"
        assert blank == free - indexed, f"blank {blank}, expected {free - indexed}"
        assert cached == free & indexed, f"cached {cached}, expected {free & indexed}"
