"""Pixels on their way to a core: in pieces, ahead of their request, and in nobody's way."""

from __future__ import annotations

import pytest

from cierzo.engine.frontend.pixel_queue import PIECE_BYTES, TURN_BYTES, PixelQueue
from cierzo.engine.messages import Abort, Pixels, PromptImage, SamplingParams, Submit
from cierzo.engine.worker.images import PixelStore


def submit(request_id, *sizes):
    images = [
        PromptImage(0, 1, 1, bytes([number]) * 16, bytes([number]) * size) for number, size in enumerate(sizes)
    ]
    return Submit(request_id=request_id, prompt_token_ids=[1], sampling=SamplingParams(), images=images)


def drained(queue):
    commands = []
    while not queue.is_empty:
        commands += queue.turn()
    return commands


def test_requests_without_images_do_not_wait():
    queue = PixelQueue()
    assert not queue.takes(submit(1))
    assert not queue.takes(Abort(request_id=1))
    assert queue.is_empty


def test_pieces_come_image_by_image_and_then_the_request():
    queue, sizes = PixelQueue(), (PIECE_BYTES * 2 + 5, 3)
    assert queue.takes(submit(1, *sizes))
    *pieces, last = drained(queue)
    assert [(piece.digest[0], piece.start, len(piece.data), piece.size) for piece in pieces] == [
        (0, 0, PIECE_BYTES, sizes[0]),
        (0, PIECE_BYTES, PIECE_BYTES, sizes[0]),
        (0, 2 * PIECE_BYTES, 5, sizes[0]),
        (1, 0, 3, 3),
    ]
    assert [image.pixels for image in last.images] == [b"", b""]
    assert last.request_id == 1


def test_what_ends_a_request_that_waits_comes_right_behind_it_and_no_pixels_before():
    queue = PixelQueue()
    for request_id in (1, 2, 3):
        assert queue.takes(submit(request_id, 9))
    assert not queue.takes(Abort(request_id=4))
    assert queue.takes(Abort(request_id=2))
    kinds = [(type(each), getattr(each, "request_id", None)) for each in drained(queue)]
    assert kinds == [(Pixels, None), (Submit, 1), (Submit, 2), (Abort, 2), (Pixels, None), (Submit, 3)]
    assert not queue.takes(Abort(request_id=2))


def test_a_request_that_ends_halfway_through_its_pixels_leaves_none_in_the_core():
    queue, store, asked = PixelQueue(), PixelStore(), submit(1, TURN_BYTES + PIECE_BYTES)
    queue.takes(asked)
    commands = [*queue.turn()]
    assert queue.takes(Abort(request_id=1))
    *pieces, last, end = commands + drained(queue)
    for piece in pieces:
        store.take(piece)
    assert (last.request_id, end) == (1, Abort(request_id=1))
    with pytest.raises(
        ValueError, match="bytes of pixels for"
    ):  # all have come; of an image there is none of this size
        store.images(last)
    assert store._coming == {}


def test_a_turn_has_a_bound_and_may_be_left_in_the_middle():
    queue = PixelQueue()
    queue.takes(submit(1, TURN_BYTES + PIECE_BYTES))
    first = [*queue.turn()]
    assert sum(len(piece.data) for piece in first) == TURN_BYTES
    queue.takes(submit(2, 7))
    turn = queue.turn()
    rest = [next(turn)]  # and the socket is full
    rest += drained(queue)
    assert [type(each) for each in rest] == [Pixels, Submit, Pixels, Submit]
