"""A campaign's store, loop and outcome, with scripted subjects: nothing is loaded."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cierzo.bench.campaign import loop, outcome
from cierzo.bench.campaign.loop import Block, Campaign, DeviceLost, Run, Session
from cierzo.bench.campaign.outcome import Ratio, Row, saved
from cierzo.bench.campaign.store import CEILINGS, STARTED, TIME_OVER, Sample, Store, has_samples
from cierzo.bench.campaign.table import Grid, grid_of, middle, page
from cierzo.bench.headline.outcome import Outcome, text
from cierzo.engine.errors import ConfigError

IDENTITY = {"commit": "abc", "device": "a card", "small4": "one"}
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "somewhere" / "samples.jsonl"


def sample(cell: str, subject: str, number: int = 0, result: Any = None, error: str = "") -> Sample:
    return Sample(cell=cell, subject=subject, round=number, started="", took_s=0.5, result=result, error=error)


def test_samples_survive_on_disk(path: Path) -> None:
    store = Store(path, IDENTITY)
    store.add(sample("decode", "ours", 1, {"rate": 2.5}))
    store.add(sample("decode", "theirs", error="no memory"))
    again = Store(path, IDENTITY)
    assert list(again) == list(store)
    assert again.measured("decode", "ours") == {1: {"rate": 2.5}}
    assert again.measured("prefill", "ours") == {}
    assert again.measured("decode", "theirs") == {}, "a failure is no measurement"
    assert again.error("decode", "theirs") == "no memory"
    again.add(sample("decode", "theirs", result=None))
    assert again.measured("decode", "theirs") == {0: None}, "a result may be null"
    assert again.error("decode", "theirs") == ""


def test_what_a_killed_run_left_unfinished_is_dropped(path: Path) -> None:
    Store(path, IDENTITY).add(sample("a", "ours", result=1))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"cell": "b", "subj')
    again = Store(path, IDENTITY)
    again.add(sample("c", "ours", result=3))
    assert [one.cell for one in Store(path, IDENTITY)] == ["a", "c"]
    path.write_bytes(whole[:5])
    assert list(Store(path, IDENTITY)) == []


def test_a_file_begins_with_its_first_sample(path: Path) -> None:
    store = Store(path, IDENTITY)
    assert not path.exists()
    assert not has_samples(path)
    store.add(sample("a", "ours", result=1))
    assert has_samples(path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert (json.loads(lines[0]), len(lines)) == (IDENTITY, 2)
    path.write_bytes(lines[0])
    assert not has_samples(path)


def test_a_full_disk_leaves_no_half_line(path: Path) -> None:
    store = Store(path, IDENTITY)
    store.add(sample("a", "ours", result=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left"):
            store.add(sample("b", "ours", result=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    store.add(sample("c", "ours", result=2))
    assert [one.cell for one in Store(path, IDENTITY)] == ["a", "c"]


def test_samples_of_something_else_are_refused_by_name(path: Path) -> None:
    Store(path, IDENTITY).add(sample("a", "ours", result=1))
    for field in IDENTITY:
        with pytest.raises(ConfigError, match=f"{field} '{IDENTITY[field]}', this run is of 'new'"):
            Store(path, {**IDENTITY, field: "new"})


@pytest.mark.parametrize("line", ['{"cell": 1', '{"cell": "a"}', '{"part": "a", "name": "b"}', "[1]"])
def test_a_line_that_is_no_sample_is_named(path: Path, line: str) -> None:
    Store(path, IDENTITY).add(sample("a", "ours", result=1))
    path.write_bytes(path.read_bytes() + f"{line}\n".encode())
    with pytest.raises(ConfigError, match=r"samples\.jsonl, line 3"):
        Store(path, IDENTITY)


class Scripted(Campaign[str, str]):
    """Subjects that answer from a function, and write down what they are asked."""

    def __init__(self, answer: Callable[[str, str, int], Any] = lambda *_: 10.0) -> None:
        self.diary: list[str] = []
        self.answer = answer
        self.more: dict[str, Any] = {}
        self.can_do: Callable[[], Any] = lambda: None

    @property
    def blocks(self) -> Sequence[Block[str, str]]:
        return [Block("first", ["a", "b"], ["ours", "theirs"]), Block("second", ["c"], ["ours", "theirs"])]

    def ceilings(self) -> Any:
        return self.can_do()

    def open(self, block: Block[str, str], subject: str) -> Session[str] | None:
        self.diary.append(f"open {subject}")
        self.answer("open", subject, -1)
        if subject == "nobody":
            return None

        def measure(cell: str, number: int) -> Any:
            self.diary.append(f"{subject} {cell}{number}")
            return self.answer(cell, subject, number)

        return Session(measure, lambda: self.diary.append(f"close {subject}"), lambda: self.more)

    def told(self, cell: str, result: Any) -> str:
        return f"{result} of {cell}"


def run(campaign: Scripted, path: Path, rounds: int = 1, **more: Any) -> tuple[Store, list[str]]:
    store, said = Store(path, IDENTITY), []
    Run(campaign, store, said.append, **more).measure(rounds)
    return store, said


def test_subjects_follow_each_other_and_none_always_goes_first(path: Path) -> None:
    campaign = Scripted()
    _, said = run(campaign, path, rounds=2)
    ours, theirs = (
        {n: [f"open {who}", f"{who} a{n}", f"{who} b{n}", f"close {who}"] for n in (0, 1)}
        for who in ("ours", "theirs")
    )
    last = [
        [f"open {who}", f"{who} c{n}", f"close {who}"] for n in (0, 1) for who in ("ours", "theirs")[:: 1 - 2 * n]
    ]
    assert campaign.diary == [*ours[0], *theirs[0], *last[0], *last[1], *theirs[1], *ours[1], *last[2], *last[3]]
    assert said[0].endswith("round 1  ours  a: 10.0 of a")


def test_a_second_run_measures_nothing_and_further_rounds_go_on(path: Path) -> None:
    run(Scripted(), path)
    again = Scripted()
    again.can_do = lambda: again.diary.append("ceilings")
    run(again, path)
    assert again.diary == []
    run(again, path, rounds=2)
    assert [line for line in again.diary if line[-1].isdigit()] == [
        *("theirs a1", "theirs b1", "ours a1", "ours b1", "theirs c1", "ours c1"),
    ]


def test_a_failure_gets_a_new_session_and_is_tried_again(path: Path) -> None:
    broken = True

    def answer(cell: str, subject: str, number: int) -> float:
        if broken and (cell, subject) == ("a", "theirs"):
            raise RuntimeError("out of luck")
        return 10.0

    campaign = Scripted(answer)
    store, said = run(campaign, path)
    assert store.error("a", "theirs") == "out of luck"
    assert store.measured("b", "theirs") == {0: 10.0}
    assert sum("FAILED: out of luck" in line for line in said) == 1
    assert campaign.diary.count("open theirs") == campaign.diary.count("close theirs") == 3
    broken = False
    campaign.diary.clear()
    run(campaign, path)
    assert campaign.diary == ["open theirs", "theirs a0", "close theirs"]


def test_a_subject_that_does_not_open_fails_in_all_its_cells(path: Path) -> None:
    def answer(cell: str, subject: str, number: int) -> float:
        if (cell, subject) == ("open", "ours"):
            raise RuntimeError
        return 10.0

    store, _ = run(Scripted(answer), path)
    assert {store.error(cell, "ours") for cell in "abc"} == {"RuntimeError"}
    assert store.measured("c", "theirs") == {0: 10.0}


def test_a_subject_without_such_cells_leaves_no_sample(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "blocks", [Block("first", ["a"], ["nobody", "ours"])])
    store, _ = run(Scripted(), path)
    assert [one.subject for one in store] == ["ours"]


def test_an_interrupted_run_leaves_nothing_open_and_goes_on(path: Path) -> None:
    def answer(cell: str, subject: str, number: int) -> float:
        if (cell, subject) == ("b", "theirs"):
            raise KeyboardInterrupt
        return 10.0

    campaign = Scripted(answer)
    with pytest.raises(KeyboardInterrupt):
        run(campaign, path)
    assert campaign.diary[-1] == "close theirs"
    rest = Scripted()
    run(rest, path)
    assert rest.diary[:3] == ["open theirs", "theirs b0", "close theirs"]


def test_a_cell_that_was_interrupted_has_not_failed(path: Path) -> None:
    """Though it was announced, which of a run that was killed says that it took the run along."""

    def answer(cell: str, subject: str, number: int) -> float:
        if cell == "b":
            raise KeyboardInterrupt
        return 10.0

    with pytest.raises(KeyboardInterrupt):
        run(Scripted(answer), path, announce=True)
    assert not Store(path, IDENTITY).failed("b", "theirs")
    assert run(Scripted(), path, announce=True)[0].measured("b", "ours") == {0: 10.0}


def test_a_lost_device_ends_the_run_and_blames_no_further_cell(path: Path) -> None:
    def answer(cell: str, subject: str, number: int) -> float:
        if (cell, subject) == ("a", "ours"):
            raise RuntimeError("CUDA error: misaligned address")
        if cell == "open" and "ours a0" in campaign.diary:
            raise DeviceLost("no process gets the device")
        return 10.0

    campaign = Scripted(answer)
    with pytest.raises(DeviceLost):
        run(campaign, path)
    assert campaign.diary == ["open ours", "ours a0", "close ours", "open ours"]
    assert [one.cell for one in Store(path, IDENTITY)] == ["a"]


def test_no_cell_is_begun_when_time_is_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, said = run(Scripted(), path, deadline=-1.0)
    assert list(store) == []
    assert said == ["time is over: run it again for the rest"]
    now = 0.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)

    def answer(cell: str, subject: str, number: int) -> float:
        nonlocal now
        now += cell != "open"
        return 10.0

    store, said = run(Scripted(answer), path, deadline=2.5)
    assert [(one.cell, one.subject) for one in store] == [("a", "ours"), ("b", "ours"), ("a", "theirs")]


def test_cells_that_failed_or_took_the_run_along_are_not_tried_again_unasked(path: Path) -> None:
    def answer(cell: str, subject: str, number: int) -> float:
        if subject == "theirs" and cell != "open":
            raise {"a": ValueError("wrong"), "b": SystemExit()}.get(cell, RuntimeError(TIME_OVER))
        return 10.0

    with pytest.raises(SystemExit):
        run(Scripted(answer), path, announce=True)
    states = [(one.cell, one.subject, one.error) for one in Store(path, IDENTITY)]
    assert states[-3:] == [("a", "theirs", STARTED), ("a", "theirs", "wrong"), ("b", "theirs", STARTED)]
    assert states[:2] == [("a", "ours", STARTED), ("a", "ours", "")]
    campaign = Scripted(answer)
    store = Store(path, IDENTITY)
    again = Run(campaign, store, lambda _: None, announce=True, retry=False)
    again.measure(1)
    assert [line for line in campaign.diary if line[-1] == "0"] == ["ours c0", "theirs c0"]
    assert again.failed == 0, "what time cut off is no failure"
    assert not store.failed("c", "theirs")
    campaign = Scripted(answer)
    run(campaign, path, retry=False)
    assert campaign.diary == ["open theirs", "theirs c0", "close theirs"]
    rest = Scripted()
    run(rest, path, announce=True)
    assert [line for line in rest.diary if line[-1] == "0"] == ["theirs a0", "theirs b0", "theirs c0"]


def test_a_result_is_on_disk_before_the_terminal_has_it(path: Path) -> None:
    def say(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Run(Scripted(), Store(path, IDENTITY), say).measure(1)
    assert Store(path, IDENTITY).measured("a", "ours") == {0: 10.0}


def test_a_result_that_cannot_be_told_counts(path: Path) -> None:
    campaign = Scripted()
    campaign.told = lambda cell, result: str(1 / 0)  # type: ignore[method-assign]
    store, said = run(campaign, path)
    assert store.measured("a", "ours") == {0: 10.0}
    assert all("measured; ZeroDivisionError in telling it" in line for line in said)


def test_ceilings_and_by_products_are_samples_too(path: Path) -> None:
    campaign = Scripted()
    turns = iter((1.0, 2.0))
    campaign.can_do = lambda: next(turns)
    campaign.more = {"memory": 2.5}
    store, _ = run(campaign, path)
    assert store.ceilings() == [1.0, 2.0]
    assert [one.subject for one in store if one.cell == CEILINGS] == ["first", "second"]
    assert store.measured("memory", "ours") == {0: 2.5}


def test_ceilings_that_cannot_be_measured_leave_the_cells(path: Path) -> None:
    def no_ceilings() -> Any:
        raise OSError("no such program")

    campaign = Scripted()
    campaign.can_do = no_ceilings
    store, _ = run(campaign, path)
    assert store.ceilings() == []
    assert store.error(CEILINGS, "first") == "no such program"
    assert store.measured("c", "ours") == {0: 10.0}


def test_rows_have_the_result_of_the_round_in_the_middle(path: Path) -> None:
    store = Store(path, IDENTITY)
    for number, value in enumerate((90.0, 120.0, 100.0)):
        store.add(sample("a", "ours", number, {"rate": value}))
    store.add(sample("a", "theirs", error="no memory"))

    def values(cell: str, subject: str) -> dict[int, float]:
        return {number: result["rate"] for number, result in store.measured(cell, subject).items()}

    def about(cell: str, subject: str, result: Any) -> dict[str, Any]:
        return {"result": result, "note": f"{subject} in {cell}"}

    places = [("a", "ours"), ("a", "theirs"), ("b", "ours")]
    ours, theirs = outcome.rows(store, places, values, about)
    assert (ours.rounds, ours.values, ours.result) == ([0, 1, 2], [90.0, 120.0, 100.0], {"rate": 100.0})
    assert (theirs.values, theirs.result, theirs.error) == ([], None, "no memory")
    assert theirs.note == "theirs in a"
    store.add(sample("a", "ours", 3, {"rate": 110.0}))
    ours, _ = outcome.rows(store, places, values, about)
    assert ours.result == {"rate": 100.0}, "of an even number the lower of the two"


def ratio(
    ours: dict[int, float], theirs: dict[int, float], goal: float | None = None, **more: bool
) -> Ratio[str, str]:
    """The ratio of two subjects' values, which are given by round."""
    values = {"ours": ours, "theirs": theirs}
    return outcome.ratio("a", "ours", "theirs", lambda _, subject: values[subject], goal, **more)


def test_ratios_are_of_paired_rounds() -> None:
    """Rounds differ by a factor of ten, the ratio within them does not."""
    found = ratio({0: 3.0, 1: 30.0, 2: 300.0}, {0: 2.0, 1: 20.0, 2: 200.0, 3: 1e6})
    assert (found.ratio, found.rounds) == (1.5, 3)
    alone = ratio({0: 1.0}, {1: 1.0})
    assert (alone.ratio, alone.rounds) == (None, 0)


def test_goals_are_met_or_not_or_not_measured() -> None:
    goals = [(3.0, True), (3.01, True), (3.0, False), (2.99, False), (None, True)]
    said = [ratio({0: 6.0}, {0: 2.0}, goal, at_least=at_least) for goal, at_least in goals]
    assert [one.met for one in said] == [True, False, True, False, None]
    unknown = ratio({}, {0: 2.0}, 3.0)
    assert (unknown.goal, unknown.met) == (3.0, None)


def test_text_is_aligned() -> None:
    grids = [grid_of("title", [{"x": "long", "yy": "1"}, {"x": "s"}]), Grid("empty", ("x",), [])]
    told = page(["head"], grids, ["why"])
    assert told == "head\n\ntitle\nx     yy\nlong   1\ns\n\nnotes\nwhy"
    assert middle([90.0, 100.0, 110.0], 3) == "100 ±10%"
    assert [middle([value], 3) for value in (0.12345, 99.96, 999.6)] == ["0.123", "100", "1000"]


@pytest.mark.parametrize("stem", ["headline-cpu", "headline-simulated-h200", "headline-simulated-4xh100"])
def test_committed_outcomes_say_what_their_tables_say(stem: str) -> None:
    found = saved(RESULTS / stem, Outcome)
    assert found is not None
    command = json.loads((RESULTS / f"{stem}.json").read_bytes())["command"]
    grids, _, explained = (RESULTS / f"{stem}.txt").read_text(encoding="utf-8").rpartition("\n\n")
    assert text(found, command).startswith(grids)
    assert explained.startswith("requests/s: ")


def test_an_outcome_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing was measured: there is no .*nothing\.json"):
        saved(tmp_path / "nothing", Row)
    (tmp_path / "other.json").write_text('{"benchmark": 1}')
    with pytest.raises(ConfigError, match=r"other\.json"):
        saved(tmp_path / "other", Row)
