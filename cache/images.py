"""Images within a sequence of tokens: what the tokens alone do not say, as they are the same for all images."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from struct import Struct

import msgspec

_MARK = Struct("<III")  # place in the block, offset within the image, bytes of the digest


class ImageSpan(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens `offset` .. end-1 of a sequence, which stand for the image with this digest."""

    offset: int
    num_tokens: int
    digest: bytes

    @property
    def end(self) -> int:
        """Index of the token behind it."""
        return self.offset + self.num_tokens


def first_behind(images: Sequence[ImageSpan], position: int) -> int:
    """Index of the first of a sequence's images, in their order, that ends behind `position`."""
    return bisect_right(images, position, key=_end)


def marks(images: Sequence[ImageSpan], start: int, end: int) -> bytes:
    """Describe the images among tokens start .. end-1, which are equal whatever the image: of each the place of its
    first token there, how much of the image lies before that, and its digest. Empty where there is none."""
    found = []
    for image in images[first_behind(images, start) :]:
        if image.offset >= end:
            break
        place, offset = max(image.offset - start, 0), max(start - image.offset, 0)
        found.append(_MARK.pack(place, offset, len(image.digest)) + image.digest)
    return b"".join(found)


def _end(image: ImageSpan) -> int:
    return image.end
