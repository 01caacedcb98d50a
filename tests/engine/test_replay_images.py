"""Flight records of requests with images: lengths and keyed digests, no pixels, and a replay of the same steps."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from grammar_twin import FREE, VOCAB, VOCABULARY
from image_prompts import picture, random_parts
from image_prompts import submit as with_images
from recorded import CONFIG, Recorded, segments
from recorded import records as records_of

from cierzo.engine.flight import Ended, Open, Submitted
from cierzo.engine.messages import Abort, Submit
from cierzo.engine.worker.fake import fake_config
from cierzo.engine.worker.replay import Replay

SMALL = msgspec.structs.replace(
    CONFIG, scheduler=msgspec.structs.replace(CONFIG.scheduler, image_cache_tokens=12, max_chunk_tokens=9)
)


def work(recorded: Recorded, seed: int) -> None:
    draw = random.Random(seed)
    beginnings = [random_parts(draw, 3) for _ in range(2)]
    for request_id in range(25):
        parts = [*draw.choice(beginnings)[: draw.randint(0, 12)], *random_parts(draw, draw.randint(0, 2))]
        recorded.tell(with_images(request_id, parts, max_tokens=draw.randint(1, 20), ignore_eos=True))
        for _ in range(draw.randint(0, 3)):
            recorded.turn()
        if draw.random() < 0.2:
            recorded.tell(Abort(request_id=draw.randrange(request_id + 1)))
    recorded.run()


@pytest.mark.parametrize("with_prompts", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_replay_takes_the_same_steps(tmp_path: Path, overlap: bool, with_prompts: bool) -> None:
    recorded = Recorded(tmp_path, overlap=overlap, with_prompts=with_prompts, config=SMALL)
    work(recorded, 4)
    records = records_of(tmp_path)
    assert sum(isinstance(record, Submitted) and bool(record.images) for record in records) > 10
    assert any(isinstance(record, Ended) and record.reason == "cancelled" for record in records)
    replay = Replay(records)
    replay.run()
    assert replay.departure == ""
    assert "blank ones of their sizes" in replay.describe_record()


def test_no_grammar_ends_an_answer_about_a_blank_image(tmp_path: Path) -> None:
    """Blank images get other tokens, of which the grammar would end some earlier than the record says."""
    config = fake_config(CONFIG.scheduler, CONFIG.cache, vocab_size=VOCAB)
    recorded = Recorded(tmp_path, with_prompts=True, config=config)
    recorded.tell(VOCABULARY)
    for request_id, parts in enumerate(([1, (0, 2, 3), 5], [1, 5])):
        asked = with_images(request_id, parts)
        recorded.tell(msgspec.structs.replace(asked, grammar=FREE + 'start: "a" | "bbbb"'))
    recorded.run()
    replay = Replay(records_of(tmp_path))
    told: list[Submit] = []
    submit, replay._core.submit = replay._core.submit, lambda one: (told.append(one), submit(one))[1]
    replay.run()
    assert replay.departure == ""
    assert {one.request_id: bool(one.grammar) for one in told} == {0: False, 1: True}


def test_what_is_recorded_tells_equal_images_and_not_which_they_are(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, config=SMALL)
    for request_id, name in enumerate((0, 0, 1)):
        recorded.tell(with_images(request_id, [1, (name, 2, 3), 5] * 3))
    recorded.run()
    written = b"".join(path.read_bytes() for path in segments(tmp_path))
    for name in (0, 1):
        pixels, digest = picture(name, 2, 3)
        assert digest not in written
        assert pixels[:24] not in written
    first, second, third = [record for record in records_of(tmp_path) if isinstance(record, Submitted)]
    assert [image[:3] for image in first.images] == [(1, 2, 3), (11, 2, 3), (21, 2, 3)]
    assert first.images == second.images != third.images
    assert first.pieces == second.pieces
    assert first.pieces != third.pieces
    assert len({image[3] for image in first.images}) == 1


def test_what_is_in_flight_when_a_segment_begins_has_its_images(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, config=SMALL)
    recorded.tell(with_images(1, [1, (0, 2, 3), 5] * 3, max_tokens=50))
    recorded.turn()
    recorded.recorder._begin_segment()
    records = records_of(tmp_path)
    submitted, opened = (
        next(record for record in records if isinstance(record, kind)) for kind in (Submitted, Open)
    )
    assert submitted.images == opened.images
    assert submitted.pieces == opened.pieces[: len(submitted.pieces)]
