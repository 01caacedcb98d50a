"""Images in prompts as the scheduler sees them: which of their embeddings a step makes, and which are kept.

An image's embeddings are made by the vision tower, in the step that computes the first row that needs one; where
that would take too long for those who decode, in several steps before it, a few of the tower's stages (its layers)
in each. A chunk may end inside the image, and later steps then need the embeddings again. `EmbeddingBook` says what
is kept between steps, within a bound; the runner obeys (`StepPlan.kept`), and makes what it lacks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cierzo.cache.images import ImageSpan, first_behind

if TYPE_CHECKING:
    from cierzo.scheduler.plan import RequestKey
    from cierzo.scheduler.request import Request


class Image(ImageSpan, frozen=True, kw_only=True, gc=False):
    """An image of a prompt: rows of `columns` image tokens and one that ends the row.

    key: of its embeddings, equal where they may be shared: its digest, and the salt of its request. pixels: what
    the runner makes them of; nobody else reads it.
    """

    columns: int
    key: bytes
    pixels: Any = None

    @property
    def rows(self) -> int:
        """Rows of image tokens."""
        return self.num_tokens // (self.columns + 1)

    @property
    def num_embeddings(self) -> int:
        """Image tokens, each of which has an embedding of the tower's."""
        return self.rows * self.columns

    @property
    def needed_end(self) -> int:
        """Index of the token behind the last one that needs an embedding: the one that ends the last row."""
        return self.end - 1

    def embeddings(self, start: int, end: int) -> tuple[int, int]:
        """Which of its embeddings, first to last + 1, tokens start .. end-1 of the sequence take."""
        first, last = (self._passed(min(max(at - self.offset, 0), self.num_tokens)) for at in (start, end))
        return first, last

    def _passed(self, num_tokens: int) -> int:
        row, column = divmod(num_tokens, self.columns + 1)
        return row * self.columns + column


class MissingImage(NamedTuple):
    """An image whose embeddings a chunk needs and nobody has: rows of the chunk before the first that needs them,
    stages of the tower that are left, and the part of its work that these are."""

    image: Image
    first: int
    stages: int = 1
    share: float = 1.0

    @property
    def size(self) -> float:
        """Embeddings that are left to be made, counting a part of a tower's work as as many of them."""
        return self.share * self.image.num_embeddings


def require(images: Sequence[Image], num_prompt_tokens: int) -> None:
    """Raise ValueError for images that do not stand one behind the other in a prompt of so many tokens."""
    at = 0
    for number, image in enumerate(images):
        if image.columns < 1 or image.num_tokens < 2 or image.num_tokens % (image.columns + 1):
            raise ValueError(f"images[{number}]: {image.num_tokens} tokens are no rows of {image.columns} and one")
        if image.offset < at or image.end > num_prompt_tokens:
            raise ValueError(
                f"images[{number}]: tokens {image.offset} to {image.end - 1}, must lie from {at} to "
                f"{num_prompt_tokens - 1}"
            )
        at = image.end


def within(images: Sequence[Image], start: int, end: int) -> tuple[Image, ...]:
    """The images of which tokens start .. end-1 may need embeddings."""
    found = []
    for image in images[first_behind(images, start + 1) :]:  # the token that ends an image needs none
        if image.offset >= end:
            break
        found.append(image)
    return tuple(found)


class EmbeddingBook:
    """Which images' embeddings are kept: those in use, then the others, least recently used out first, as far as
    `max_tokens` embeddings allow. In use: by the step that is planned, and while a running sequence stands inside
    the image. One image always has room, however large it is."""

    def __init__(self, max_tokens: int, num_stages: int = 1) -> None:
        self._max_tokens, self._num_stages = max_tokens, num_stages
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # key -> embeddings, least recently used first
        self._pins: Counter[bytes] = Counter()  # running sequences that stand inside the image
        self._step: set[bytes] = set()  # used by the step that is being planned
        self._left: dict[bytes, int] = {}  # of those that are begun, stages that are left
        self._made: dict[bytes, tuple[set[RequestKey], int]] = {}  # in this step: for whom, and stages left before
        self._num_kept = 0  # embeddings
        self._begun: list[tuple[Image, int]] = []  # in this step: images, stages
        self._has_changed = True

    def begin_step(self) -> None:
        """Plan the next step: what the one before used may go."""
        self._begun = []
        if not self._kept:
            return
        self._step.clear()
        self._made.clear()
        for key in [key for key in self._left if key not in self._pins]:
            self._drop(key)  # nobody stands before it any more
        self._evict()

    def lacking(self, request: Request, start: int, count: int) -> list[MissingImage]:
        """Find the images that the next `count` tokens need and nobody has, in order."""
        if not request.new.images:
            return []
        found, seen = [], set[bytes]()
        for image in within(request.new.images, start, start + count):
            left = self._left.get(image.key, 0) if image.key in self._kept else self._num_stages
            if left and image.key not in seen:
                seen.add(image.key)
                first = max(image.offset - start, 0)
                found.append(MissingImage(image, first, left, left / self._num_stages))
        return found

    def has_room(self, made: Sequence[MissingImage], more: MissingImage) -> bool:
        """Whether, beside what the chunk has made already, one more image may be made in this step."""
        sizes = {key: self._kept[key] for key in self._step | self._pins.keys()}
        sizes |= {one.image.key: one.image.num_embeddings for one in made}
        sizes.pop(more.image.key, None)
        return not sizes or sum(sizes.values()) + more.image.num_embeddings <= self._max_tokens

    def take(self, request: Request, start: int, count: int, begun: tuple[Image, int] | None = None) -> int:
        """Plan a chunk of a sequence: its images are used, and made if they are not there. begun: the image behind
        it, and stages of it that the step takes. How many embeddings are made that its tenant has not paid for."""
        if not request.new.images or not (count or begun):
            return 0
        end = start + count
        images = within(request.new.images, start, end) if count else ()  # else one that it stands inside of
        made = sum(self._use(image, request) for image in images)
        for image in images:
            if left := self._left.pop(image.key, 0):
                self._made[image.key] = set(), left
            if image.key in self._made:
                self._made[image.key][0].add(request.key)
        inside = [image for image in within(request.new.images, end, end + 1) if image.offset < end]
        if begun is not None:
            image, stages = begun
            made += self._use(image, request)
            self._left[image.key] -= stages
            if not self._left[image.key]:
                del self._left[image.key]
            self._begun.append(begun)
            inside = [image]
        self._unpin(request)
        if inside:
            request.inside_image = inside[0].key
            self._pins[inside[0].key] += 1
        self._evict()
        return made

    def leave(self, request: Request) -> None:
        """A sequence gives up its slot, and does not stand inside an image any more."""
        if request.inside_image is not None:
            self._unpin(request)
            self._evict()

    def withdraw(self, keys: Container[RequestKey]) -> None:
        """Take sequences out of the step: what would have been made for their rows alone is not."""
        for key, (users, left) in self._made.items():
            users -= {one for one in users if one in keys}
            if not users:
                self._left[key] = left

    def take_changes(self, *, is_empty: bool) -> tuple[tuple[bytes, ...] | None, list[tuple[Image, int]]]:
        """Give what a runner has to know of the planned step: keys of all that is kept from then on, if that has
        changed, and what is begun. is_empty: of the step, which no runner hears of."""
        if is_empty:
            return None, []
        has_changed, self._has_changed = self._has_changed, False
        return (*self._kept,) if has_changed else None, self._begun

    def check(self, running: Sequence[Request]) -> None:
        """Assert that what is pinned is kept, and by whom."""
        assert self._num_kept == sum(self._kept.values()), self._kept
        assert self._pins == Counter(one.inside_image for one in running if one.inside_image is not None)
        assert self._pins.keys() | self._left.keys() <= self._kept.keys(), f"{self._pins} of {self._kept}"
        used = self._step | self._pins.keys()
        assert len(used) == len(self._kept) or self._num_kept <= self._max_tokens, self._kept

    def _use(self, image: Image, request: Request) -> int:
        """Keep an image for the step that is planned; embeddings that its tenant pays for."""
        key, made = image.key, 0
        if key not in self._kept:
            self._kept[key], self._has_changed = image.num_embeddings, True
            self._num_kept += image.num_embeddings
            self._left[key] = self._num_stages
            if image.end > request.paid_images_end:
                request.paid_images_end, made = image.end, image.num_embeddings
        self._kept.move_to_end(key)
        self._step.add(key)
        return made

    def _evict(self) -> None:
        if self._num_kept <= self._max_tokens:
            return
        for key in [*self._kept]:
            if self._num_kept <= self._max_tokens:
                break
            if key not in self._step and key not in self._pins:
                self._drop(key)

    def _drop(self, key: bytes) -> None:
        self._num_kept -= self._kept.pop(key)
        self._left.pop(key, None)
        self._has_changed = True

    def _unpin(self, request: Request) -> None:
        key, request.inside_image = request.inside_image, None
        if key is not None:
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
