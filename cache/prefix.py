"""The prefix index: which block holds which tokens behind which prefix."""

from __future__ import annotations

import msgspec

ROOT_UID = 0  # parent of first blocks


class BlockContent(msgspec.Struct, frozen=True, gc=False):
    """Contents of a full block. Two blocks of equal content behind the same parent hold the same bits."""

    digest: bytes
    packed: bytes
    num_prompt_tokens: int
    salt: bytes
    images: bytes = b""


class PrefixNode(msgspec.Struct, frozen=True, eq=False, gc=False):
    """An indexed block. `uid` is never given twice, so that a node cannot be taken for a later one's parent."""

    uid: int
    parent_uid: int
    block_id: int
    content: BlockContent

    def is_of(self, parent_uid: int, content: BlockContent) -> bool:
        """Whether it stands for this content behind this parent."""
        return self.parent_uid == parent_uid and self.content == content


class PrefixIndex:
    """digest -> node. A digest only finds the candidate; the content decides, so a collision is a miss.

    A node is named as parent by its uid, not by its digest or block: a chain of uids that was compared link by
    link from the root is equal token by token, whatever the hash did. A child whose parent was evicted is
    unreachable from then on; it is replaced when its content is computed again behind a live parent.
    """

    def __init__(self, num_blocks: int) -> None:
        self._by_digest: dict[bytes, PrefixNode] = {}
        self._by_block: list[PrefixNode | None] = [None] * num_blocks
        self._last_uid = ROOT_UID

    def __len__(self) -> int:
        return len(self._by_digest)

    def __contains__(self, digest: bytes) -> bool:
        """Whether the digest finds a candidate at all."""
        return digest in self._by_digest

    def holds(self, block_id: int) -> bool:
        """Whether the block is indexed."""
        return self._by_block[block_id] is not None

    def find(self, parent_uid: int, content: BlockContent) -> PrefixNode | None:
        """The node of exactly this content behind this parent, or None."""
        node = self._by_digest.get(content.digest)
        return node if node is not None and node.is_of(parent_uid, content) else None

    def insert(self, parent_uid: int, content: BlockContent, block_id: int) -> tuple[PrefixNode, int | None]:
        """Index a block that is not indexed yet: (the content's node, the block that lost its place or None).

        If another block with this content and parent is indexed already, its node is returned and `block_id` stays
        outside. A different one under the same digest gives way.
        """
        assert self._by_block[block_id] is None, f"block {block_id} is indexed already"
        old = self._by_digest.get(content.digest)
        if old is not None and old.is_of(parent_uid, content):
            return old, None
        if old is not None:
            self._by_block[old.block_id] = None
        self._last_uid += 1
        node = PrefixNode(self._last_uid, parent_uid, block_id, content)
        self._by_digest[content.digest] = node
        self._by_block[block_id] = node
        return node, None if old is None else old.block_id

    def forget(self, block_id: int) -> None:
        """Drop an indexed block, because it is about to be overwritten."""
        node = self._by_block[block_id]
        assert node is not None, f"block {block_id} is not indexed"
        self._by_block[block_id] = None
        del self._by_digest[node.content.digest]

    def indexed_blocks(self) -> set[int]:
        """Ids of all indexed blocks, after asserting that both directions of the index agree."""
        by_block = {node.block_id: node for node in self._by_block if node is not None}
        by_digest = {node.block_id: node for node in self._by_digest.values()}
        assert by_block == by_digest, f"the index disagrees with itself: {by_block} against {by_digest}"
        assert all(self._by_block[block_id] is node for block_id, node in by_block.items())
        assert all(self._by_digest[node.content.digest] is node for node in by_block.values())
        return set(by_block)
