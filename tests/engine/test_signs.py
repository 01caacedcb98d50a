"""Signs of life: the page that carries them, and when they mean that a core is stalled or hung."""

from __future__ import annotations

import os
import stat
import threading

import pytest
from msgspec.structs import replace

from cierzo.cache.config import CacheConfig
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.watch import LONGEST_GAP_S, LOOK_S, Verdict, Watch, process_state
from cierzo.engine.messages import SamplingParams, Submit
from cierzo.engine.signs import NAME, Signs, SignsPage
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.cost import StepCost

LIVES, STALLED, HUNG = Verdict.LIVES, Verdict.STALLED, Verdict.HUNG
CONFIG = FrontendConfig(core_stall_s=1.5, core_hang_s=10.0)


# --- page --------------------------------------------------------------------------------------------------


def test_a_page_is_private_and_both_sides_see_the_same(tmp_path):
    ours = SignsPage.create(str(tmp_path))
    theirs = SignsPage.beside(str(tmp_path / "core.sock"))
    page = tmp_path / NAME
    assert (stat.S_IMODE(page.stat().st_mode), page.stat().st_size) == (0o600, 4096)
    assert ours.read() == Signs(0, 0, 0.0, 0.0)
    page.unlink()  # as the folder goes once the core is connected
    theirs.beat()
    theirs.begin()
    theirs.predict(0.5)
    told = ours.read()
    assert (told.beats, told.turns, told.predicted_s) == (1, 0, 0.5)
    assert told.begun_s > 0
    theirs.end()
    theirs.begin()
    assert ours.read()[:2] == (1, 1)
    assert ours.read().predicted_s == 0.0  # the next turn's is not known yet
    theirs.end()
    assert ours.read() == Signs(1, 2, 0.0, 0.0)


def test_a_core_that_was_started_by_hand_has_a_page_of_its_own(tmp_path):
    page = SignsPage.beside(str(tmp_path / "core.sock"))
    page.beat()
    assert page.read().beats == 1
    assert not list(tmp_path.iterdir())


def test_a_thread_beats_until_the_process_ends(tmp_path):
    page = SignsPage.create(str(tmp_path))
    beaten, seen = threading.Event(), []

    class Watched(SignsPage):
        def beat(self):
            super().beat()
            seen.append(self.read().beats)
            if len(seen) == 3:
                beaten.set()

    theirs = Watched.beside(str(tmp_path / "core.sock"))
    theirs.start_beating()
    assert beaten.wait(10)
    assert page.read().beats >= 3


# --- rule --------------------------------------------------------------------------------------------------


class Core:
    """Signs of a core that may stop, and a clock."""

    def __init__(self, state: str = "S") -> None:
        self.state = state
        self.asked = 0
        self.watch = Watch(CONFIG, self._state_of)
        self.now = 100.0
        self.signs = Signs(1, 0, 0.0, 0.0)

    def _state_of(self) -> str:
        self.asked += 1
        return self.state

    def run(self, seconds: float, *, beats: bool = True, steps: bool = False) -> dict[Verdict, float]:
        """Let time pass under the watch; when each verdict was first given, seconds from now."""
        began, verdicts = self.now, {}
        while self.now < began + seconds:
            self.now += LOOK_S
            beat, step = self.signs.beats + beats, self.signs.turns + steps
            begun_s = self.now if steps else self.signs.begun_s
            self.signs = Signs(beat, step, begun_s, self.signs.predicted_s)
            verdicts.setdefault(self.watch.look(self.signs, self.now), self.now - began)
            if HUNG in verdicts:
                break
        return verdicts

    def begin(self, predicted_s: float) -> None:
        self.signs = self.signs._replace(begun_s=self.now, predicted_s=predicted_s)


def test_an_idle_core_needs_beats_alone():
    core = Core()
    assert set(core.run(1000)) == {LIVES}
    assert not core.asked  # /proc is not looked at meanwhile


def test_steps_are_a_sign_too():
    assert set(Core().run(100, beats=False, steps=True)) == {LIVES}


@pytest.mark.parametrize(
    ("state", "hung_after_s"),
    [("S", 10.0), ("R", 10.0), ("D", 10.0), ("T", 5.0), ("", 10.0)],
)
def test_without_any_sign_a_core_stalls_within_two_seconds_and_then_hangs(state, hung_after_s):
    core = Core(state)
    core.run(1)
    verdicts = core.run(60, beats=False)
    assert 1.5 <= verdicts[STALLED] <= 2.0
    assert hung_after_s <= verdicts[HUNG] <= hung_after_s + 2 * LOOK_S
    assert ("stopped by a signal" in core.watch.reason) == (state == "T")


def test_a_debugger_is_left_alone():
    core = Core("t")
    core.run(1)
    verdicts = core.run(600, beats=False)
    assert (STALLED in verdicts, HUNG in verdicts, core.watch.reason) == (True, False, "it is being traced")
    assert core.run(LOOK_S) == {LIVES: pytest.approx(LOOK_S)}


def test_a_pause_shorter_than_the_stall_time_is_nothing():
    core = Core("T")
    for _ in range(50):
        assert set(core.run(1.2, beats=False)) == {LIVES}
        core.run(LOOK_S)
    assert not core.asked


@pytest.mark.parametrize(
    ("predicted_s", "stalled_after_s", "hung_after_s"),
    [
        (0.0, None, 10.0),  # unknown
        (0.05, 1.5, 10.0),
        (0.5, 5.0, 10.0),
        (1.0, None, 10.0),
        (3.0, None, 30.0),
    ],
)
def test_a_step_that_goes_on_while_the_core_beats(predicted_s, stalled_after_s, hung_after_s):
    """As in a native call that never returns: it has released the interpreter."""
    core = Core()
    core.run(1)
    core.begin(predicted_s)
    verdicts = core.run(100)
    assert verdicts.get(STALLED) == (stalled_after_s and pytest.approx(stalled_after_s, abs=2 * LOOK_S))
    assert verdicts[HUNG] == pytest.approx(hung_after_s, abs=2 * LOOK_S)
    assert "its turn 1" in core.watch.reason


def test_a_long_step_that_ends_is_no_hang():
    core = Core()
    core.run(1)
    for _ in range(3):
        core.begin(3.0)
        assert set(core.run(29)) == {LIVES}
        core.run(LOOK_S, steps=True)


def test_a_step_that_holds_the_interpreter_needs_another_sign_within_the_hang_time():
    core = Core("R")
    core.run(1)
    core.begin(5.0)
    verdicts = core.run(100, beats=False)
    assert verdicts[STALLED] == pytest.approx(1.6, abs=2 * LOOK_S)
    assert verdicts[HUNG] == pytest.approx(10.0, abs=2 * LOOK_S)


def test_time_in_which_nobody_looked_does_not_count():
    """The whole machine was frozen for an hour, or the front end was."""
    core = Core()
    core.run(1)
    for _ in range(1, int(CONFIG.core_stall_s / LONGEST_GAP_S) + 1):
        core.now += 3600
        assert core.watch.look(core.signs, core.now) is LIVES
    core.now += 3600
    assert core.watch.look(core.signs, core.now) is STALLED


def test_a_core_that_gives_no_signs_is_not_judged_by_them():
    core = Core()
    core.signs = Signs(0, 0, 0.0, 0.0)
    assert set(core.run(1000, beats=False)) == {LIVES}


def test_the_state_of_a_process():
    assert process_state(os.getpid()) in "RS"
    assert process_state(2**22 + 1) == ""  # beyond the kernel's largest


# --- what the core tells -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_core_tells_what_it_predicts_before_it_computes(overlap):
    config = fake_config(
        SchedulerConfig(budget_tokens=32, max_running=8, max_model_len=512, max_chunk_tokens=32),
        CacheConfig(block_tokens=8, num_blocks=64, hash_key="00" * 16),
    )
    told = []

    class Runner(FakeRunner):
        def launch(self, plan, batch):
            told.append("launched")
            super().launch(plan, batch)

    runner = Runner(vocab_size=300, num_blocks=64, block_tokens=8, max_running=8)
    core = EngineCore(replace(config, overlap=overlap), runner)
    core._scheduler.reprice(StepCost(0.5, 0.0, 0.0, 0.0, 0.25, 0.0, 0.0))  # half a second, and a quarter a row
    core.observe = lambda plan: told.append((plan.num_tokens, core.predicted_s))
    core.submit(Submit(request_id=1, prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=2, seed=0)))
    while core.has_work():
        core.step()
    assert [entry for entry in told if entry == "launched" or entry[0]][:2] == [(3, 1.25), "launched"]
    assert told.count("launched") == 2
