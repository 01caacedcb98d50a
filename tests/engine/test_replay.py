"""Replay of flight records: the same run, step by step, or where it departs; and what ends it."""

from __future__ import annotations

import random

import msgspec
import pytest
from msgspec.structs import replace
from recorded import CONFIG, KEPT, Recorded, segments, submit
from recorded import records as records_of

from cierzo import cli
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.errors import ConfigError
from cierzo.engine.flight import Ended, Header, Open, Step, Submitted, Tokens, packed
from cierzo.engine.messages import Abort, Submit, ThinkingBudget
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker.fake import FakeRunner
from cierzo.engine.worker.replay import Progress, Replay
from cierzo.kernels.fault import DeviceFault


def _work(recorded: Recorded, seed: int = 0) -> None:
    """A random load with shared beginnings, several samples, cancels and stop tokens."""
    draw = random.Random(seed)
    for request_id in range(30):
        prompt = [7] * draw.choice([0, 16]) + [draw.randrange(300) for _ in range(draw.randint(1, 60))]
        recorded.tell(
            submit(
                request_id,
                prompt,
                max_tokens=draw.randint(1, 30),
                n=draw.randint(1, 3),
                stop_token_ids=tuple(range(0, 32_000, 20)),
            )
        )
        for _ in range(draw.randint(0, 4)):
            recorded.turn()
        if draw.random() < 0.2:
            recorded.tell(Abort(request_id=draw.randrange(request_id + 1)))
    recorded.run()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_with_recorded_prompts_is_the_same_run(tmp_path, overlap, seed):
    recorded = Recorded(tmp_path, with_prompts=True, overlap=overlap)
    _work(recorded, seed)
    records = records_of(tmp_path)
    assert {"stop", "length", "cancelled"} == {record.reason for record in records if isinstance(record, Ended)}
    replay = Replay(records)
    replay.run()
    steps = [record for record in records if isinstance(record, Step)]
    assert replay.departure == ""
    assert (replay.steps, replay.last_step) == (len(steps), steps[-1].step)
    assert replay.describe_outcome().endswith("equal rows and tokens")
    assert not replay.made_up


def test_every_reading_of_the_clock_is_the_recorded_one(tmp_path):
    """A deadline that passed in the middle of the run passes at the same step."""
    recorded = Recorded(tmp_path)
    recorded.readings._clock = iter(range(10_000)).__next__
    for request_id in range(3):
        recorded.tell(replace(submit(request_id, [request_id], max_tokens=50), deadline_at_s=40.0 + 9 * request_id))
    recorded.run()
    records = records_of(tmp_path)
    assert [record.reason for record in records if isinstance(record, Ended)] == ["deadline"] * 3
    replay = Replay(records)
    replay.run()
    assert replay.departure == ""
    broken = [
        replace(record, deadline_at_s=30.0) if isinstance(record, Submitted) and record.request_id == 1 else record
        for record in records
    ]
    replay = Replay(broken)
    replay.run()
    assert "in the record" in replay.departure


@pytest.mark.parametrize("overlap", [False, True])
def test_made_up_prompts_take_the_same_steps(tmp_path, overlap):
    recorded = Recorded(tmp_path, overlap=overlap)
    draw = random.Random(3)
    for request_id in range(20):
        prompt = [draw.randrange(30_000) for _ in range(draw.randint(1, 60))]  # no two share a block
        stops = tuple(range(0, 32_000, 20))
        recorded.tell(submit(request_id, prompt, max_tokens=draw.randint(1, 40), n=2, stop_token_ids=stops))
        recorded.turn()
    recorded.run()
    records = records_of(tmp_path)
    assert {"stop", "length"} == {record.reason for record in records if isinstance(record, Ended)}
    replay = Replay(records)
    replay.run()
    assert (replay.departure, len(replay.made_up)) == ("", 20)
    assert "are made up" in replay.describe_record()
    assert replay.describe_outcome().endswith("equal rows")


def _crowd(recorded: Recorded, seed: int, greedy: bool) -> None:
    """A load with shared beginnings in a cache that is too small for it; some come back, as after a pause or the
    death of an earlier core, with what they had got."""
    draw = random.Random(seed)
    beginnings = [[draw.randrange(30_000) for _ in range(draw.choice([16, 37, 80]))] for _ in range(3)]
    told, got = {}, {}

    def turn() -> None:
        for delta in recorded.turn():
            got.setdefault((delta.request_id, delta.sample), []).extend(delta.token_ids)

    for request_id in range(40):
        prompt = draw.choice(beginnings) + [draw.randrange(3) for _ in range(draw.randint(0, 20))]
        params = {"temperature": 0.0 if greedy else 1.0, "n": draw.randint(1, 3), "max_tokens": draw.randint(5, 60)}
        params["prompt_logprobs"] = draw.choice([None, None, 1])
        told[request_id] = submit(request_id, prompt, stop_token_ids=tuple(range(0, 32_000, 90)), **params)
        if request_id % 3 == 0:  # of an earlier core
            lost = replace(told.pop(request_id), num_scored=draw.randint(0, len(prompt) - 1))
            sampling = replace(lost.sampling, n=1, max_tokens=100)
            for sample in range(params["n"]):
                output = [sample, *range(1, draw.randint(1, 40))]
                recorded.tell(replace(lost, sampling=sampling, output_token_ids=output, first_sample=sample))
        else:
            recorded.tell(told[request_id])
        for _ in range(draw.randint(0, 8)):
            turn()
        paused = draw.choice([*told, -1])
        if draw.random() < 0.6 and any(request.key == (paused, 0) for request in recorded.core.requests()):
            recorded.tell(Abort(request_id=paused, sample=0))
            turn()
            again = replace(told[paused], request_id=1000 + request_id, output_token_ids=got.get((paused, 0), []))
            for _ in range(draw.randint(0, 30)):
                turn()
            recorded.tell(replace(again, sampling=replace(again.sampling, n=1)))
    while recorded.core.has_work():
        turn()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("overlap", "greedy"), [(False, False), (True, False), (False, True)])
def test_made_up_prompts_share_the_beginnings_that_were_shared(tmp_path, overlap, greedy, seed):
    """Prefixes are found, sequences are preempted, samples are restored: with the recorded rows."""
    limits = replace(CONFIG.scheduler, max_model_len=256)
    config = replace(CONFIG, scheduler=limits, cache=replace(CONFIG.cache, num_blocks=44))
    recorded = Recorded(tmp_path, overlap=overlap, config=config)
    _crowd(recorded, seed, greedy)
    stats = recorded.core.stats()
    assert stats.cached_tokens > 500
    assert stats.preemptions > 2
    replay = Replay(records_of(tmp_path))
    replay.run()
    assert replay.departure == ""
    assert replay.describe_outcome().endswith("equal rows")


def _masked(request_id: int, banned: list[list[int]], thinking: ThinkingBudget | None) -> Submit:
    """A request of few tokens, so that masks show."""
    plain = submit(request_id, [7] * 20, seed=1, max_tokens=40, allowed_token_ids=(3, 4, 5, 9))
    return replace(plain, banned_token_ids=banned, thinking=thinking)


MASKS = [([[5], [3, 4]], None), ([[3, 3], [5]], None), ([], ThinkingBudget(2, 3, 9)), ([], ThinkingBudget(4, 3, 9))]


@pytest.mark.parametrize("overlap", [False, True])
def test_masks_are_part_of_a_record(tmp_path, overlap):
    """With its first segment, and where it begins with requests in flight."""
    recorded = Recorded(tmp_path, with_prompts=True, overlap=overlap)
    for request_id, masks in enumerate(MASKS):
        recorded.tell(_masked(request_id, *masks))
    recorded.turn()
    recorded.recorder._begin_segment()
    recorded.run()
    records = records_of(tmp_path)
    second = next(at for at, record in enumerate(records) if at > 1 and isinstance(record, Header))
    for run_of in (records, [records[0], *records[second:]]):
        replay = Replay(run_of)
        replay.run()
        assert replay.departure == ""
        for change in ({"banned": []}, {"thinking": None}):
            replay = Replay(
                [replace(one, **change) if isinstance(one, Submitted | Open) else one for one in run_of]
            )
            replay.run()
            assert "in the record" in replay.departure


@pytest.mark.parametrize("with_prompts", [False, True])
def test_tenants_weights_and_salts_are_part_of_a_record(tmp_path, with_prompts):
    """Who goes first follows from tenant and weight, what is found in the cache from the salt."""
    recorded = Recorded(tmp_path, with_prompts=with_prompts)
    draw = random.Random(5)
    for request_id in range(40):
        tenant, weight = draw.choice([("a", 1.0), ("a", 1.0), ("b", 3.0)])
        prompt = [7] * 24 + [draw.randrange(300) for _ in range(draw.randint(1, 40))]
        plain = submit(request_id, prompt, max_tokens=draw.randint(1, 12))
        salt = draw.choice([b"salt of one", b"salt of another"])
        recorded.tell(replace(plain, tenant=tenant, weight=weight, cache_salt=salt))
        if request_id % 8 == 7:
            recorded.turn()
    recorded.recorder._begin_segment()
    recorded.run()
    records = records_of(tmp_path)
    found = [one for one in records if isinstance(one, Submitted | Open)]
    assert {type(one) for one in found} == {Submitted, Open}
    assert {(one.tenant, one.weight) for one in found} == {("a", 1.0), ("b", 3.0)}
    assert len({one.salt for one in found}) == 2
    assert any(b"salt" in one.salt for one in found) == with_prompts
    replay = Replay(records)
    replay.run()
    assert replay.departure == ""
    for change in ({"tenant": "a"}, {"weight": 1.0}, {"salt": b""}):
        replay = Replay([replace(one, **change) if isinstance(one, Submitted) else one for one in records])
        replay.run()
        assert "in the record" in replay.departure, change


@pytest.mark.parametrize("overlap", [False, True])
def test_without_prompts_masks_are_told_apart_and_not_recorded(tmp_path, overlap):
    """Equal requests share what they have generated, others do not; no row depends on a token."""
    recorded = Recorded(tmp_path, overlap=overlap)
    for request_id, masks in enumerate([*MASKS, *MASKS]):
        request = _masked(request_id, *masks)
        recorded.tell(replace(request, sampling=replace(request.sampling, bad_words=("secret",))))
        for _ in range(25):
            recorded.turn()
    recorded.run()
    records = records_of(tmp_path)
    found = [record for record in records if isinstance(record, Submitted)]
    assert [record.banned for record in found] == [[]] * 8
    digests = [record.banned_digest for record in found]
    assert digests[:4] == digests[4:]
    assert len(set(digests[:3])) == 3
    assert digests[2] == digests[3] == b""
    assert all(record.sampling.bad_words == () for record in found)
    replay = Replay(records)
    replay.run()
    assert replay.departure == ""
    assert replay.describe_outcome().endswith("equal rows")


def test_it_tells_where_it_departs(tmp_path):
    recorded = Recorded(tmp_path, with_prompts=True)
    _work(recorded)
    records = records_of(tmp_path)

    def replayed(change) -> Replay:
        replay = Replay([change(record) for record in records])
        replay.run()
        return replay

    def other_rows(record):
        if isinstance(record, Step) and record.step == 9:
            return replace(record, rows=[(99, 0, 0, 1)])
        return record

    def fewer(record):
        return replace(record, num_seqs=77) if isinstance(record, Step) and record.rows is None else record

    def other_tokens(record):
        return (
            replace(record, tokens=[(r, s, [1] * len(t)) for r, s, t in record.tokens])
            if isinstance(record, Tokens)
            else record
        )

    def other_sampling(record):
        if isinstance(record, Submitted) and record.request_id == 4:
            return replace(record, sampling=replace(record.sampling, seed=99))
        return record

    replay = replayed(other_rows)
    assert replay.departure.startswith("step 9 computes 1 token of request 0, sample 0, from position 70; 1 token")
    assert replay.departure.endswith("in the record 1 token of request 99, sample 0, from position 0")
    assert "another run than the record's: step 9" in replay.describe_outcome()
    first = next(record for record in records if isinstance(record, Step) and record.rows is None)
    assert replayed(fewer).departure.startswith(f"step {first.step} computes")
    assert "of 77" in replayed(fewer).departure
    assert replayed(other_tokens).departure.startswith("request (0, ")
    assert "request (4, " in replayed(other_sampling).departure


def test_a_record_whose_end_came_early_in_the_replay_departs(tmp_path):
    recorded = Recorded(tmp_path, with_prompts=True)
    recorded.tell(submit(1, max_tokens=9))
    recorded.run()
    records = [
        replace(record, sampling=replace(record.sampling, max_tokens=3))
        if isinstance(record, Submitted)
        else record
        for record in records_of(tmp_path)
    ]
    replay = Replay(records)
    replay.run()
    assert replay.departure == "step 4: the record has 1 sequences, the replay has none left"
    assert replay.steps == 3


def test_a_second_segment_goes_on_where_the_first_one_ends(tmp_path):
    recorded = Recorded(tmp_path, with_prompts=True, segment_bytes=8_000)
    recorded.tell(submit(1, max_tokens=400))
    while len(segments(tmp_path)) < 2:
        recorded.turn()
    for _ in range(9):
        recorded.turn()
    records = records_of(tmp_path)
    assert (records[1].number, sum(isinstance(record, Open) for record in records)) == (0, 1)
    replay = Replay(records)
    replay.run()
    assert replay.describe_outcome().endswith("equal rows and tokens")


@pytest.mark.parametrize("with_prompts", [False, True])
def test_a_record_without_its_beginning_starts_from_what_was_in_flight(tmp_path, with_prompts):
    recorded = Recorded(tmp_path, with_prompts=with_prompts, segment_bytes=30_000)
    draw = random.Random(1)
    for request_id in range(400):
        recorded.tell(submit(request_id, [draw.randrange(30_000) for _ in range(9)], max_tokens=20))
        for _ in range(3):
            recorded.turn()
    records = records_of(tmp_path)
    assert records[1].number > 0
    assert sum(isinstance(record, Header) for record in records) == 2
    replay = Replay(records)
    count = sum(
        isinstance(record, Open)
        for record in records[: records.index(next(r for r in records if isinstance(r, Step)))]
    )
    assert f"starts with {count} requests in flight; rows are not compared" in replay.describe_record()
    replay.run()
    assert replay.departure == ""
    compared = ": equal tokens" if with_prompts else "; there was nothing to compare"
    assert replay.describe_outcome().endswith(compared)


@pytest.mark.parametrize("with_prompts", [False, True])
def test_a_model_is_replayed_from_its_checkpoint(tmp_path, with_prompts):
    checkpoint = make_checkpoint(tmp_path / "tiny", like="small4", scale="tiny")
    options = EngineOptions(
        model=str(checkpoint), kv_cache_gib=0.01, max_model_len=256, threads=1, budget_tokens=64
    )
    recorded = Recorded(tmp_path, with_prompts=with_prompts, config=resolve(options))
    draw = random.Random(5)
    for request_id in range(6):
        prompt = [draw.randrange(1000) for _ in range(draw.randint(1, 90))]
        recorded.tell(submit(request_id, prompt, max_tokens=12, n=2, temperature=1.0))
        for _ in range(3):
            recorded.turn()
    recorded.run()
    replay = Replay(records_of(tmp_path))
    replay.run()
    assert replay.describe_outcome().endswith("equal rows and tokens" if with_prompts else "equal rows")


class Killer(FakeRunner):
    """A runner that one token kills."""

    def launch(self, plan, batch):
        super().launch(plan, batch)
        if 666 in batch.token_ids[: plan.num_tokens]:
            raise DeviceFault("an illegal memory access")


def _killer() -> Killer:
    return Killer(vocab_size=32_000, num_blocks=512, block_tokens=8, max_running=8, reads="last")


def test_what_killed_the_core_kills_the_replay_at_the_same_step(tmp_path):
    recorded = Recorded(tmp_path, with_prompts=True, runner=_killer())
    recorded.tell(submit(1, max_tokens=20))
    for _ in range(4):
        recorded.turn()
    recorded.tell(submit(2, [5] * 40 + [666], max_tokens=20))
    with pytest.raises(DeviceFault):
        recorded.run()
    records = records_of(tmp_path)
    last = records[-1]
    assert isinstance(last, Step)  # it was written before the step was launched
    replay = Replay(records, _killer())
    with pytest.raises(DeviceFault, match="illegal"):
        replay.run()
    assert (replay.last_step, replay.departure) == (last.step, "")


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    """A record as the front end keeps it."""
    folder = tmp_path / "flights"
    recorded = Recorded(folder, with_prompts=True)
    _work(recorded)
    path = tmp_path / "20260101T000000Z-died.flight"
    path.write_bytes(b"".join(map(packed, records_of(folder))))
    return path


def test_the_command_tells_what_it_replays_and_how_that_ends(kept, capfd):
    assert cli.main(["replay", str(kept)]) == 0
    out = capfd.readouterr().out
    assert "30 requests of fake, fake runner" in out
    assert "the core died on 2026-01-01 at 00:00:00 UTC: the core process died" in out
    assert "the same run, to the end of the record at step" in out


KILLS = """
import os, signal
from cierzo.engine.worker.fake import FakeRunner
collect = FakeRunner.collect
count = 0
def killing(self):
    global count
    count += 1
    if count == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return collect(self)
FakeRunner.collect = killing
"""


def test_the_command_survives_what_kills_the_replay(kept, capfd, monkeypatch, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    assert cli.main(["replay", str(kept)]) == 1
    assert "step 12 ended the replay: killed by SIGKILL" in capfd.readouterr().out


def test_a_long_replay_tells_how_far_it_is(capfd):
    now = [0.0]
    progress = Progress([KEPT, *[Step(step=1, num_seqs=1, num_tokens=1, rows=None)] * 30], lambda: now[0])
    for _ in range(30):
        progress.step()
        now[0] += 1.0
    assert capfd.readouterr().err.splitlines() == [f"{done} of 30 steps" for done in (5, 10, 15, 20, 25)]


@pytest.mark.parametrize("what", ["missing", "other", "damaged", "version"])
def test_what_is_no_record_is_refused(kept, capfd, what):
    path = kept
    if what == "missing":
        path = kept.with_name("none.flight")
    elif what == "other":
        path.write_text("not a record")
    elif what == "damaged":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        config = msgspec.msgpack.encode({"name": "of another version"})
        path.write_bytes(packed(KEPT) + packed(Header(number=0, config=config, with_prompts=False)))
    assert cli.main(["replay", str(path)]) == 2
    told = "".join(capfd.readouterr())
    assert told.count("\n") == 1
    expected = {
        "missing": "No such file",
        "other": "must be a flight record",
        "damaged": "is damaged",
        "version": "of another version of cierzo",
    }
    assert expected[what] in told


def test_a_kept_file_alone_is_no_record():
    for nothing in ([KEPT], [KEPT, Tokens(tokens=[])]):
        with pytest.raises(ConfigError, match="a header"):
            Replay(nothing)
