"""The tokens that stand for images in a prompt: how many, which, and where."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import PromptImage, VisionInfo

# Mean and standard deviation of R, G and B, by which pixels are normalised as Mistral's towers were trained.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Grid(msgspec.Struct, frozen=True, gc=False):
    """The merged tokens that an image is cut into: rows, and in each so many columns."""

    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        """Tokens in a prompt: each row is followed by a break, the last by the end."""
        return (self.columns + 1) * self.rows


class Prepared(msgspec.Struct, frozen=True, gc=False):
    """An image for the tower. pixels: float32 [rows * unit, columns * unit, 3] in little-endian bytes, normalised;
    digest: blake2b-16 of them and of the grid."""

    grid: Grid
    digest: bytes
    pixels: bytes


def require_few(fields: Sequence[str], most: int, limit: str = "max_images") -> None:
    """Raise InvalidRequest for more than `most` images. fields: where they are; limit: its name."""
    if len(fields) > most:
        what = f"{fields[most]}: the request has {len(fields)} images, allowed: {most} ({limit})"
        raise InvalidRequest(what, field=fields[most], limit=most, value=len(fields))


def unit_of(vision: VisionInfo) -> int:
    """Pixels of a merged token's side."""
    return vision.patch * vision.merge


def grid_of(width: int, height: int, vision: VisionInfo) -> Grid:
    """The grid of an image of so many pixels, as mistral-common lays it."""
    ratio = max(height / vision.max_side_px, width / vision.max_side_px)
    if ratio > 1:  # a side of an extreme shape would be rounded to nothing
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    unit = unit_of(vision)
    return Grid(rows=(height - 1) // unit + 1, columns=(width - 1) // unit + 1)


def tokens_of(grid: Grid, vision: VisionInfo) -> list[int]:
    """The tokens that stand for an image in a prompt, row by row."""
    row = [vision.image_token_id] * grid.columns + [vision.break_token_id]
    return row * (grid.rows - 1) + row[:-1] + [vision.end_token_id]


class Images:
    """The images of one prompt while it is written, in the order of the request.

    `order`: their numbers as they were written; a tokenizer may change it, of results that it brings into the order
    of their calls.
    """

    def __init__(self, prepared: Sequence[Prepared] = (), vision: VisionInfo | None = None) -> None:
        self.order: list[int] = []
        self._prepared = prepared
        self._vision = vision

    def __len__(self) -> int:
        return len(self._prepared)

    def write(self, number: int) -> list[int]:
        """The tokens of an image, which comes next in the prompt."""
        self.order.append(number)
        assert self._vision is not None
        return tokens_of(self._prepared[number].grid, self._vision)

    def expand(self, token_ids: list[int]) -> list[int]:
        """A prompt with all tokens of each image, in which a template has written one. Raises InvalidRequest where
        it has written more or fewer of those than there are images."""
        if not self._prepared:
            return token_ids
        assert self._vision is not None
        token_id = self._vision.image_token_id
        if (found := token_ids.count(token_id)) != len(self):
            what = f"the chat template has written {found} images, and messages have {len(self)}"
            raise InvalidRequest(what, field="messages", limit="where the chat template writes images", value=found)
        expanded: list[int] = []
        for each in token_ids:
            expanded += self.write(len(self.order)) if each == token_id else [each]
        return expanded

    def placed(self, token_ids: list[int]) -> list[PromptImage]:
        """The images, each where its tokens stand. Raises InvalidRequest where others stand there: a client's
        ids."""
        if self._vision is None:
            return []
        images, at, token_id = [], 0, self._vision.image_token_id
        for number in self.order or range(len(self)):
            image = self._prepared[number]
            expected = tokens_of(image.grid, self._vision)
            at = _index(token_ids, token_id, at)
            if token_ids[at : at + len(expected)] != expected:
                rows, columns = image.grid.rows, image.grid.columns
                what = f"token_ids[{at}] does not begin the {rows} rows of {columns} tokens of images[{number}]"
                limit = f"{rows} times {columns} image tokens and a break, the last an end"
                raise InvalidRequest(what, field="token_ids", limit=limit, value=at)
            images.append(PromptImage(at, image.grid.rows, image.grid.columns, image.digest, image.pixels))
            at += len(expected)
        if (left := _index(token_ids, token_id, at)) < len(token_ids):
            raise unpaired(left, token_id)
        return images


def unpaired(place: int, token_id: int) -> InvalidRequest:
    """The error for a token that stands for an image, where there is none."""
    what = f"token_ids[{place}] is {token_id}, which stands for an image, and no image came with it"
    return InvalidRequest(what, field="token_ids", limit="no image tokens", value=token_id)


def _index(token_ids: list[int], token_id: int, start: int) -> int:
    """Where a token is found from a place on; the end of the prompt if nowhere."""
    try:
        return token_ids.index(token_id, start)
    except ValueError:
        return len(token_ids)
