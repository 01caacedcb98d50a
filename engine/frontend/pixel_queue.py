"""Requests with images on their way to a core: the pixels go first, in pieces, and hold up no other command."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from cierzo.engine.messages import Abort, CoreCommand, Pixels, PromptImage, Submit

PIECE_BYTES = 256 * 1024
TURN_BYTES = 2 * 1024 * 1024  # that are handed over in a turn of the loop


class PixelQueue:
    """Commands that wait until the pixels of a `Submit` before them are written."""

    def __init__(self) -> None:
        self._waiting: deque[Submit | Abort] = deque()
        self._pieces: Iterator[Pixels] = iter(())  # of the first of them

    def takes(self, command: CoreCommand) -> bool:
        """Queue a request with images, or what ends one that waits; False for any other command.

        A request that is ended goes without its images, which would be held and sent for nobody, and its end right
        behind it: the core says how it ended, as of any other. The first keeps its images: the core may have some
        of their pixels, and would keep these.
        """
        if isinstance(command, Submit):
            if command.images:
                self._add(command)
            return bool(command.images)
        if not isinstance(command, Abort) or not self._waiting:
            return False
        waiting = [one.request_id == command.request_id and isinstance(one, Submit) for one in self._waiting]
        places = [place for place, is_its_own in enumerate(waiting) if is_its_own]
        if not places:
            return False
        if command.sample is not None:
            self._add(command)
            return True
        for place in filter(None, places):
            self._waiting[place] = msgspec.structs.replace(self._waiting[place], images=[])
        self._waiting.insert(places[-1] + 1, command)
        return True

    def turn(self) -> Iterator[CoreCommand]:
        """The commands of a turn of the loop; it may be left in the middle, and nothing is lost."""
        left = TURN_BYTES
        while self._waiting and left > 0:
            if (piece := next(self._pieces, None)) is not None:
                left -= len(piece.data)
                yield piece
                continue
            command = self._waiting.popleft()
            self._pieces = _pieces_of(self._waiting[0]) if self._waiting else iter(())
            yield _without_pixels(command) if isinstance(command, Submit) else command

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def _add(self, command: Submit | Abort) -> None:
        if not self._waiting:
            self._pieces = _pieces_of(command)
        self._waiting.append(command)


def _pieces_of(command: Submit | Abort) -> Iterator[Pixels]:
    """The pixels of a request, image by image, equal ones once."""
    images = command.images if isinstance(command, Submit) else ()
    for image in {image.digest: image for image in images}.values():
        yield from _pieces(image)


def _pieces(image: PromptImage) -> Iterator[Pixels]:
    size, view = len(image.pixels), memoryview(image.pixels)
    for start in range(0, size, PIECE_BYTES):
        data = bytes(view[start : start + PIECE_BYTES])
        yield Pixels(digest=image.digest, size=size, start=start, data=data)


def _without_pixels(submit: Submit) -> Submit:
    images = [msgspec.structs.replace(image, pixels=b"") for image in submit.images]
    return msgspec.structs.replace(submit, images=images)
