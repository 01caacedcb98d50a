"""Replay of flight records of sequences with grammars."""

from __future__ import annotations

import random

import pytest
from grammar_twin import FREE, VOCAB, VOCABULARY
from msgspec.structs import replace
from recorded import CONFIG, Recorded, submit
from recorded import records as records_of

from cierzo.engine.flight import Known, Released, Submitted
from cierzo.engine.messages import Abort
from cierzo.engine.worker import grammars
from cierzo.engine.worker.fake import fake_config
from cierzo.engine.worker.replay import Replay


def _grammars(recorded: Recorded) -> None:
    """A load of which half has a grammar; who is cancelled may be held still."""
    draw = random.Random(2)
    recorded.tell(VOCABULARY)
    texts = ["start: /[a-d]{3,30}/", 'start: "yes" | "no"', "start: /x{2,}y/"]
    for request_id in range(24):
        asked = submit(request_id, [draw.randrange(38)] * draw.randint(1, 40), max_tokens=draw.randint(1, 30), n=2)
        recorded.tell(replace(asked, grammar=FREE + draw.choice(texts)) if request_id % 2 else asked)
        for _ in range(draw.randint(0, 3)):
            recorded.turn()
        if draw.random() < 0.3:
            recorded.tell(Abort(request_id=request_id, sample=draw.choice([None, 1])))
    recorded.run()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("with_prompts", [False, True])
@pytest.mark.parametrize("segment_bytes", [1 << 20, 9_000])
def test_runs_with_grammars_are_the_same_runs(tmp_path, monkeypatch, overlap, with_prompts, segment_bytes):
    """Their sequences queue at the same steps, however long their matchers take. Without prompts there are no
    grammars either: they end where the record says."""
    monkeypatch.setattr(grammars, "MASK_WAIT_S", 10.0)  # a mask that is late is not recorded
    config = fake_config(CONFIG.scheduler, CONFIG.cache, vocab_size=VOCAB)
    recorded = Recorded(
        tmp_path, with_prompts=with_prompts, overlap=overlap, config=config, segment_bytes=segment_bytes
    )
    _grammars(recorded)
    records = records_of(tmp_path)
    replay = Replay(records)
    replay.run()
    assert replay.departure == ""
    assert replay.is_whole == (segment_bytes > 9_000)
    if not replay.is_whole:
        return
    assert any(isinstance(record, Released) for record in records)
    assert any(isinstance(record, Known) for record in records) == with_prompts
    held = [record for record in records if isinstance(record, Submitted) and record.is_held]
    assert {bool(record.grammar) for record in held} == {with_prompts}
    assert {bool(record.banned_digest) for record in held} == {not with_prompts}
