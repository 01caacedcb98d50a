"""Images of requests: their pixels as they arrive, and their embeddings as they are kept. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import isqrt
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from cierzo.engine.messages import Pixels, PromptImage, Submit
from cierzo.scheduler.images import Image

T = TypeVar("T")

ALL_STAGES = 1 << 30  # stages: more than any tower has
PIXEL_BYTES = 12  # red, green and blue, float32


class PixelData:
    """Pixels of an image, float32 [rows unit, columns unit, 3], `unit` to a side of a merged token. Requests with
    the same image share one; it goes with the last of them."""

    __slots__ = ("__weakref__", "columns", "data", "rows", "unit")

    def __init__(self, image: PromptImage, data: bytearray) -> None:
        """Raises ValueError if the pixels are not those of an image of this size."""
        self.data, self.rows, self.columns = data, image.rows, image.columns
        num_bytes = max(image.rows, 0) * max(image.columns, 0) * PIXEL_BYTES
        self.unit = isqrt(len(data) // num_bytes) if num_bytes else 0
        if not self.unit or num_bytes * self.unit * self.unit != len(data):
            raise ValueError(f"{len(data)} bytes of pixels for {image.rows} x {image.columns} tokens")


def image_of(image: PromptImage, salt: bytes = b"", pixels: PixelData | None = None) -> Image:
    """An image as the scheduler takes it. salt: of its request; those with another one do not share embeddings."""
    return Image(
        offset=image.offset,
        num_tokens=image.num_tokens,
        digest=image.digest,
        columns=image.columns,
        key=image.digest + salt,
        pixels=pixels,
    )


def blank(offset: int, rows: int, columns: int, digest: bytes, unit: int) -> PromptImage:
    """An image of no colour in the place of one whose pixels are not known. unit: pixels to a token's side."""
    return PromptImage(offset, rows, columns, digest, bytes(rows * columns * unit * unit * PIXEL_BYTES))


class PixelStore:
    """Pixels of requests that live, and of the one that comes next, in pieces ahead of it."""

    def __init__(self) -> None:
        self._coming: dict[bytes, tuple[bytearray, int]] = {}  # by digest: what has come so far, and how much
        self._living: WeakValueDictionary[bytes, PixelData] = WeakValueDictionary()

    def take(self, piece: Pixels) -> None:
        """Take a piece. One that does not follow the piece before it begins the image anew, or is dropped."""
        data, end = self._coming.get(piece.digest, (bytearray(), 0))
        if piece.start == 0:
            data, end = bytearray(piece.size), 0
        if piece.start == end and piece.size == len(data) >= end + len(piece.data):
            data[end : end + len(piece.data)] = piece.data
            self._coming[piece.digest] = data, end + len(piece.data)

    def images(self, submit: Submit) -> tuple[Image, ...]:
        """The images of a request, with their pixels; what came ahead of it and is not its own is forgotten.

        Raises ValueError for an image whose pixels are missing, or not those of its size.
        """
        coming, self._coming = self._coming, {}
        return tuple(self._image(image, number, submit, coming) for number, image in enumerate(submit.images))

    def _image(
        self, image: PromptImage, number: int, submit: Submit, coming: dict[bytes, tuple[bytearray, int]]
    ) -> Image:
        pixels = self._living.get(image.digest)
        if pixels is None or (pixels.rows, pixels.columns) != (image.rows, image.columns):
            arrived, end = coming.get(image.digest, (bytearray(), 0))
            data = bytearray(image.pixels) or arrived
            if not data or (data is arrived and end < len(arrived)):
                raise ValueError(f"images[{number}]: {end} of {len(arrived)} bytes of pixels have come")
            try:
                pixels = self._living[image.digest] = PixelData(image, data)
            except ValueError as error:
                raise ValueError(f"images[{number}]: {error}") from None
        return image_of(image, submit.cache_salt, pixels)


class Embeddings(Generic[T]):
    """Embeddings of images by key, of the form T. The scheduler says which are kept; what is missing is made."""

    def __init__(self, embed: Callable[[Image], Iterator[T | None]]) -> None:
        """embed: takes an image through a tower, a stage for each item: None, and in the end the embeddings."""
        self._embed = embed
        self._kept: dict[bytes, T] = {}
        self._begun: dict[bytes, Iterator[T | None]] = {}

    def keep(self, keys: Iterable[bytes]) -> None:
        """Forget all others."""
        wanted = {*keys}
        self._kept = {key: found for key, found in self._kept.items() if key in wanted}
        self._begun = {key: begun for key, begun in self._begun.items() if key in wanted}

    def advance(self, image: Image, stages: int) -> None:
        """Take an image through so many stages more, if as many are left. Raises what a stage raises."""
        if image.key in self._kept:
            return
        begun = self._begun.pop(image.key, None) or self._embed(image)
        for found in islice(begun, stages):
            if found is not None:
                self._kept[image.key] = found
                return
        self._begun[image.key] = begun

    def of(self, image: Image) -> T:
        """Give those of an image, which are made now unless they are there. Raises what making them raises."""
        self.advance(image, ALL_STAGES)
        return self._kept[image.key]
