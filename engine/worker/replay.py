"""Runs a flight record again: the same commands at the same steps, by the same clock.

`python -m cierzo.engine.worker.replay FILE --socket PATH`, which `cierzo replay` starts: a record that ends in the
death of its core may end this process too, and the page of signs beside PATH then tells at which step.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from itertools import dropwhile

import msgspec

from cierzo.engine.config import EngineConfig
from cierzo.engine.errors import CierzoError, ConfigError, refusal
from cierzo.engine.flight import (
    Aborted,
    AnyRecord,
    Ended,
    Failed,
    Header,
    Kept,
    Open,
    Step,
    Submitted,
    Tokens,
    read,
)
from cierzo.engine.messages import Abort, Submit, TokenDelta
from cierzo.engine.signs import SignsPage
from cierzo.engine.worker.core import EngineCore, Runner
from cierzo.scheduler.plan import StepPlan
from cierzo.scheduler.request import DuplicateRequest

MOST_SHOWN = 8  # rows of a step that differs


class RecordedClock:
    """A clock that gives recorded readings in order, and the last one again once there are no more."""

    def __init__(self, records: Sequence[AnyRecord]) -> None:
        self._times = [time for record in records for time in record.readings] or [0.0]
        self._next = 0
        self.num_ends = 0  # readings up to the end of the record that is being replayed

    def __call__(self) -> float:
        now = self._times[min(self._next, len(self._times) - 1)]
        self._next += 1
        return now

    def seek(self) -> None:
        """Go on after the readings of the record that is being replayed."""
        self._next = self.num_ends


class Replay:
    """A run of a record. `steps` so far; `departure`: where, and how, it first differed from the record."""

    def __init__(
        self, records: list[AnyRecord], runner: Runner | None = None, begin_step: Callable[[int], object] = int
    ) -> None:
        """Loads the recorded checkpoint, unless a `runner` is given. Raises ConfigError, CheckpointError."""
        kept, header = (*records, None)[:2]
        if not isinstance(kept, Kept) or not isinstance(header, Header):
            raise refusal("file", "a flight record with a header", type(header).__name__)
        self.kept = kept
        self._records = _without_later_heads(records[1:])
        try:
            self.config = msgspec.msgpack.decode(header.config, type=EngineConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the record is of another version of cierzo: {error}", field="file") from error
        self.with_prompts = header.with_prompts
        self.is_whole = header.number == 0  # it begins with the core's life
        self.steps = 0
        self.last_step = 0  # the number, by the scheduler's count, of the step under way or the last one
        self.departure = ""
        self.made_up: set[int] = set()  # requests whose tokens are not in the record
        self._begin_step = begin_step
        self._clock = RecordedClock(self._records)
        self._core = EngineCore(self.config, runner, self._clock)
        self._core.observe = self._compare
        self._expected: Step | None = None
        self._num_seqs = 0
        self._tokens: dict[tuple[int, int], tuple[list[int], list[int]]] = {}  # recorded, and chosen now

    def run(self) -> None:
        """Replay every record. What the model raises passes, as it ended the core."""
        for record in self._records:
            self._clock.num_ends += len(record.readings)
            match record:
                case Step():
                    self._step(record)
                case Submitted() | Open():
                    self._submit(record)
                case Aborted():
                    self._clock.seek()
                    self._core.abort(
                        Abort(request_id=record.request_id, sample=record.sample, reason=record.reason)
                    )
                case Tokens():
                    for request_id, sample, tokens in record.tokens:
                        self._meet((request_id, sample), tokens, 0)
                case Ended(reason="stop" | "failed") if record.request_id in self.made_up:  # they would go on
                    self._core.abort(
                        Abort(request_id=record.request_id, sample=record.sample, reason=record.reason)
                    )

    # --- commands --------------------------------------------------------------------------------------

    def _submit(self, record: Submitted | Open) -> None:
        """Give the core a request: one that came, or one that was in flight and goes on from its last token."""
        sampling, tokens = record.sampling, record.tokens
        if isinstance(record, Open):
            num_tokens, first_sample = record.num_tokens, record.sample
            sampling = msgspec.structs.replace(sampling, n=1)
        else:
            num_tokens, first_sample = record.num_prompt + record.num_output, record.first_sample
        if tokens is None:  # as many others, of a request that ends where the record says
            self.made_up.add(record.request_id)
            tokens = random.Random(record.request_id).choices(range(self.config.model.vocab_size), k=num_tokens)
            sampling = msgspec.structs.replace(sampling, ignore_eos=True, stop_token_ids=())
        submit = Submit(
            request_id=record.request_id,
            prompt_token_ids=tokens[: record.num_prompt],
            output_token_ids=tokens[record.num_prompt :],
            sampling=sampling,
            priority=record.priority,
            arrival_s=record.arrival_s,
            deadline_at_s=record.deadline_at_s,
            first_sample=first_sample,
        )
        self._clock.seek()
        try:
            self._core.submit(submit)
        except DuplicateRequest as error:  # it ended at another step than in the record
            self._depart(str(error))

    # --- steps -----------------------------------------------------------------------------------------

    def _step(self, record: Step) -> None:
        if not self._core.has_work():
            self._depart(
                f"step {record.step}: the record has {record.num_seqs} sequences, the replay has none left"
            )
            return
        self.last_step, self._expected = record.step, record
        self._begin_step(record.step)
        self._take(self._core.step())
        self.steps += 1

    def _compare(self, plan: StepPlan) -> None:
        """Hold a step's plan against the record's. Whatever was in flight at its beginning was computed before."""
        self._clock.seek()
        expected, seqs = self._expected, plan.seqs
        if expected is None or self.departure or not self.is_whole:
            return
        rows = [(*seq.key, seq.start, len(seq.token_ids)) for seq in seqs]
        if expected.rows is not None and rows != expected.rows:
            self._depart(f"step {expected.step} computes {_shown(rows)}, in the record {_shown(expected.rows)}")
        elif (len(seqs), plan.num_tokens) != (expected.num_seqs, expected.num_tokens):
            self._depart(
                f"step {expected.step} computes {plan.num_tokens} tokens of {len(seqs)} sequences, "
                f"in the record {expected.num_tokens} of {expected.num_seqs}"
            )

    def _take(self, deltas: list[TokenDelta]) -> None:
        if self.with_prompts:
            for delta in deltas:
                self._meet((delta.request_id, delta.sample), delta.token_ids, 1)

    def _meet(self, key: tuple[int, int], tokens: list[int], side: int) -> None:
        """Compare tokens of a sequence, recorded (side 0) or chosen now (1), as far as both are known."""
        if key[0] in self.made_up:
            return
        pair = self._tokens.setdefault(key, ([], []))
        pair[side].extend(tokens)
        known = min(map(len, pair))
        if pair[0][:known] != pair[1][:known]:
            self._depart(f"request {key}: tokens {pair[1][:known]}, in the record {pair[0][:known]}")
        del pair[0][:known], pair[1][:known]

    def _depart(self, where: str) -> None:
        self.departure = self.departure or where

    # --- words -----------------------------------------------------------------------------------------

    def describe_record(self) -> str:
        """Describe the record, before anything of it is run."""
        steps = sum(isinstance(record, Step) for record in self._records)
        commands = sum(isinstance(record, Submitted) for record in self._records)
        lines = [f"{steps:,} steps and {commands:,} requests of {self.config.name}, {self.config.runner} runner"]
        lines.append(f"the core {self.kept.reason} at {self.kept.at}: {self.kept.message}")
        lines += [f"its last words: {record.message}" for record in self._records if isinstance(record, Failed)]
        if not self.with_prompts:
            lines.append("token ids were not recorded: prompts of the same lengths are made up (--record-prompts)")
        if not self.is_whole:
            count = sum(isinstance(record, Open) for record in self._records)
            lines.append(
                f"the beginning was overwritten: it starts with {count:,} requests in flight; rows are not compared"
            )
        return "\n".join(lines)

    def describe_outcome(self) -> str:
        """Describe how the run compares with the record."""
        if self.departure:
            why = (
                "" if self.with_prompts else "; made-up prompts share no beginnings that a prefix cache could hold"
            )
            return f"another run than the record's: {self.departure}{why}"
        compared = " and ".join(["rows"] * self.is_whole + ["tokens"] * self.with_prompts)
        return f"the same run, to the end of the record at step {self.last_step:,}" + (
            f": equal {compared}" if compared else "; there was nothing to compare"
        )


def _without_later_heads(records: list[AnyRecord]) -> list[AnyRecord]:
    """The records of one or two segments; what the second one repeats at its head has been replayed by then."""
    second = next((at for at, record in enumerate(records) if at and isinstance(record, Header)), len(records))
    return [*records[:second], *dropwhile(lambda record: isinstance(record, Header | Open), records[second:])]


def _shown(rows: list[tuple[int, int, int, int]]) -> str:
    more = f" and {len(rows) - MOST_SHOWN} more" if len(rows) > MOST_SHOWN else ""
    return f"{rows[:MOST_SHOWN]}{more}"


def main() -> int:
    """Replay a file; the exit status: 0 the same run, 1 another one, or one that failed, 2 no record."""
    parser = argparse.ArgumentParser(prog="cierzo.engine.worker.replay", allow_abbrev=False)
    parser.add_argument("file")
    parser.add_argument("--socket", required=True)
    arguments = parser.parse_args()
    signs = SignsPage.beside(arguments.socket)
    try:
        replay = Replay(read(arguments.file), begin_step=signs.begin_step)
    except CierzoError as error:
        print(f"cierzo: {error.code}: {error}", flush=True)
        return 2
    print(replay.describe_record(), flush=True)
    try:
        replay.run()
    except Exception as error:
        print(f"step {replay.last_step:,} ended the replay: {type(error).__name__}: {error}", flush=True)
        return 1
    print(replay.describe_outcome(), flush=True)
    return 1 if replay.departure else 0


if __name__ == "__main__":
    raise SystemExit(main())
