"""Random sequences over a tiny vocabulary and a hash that collides, against simulated block contents."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from cierzo.cache.config import CacheConfig
from cierzo.cache.hashing import BlockHasher
from cierzo.cache.images import ImageSpan
from cierzo.cache.manager import KVCacheManager, SequenceBlocks

Pixel = tuple[bytes, int] | None  # of an image, by its digest, the token of this number
Content = tuple[tuple[int, ...], int, tuple[Pixel, ...]]  # all tokens up to here, how many are prompt, their images


class WeakHasher(BlockHasher):
    """`bits` of a real digest: collisions everywhere."""

    def __init__(self, bits: int) -> None:
        super().__init__(b"")
        self._mask = (1 << bits) - 1

    def digest(
        self, parent: bytes, packed: bytes, num_prompt_tokens: int, salt: bytes, images: bytes = b""
    ) -> bytes:
        """The digest's last bits."""
        whole = super().digest(parent, packed, num_prompt_tokens, salt, images)
        return (int.from_bytes(whole, "big") & self._mask).to_bytes(16, "big")


@dataclass
class Sequence:
    """A handle, and how many of its tokens are computed."""

    blocks: SequenceBlocks
    num_computed: int = 0
    running: bool = False


class Twin:
    """What the blocks hold, position by position, written and read through the block tables."""

    def __init__(self, cache: KVCacheManager) -> None:
        self.cache = cache
        self.pages: dict[tuple[int, int], Content] = {}
        self.sequences: list[Sequence] = []

    def content(self, blocks: SequenceBlocks, position: int) -> Content:
        seen: list[Pixel] = [None] * len(blocks.tokens)
        for image in blocks.images:
            seen[image.offset : image.end] = [(image.digest, number) for number in range(image.num_tokens)]
        num_prompt_tokens = min(blocks.num_prompt_tokens, position + 1)
        return tuple(blocks.tokens[: position + 1]), num_prompt_tokens, tuple(seen[: position + 1])

    def place(self, blocks: SequenceBlocks, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.cache.block_tokens)
        return blocks.block_ids[block], offset

    def start(self, sequence: Sequence, reserve: int) -> None:
        num_free = self.cache.num_free
        cached = self.cache.admit(sequence.blocks, reserve)
        if cached is None:
            assert self.cache.num_free == num_free
            return
        assert cached < len(sequence.blocks.tokens)
        assert self.cache.num_free >= reserve
        sequence.running, sequence.num_computed = True, cached

    def compute(self, sequence: Sequence, count: int) -> None:
        end = min(sequence.num_computed + count, len(sequence.blocks.tokens))
        if self.cache.allocate(sequence.blocks, end) is None:
            return
        for position in range(sequence.num_computed, end):
            self.pages[self.place(sequence.blocks, position)] = self.content(sequence.blocks, position)
        sequence.num_computed = end
        self.cache.index(sequence.blocks, end)

    def stop(self, sequence: Sequence) -> None:
        self.cache.free(sequence.blocks)
        sequence.running, sequence.num_computed = False, 0

    def check(self) -> None:
        running = [sequence for sequence in self.sequences if sequence.running]
        self.cache.check(sequence.blocks for sequence in running)
        for sequence in running:
            for position in range(sequence.num_computed):
                read = self.pages[self.place(sequence.blocks, position)]
                assert read == self.content(sequence.blocks, position)


def images_of(tokens: list[int], seed: int) -> list[ImageSpan]:
    """Runs of equal tokens stand for images, of which there are two of each size; some begin at a later token."""
    images, at = list[ImageSpan](), 0
    for token, run in groupby(tokens):
        size = len([*run])
        skipped = seed % 2 if size > 1 else 0
        if token and (seed >> len(images)) % 3:
            digest = bytes([(seed >> len(images)) % 2])
            images.append(ImageSpan(offset=at + skipped, num_tokens=size - skipped, digest=digest))
        at += size
    return images


OPERATION = st.tuples(
    st.sampled_from(["open", "start", "start", "compute", "compute", "append", "stop"]),
    st.integers(0, 5),
    st.integers(1, 5),
    st.lists(st.integers(0, 1), min_size=1, max_size=9),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(1, 4),
    st.integers(4, 12),
    st.sampled_from([0, 1, 3, 128]),
    st.lists(OPERATION, max_size=50),
)
def test_every_block_table_reads_its_own_tokens(
    block_tokens: int, num_blocks: int, bits: int, operations: list[tuple[str, int, int, list[int]]]
) -> None:
    cache = KVCacheManager(CacheConfig(block_tokens=block_tokens, num_blocks=num_blocks))
    cache._hasher = WeakHasher(bits)
    twin = Twin(cache)
    for name, which, count, tokens in operations:
        if name == "open":
            num_prompt_tokens = min(count, len(tokens))
            images = images_of(tokens[:num_prompt_tokens], which * 5 + count)
            twin.sequences.append(Sequence(cache.open([*tokens], num_prompt_tokens, images=images)))
        if not twin.sequences:
            continue
        sequence = twin.sequences[which % len(twin.sequences)]
        if name == "start" and not sequence.running:
            twin.start(sequence, reserve=count - 1)
        elif name == "compute" and sequence.running:
            twin.compute(sequence, count)
        elif name == "append":
            sequence.blocks.tokens.append(tokens[0])
        elif name == "stop":
            twin.stop(sequence)
        twin.check()
    for sequence in twin.sequences:
        twin.stop(sequence)
    assert cache.num_free == num_blocks
