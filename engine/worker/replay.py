"""Runs a flight record again: the same commands at the same steps, by the same clock.

`python -m cierzo.engine.worker.replay FILE --socket PATH`, which `cierzo replay` starts: a record that ends in the
death of its core may end this process too, and the page of signs beside PATH then tells at which step.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import dropwhile

import msgspec

from cierzo.engine.config import EngineConfig
from cierzo.engine.errors import CierzoError, ConfigError, refusal
from cierzo.engine.flight import (
    DIGEST_BYTES,
    Aborted,
    AnyRecord,
    Ended,
    Failed,
    Header,
    Kept,
    Known,
    Open,
    Released,
    Step,
    Submitted,
    Tokens,
    read,
)
from cierzo.engine.messages import Abort, Submit, TokenDelta
from cierzo.engine.signs import SignsPage
from cierzo.engine.worker.core import EngineCore, Runner
from cierzo.engine.worker.images import blank
from cierzo.scheduler.plan import StepPlan
from cierzo.scheduler.request import DuplicateRequest

MOST_SHOWN = 8  # rows of a step that differs
PROGRESS_S = 5.0


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


class MadeUp:
    """Tokens in the place of those that were not recorded: pieces that were equal are equal, others are not, and
    cuts are at the same places, so that the prefix cache finds what it found."""

    def __init__(self, vocab_size: int, block_tokens: int) -> None:
        self.request_ids: set[int] = set()
        self._vocab_size, self._block_tokens = vocab_size, block_tokens
        # of prompt, parameters and sample, on which an answer depends and on nothing else: tokens of the answer
        self._answers: dict[tuple[bytes, bytes, int], array[int]] = {}
        self._open: dict[tuple[int, int], tuple[array[int], int]] = {}  # by request and sample: its answer, how far

    def tokens(self, record: Submitted | Open) -> list[int]:
        """Prompt and output of a request, or of a sample that goes on."""
        self.request_ids.add(record.request_id)
        if isinstance(record, Open):
            num_tokens, samples = record.num_tokens, range(record.sample, record.sample + 1)
        else:
            num_tokens = record.num_prompt + record.num_output
            samples = range(record.first_sample, record.first_sample + record.sampling.n)
        if not record.pieces:  # there was no room for them
            seed = f"{record.request_id} {samples[0]}"
            return random.Random(seed).choices(range(self._vocab_size), k=num_tokens)
        tokens, prompt = self._of_pieces(record, num_tokens), record.pieces[: self._prompt_bytes(record)]
        sampling = msgspec.structs.replace(record.sampling, n=1, prompt_logprobs=None)
        asked = sampling, record.thinking, record.banned_digest
        parameters = msgspec.msgpack.encode(asked)
        num_output = num_tokens - record.num_prompt
        for sample in samples:
            answer = self._answers.get((prompt, parameters, sample))
            if answer is None or len(answer) < num_output:
                answer = self._answers[prompt, parameters, sample] = array("I", tokens[record.num_prompt :])
            tokens[record.num_prompt :] = answer[:num_output]  # if it comes back, it has what it got here
            self._open[record.request_id, sample] = answer, num_output
        return tokens

    def chose(self, delta: TokenDelta) -> None:
        """Keep what a step chose."""
        key = delta.request_id, delta.sample
        if key in self._open:
            answer, count = self._open[key]
            answer.extend(delta.token_ids[len(answer) - count :] if len(answer) > count else delta.token_ids)
            self._open[key] = answer, count + len(delta.token_ids)

    def _prompt_bytes(self, record: Submitted | Open) -> int:
        return -(-record.num_prompt // self._block_tokens) * DIGEST_BYTES

    def _of_pieces(self, record: Submitted | Open, num_tokens: int) -> list[int]:
        size, choices, made = self._block_tokens, range(self._vocab_size), list[int]()
        for at in range(0, len(record.pieces), DIGEST_BYTES):
            end = min((len(made) // size + 1) * size, num_tokens)
            if len(made) < record.num_prompt:
                end = min(end, record.num_prompt)
            digest = record.pieces[at : at + DIGEST_BYTES]
            made += random.Random(digest).choices(choices, k=end - len(made))
        return made


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
        self._begin_step = begin_step
        self._made_up = MadeUp(self.config.model.vocab_size, self.config.cache.block_tokens)
        self._clock = RecordedClock(self._records)
        self._core = EngineCore(self.config, runner, self._clock)
        self._core.observe = self._compare
        vision = self.config.model.vision
        self._unit = 1 if vision is None else vision.unit_px
        self._expected: Step | None = None
        self._num_seqs = 0
        self._tokens: dict[tuple[int, int], tuple[list[int], list[int]]] = {}  # recorded, and chosen now
        self._held: dict[int, list[Submit | Abort]] = {}  # by request: commands, until its grammar was made

    @property
    def made_up(self) -> set[int]:
        """Requests whose tokens, or images, are not in the record."""
        return self._made_up.request_ids

    def run(self) -> None:
        """Replay every record. What the model raises passes, as it ended the core."""
        for record in self._records:
            self._clock.num_ends += len(record.readings)
            match record:
                case Step():
                    self._step(record)
                case Submitted() | Open():
                    self._submit(record)
                case Known() if not self._core.has_vocabulary:
                    self._core.vocabulary(record.vocabulary)
                case Released():
                    self._release(record.request_id)
                case Aborted():
                    self._abort(Abort(request_id=record.request_id, sample=record.sample, reason=record.reason))
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
        sampling, tokens, grammar = record.sampling, record.tokens, record.grammar
        if isinstance(record, Open):
            first_sample, sampling = record.sample, msgspec.structs.replace(sampling, n=1)
        else:
            first_sample = record.first_sample
        if tokens is None:  # as many others, of a request that ends where the record says
            tokens = self._made_up.tokens(record)
            sampling = msgspec.structs.replace(sampling, ignore_eos=True, stop_token_ids=())
        elif record.images:  # the answer is another one, as the images are
            self._made_up.request_ids.add(record.request_id)
            sampling, grammar = msgspec.structs.replace(sampling, ignore_eos=True, stop_token_ids=()), ""
        submit = Submit(
            request_id=record.request_id,
            prompt_token_ids=tokens[: record.num_prompt],
            output_token_ids=tokens[record.num_prompt :],
            sampling=sampling,
            priority=record.priority,
            arrival_s=record.arrival_s,
            deadline_at_s=record.deadline_at_s,
            first_sample=first_sample,
            banned_token_ids=record.banned,
            thinking=record.thinking,
            tenant=record.tenant,
            weight=record.weight,
            cache_salt=record.salt,
            num_scored=record.num_scored,
            grammar=grammar,
            images=[blank(*image, self._unit) for image in record.images],
        )
        if record.is_held:
            if submit.arrival_s is None:
                self._clock.seek()
                submit = msgspec.structs.replace(submit, arrival_s=self._clock())
            self._held.setdefault(record.request_id, []).append(submit)
        else:
            self._give(submit)

    def _give(self, submit: Submit) -> None:
        self._clock.seek()
        try:
            self._core.submit(submit)
        except DuplicateRequest as error:  # it ended at another step than in the record
            self._depart(str(error))
        self._core.await_grammars()

    def _release(self, request_id: int) -> None:
        """Give the core a request whose grammar was made by now, and what was said of it meanwhile."""
        for command in self._held.pop(request_id, []):
            if isinstance(command, Submit):
                self._give(command)
            else:
                self._abort(command)

    def _abort(self, abort: Abort) -> None:
        held = self._held.get(abort.request_id)
        if held is None:
            self._clock.seek()
            self._core.abort(abort)
        else:
            held.append(abort)

    # --- steps -----------------------------------------------------------------------------------------

    def _step(self, record: Step) -> None:
        if not self._core.has_work():
            if record.num_seqs:  # else it had some that waited for their grammars
                what = f"the record has {record.num_seqs} sequences, the replay has none left"
                self._depart(f"step {record.step}: {what}")
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
        for delta in deltas:
            if delta.request_id in self.made_up:
                self._made_up.chose(delta)
            else:
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
        lines.append(f"the core {self.kept.reason} {_readable(self.kept.at)}: {self.kept.message}")
        failures = [record.message for record in self._records if isinstance(record, Failed)]
        lines += [f"its last words: {message}" for message in failures if message not in self.kept.message]
        if not self.with_prompts:
            lines.append(
                "token ids were not recorded (--record-prompts): prompts and answers are made up, of the same "
                "lengths and equal where the recorded ones were"
            )
        if any(isinstance(record, Submitted | Open) and record.images for record in self._records):
            lines.append("images were not recorded: blank ones of their sizes stand in their places")
        if not self.is_whole:
            count = sum(isinstance(record, Open) for record in self._records)
            lines.append(
                f"the beginning was overwritten: it starts with {count:,} requests in flight; rows are not compared"
            )
        return "\n".join(lines)

    def describe_outcome(self) -> str:
        """Describe how the run compares with the record."""
        if self.departure:
            return f"another run than the record's: {self.departure}"
        compared = " and ".join(["rows"] * self.is_whole + ["tokens"] * self.with_prompts)
        return f"the same run, to the end of the record at step {self.last_step:,}" + (
            f": equal {compared}" if compared else "; there was nothing to compare"
        )


def _without_later_heads(records: list[AnyRecord]) -> list[AnyRecord]:
    """The records of one or two segments; what the second one repeats at its head has been replayed by then."""
    second = next((at for at, record in enumerate(records) if at and isinstance(record, Header)), len(records))
    return [
        *records[:second],
        *dropwhile(lambda record: isinstance(record, Header | Known | Open), records[second:]),
    ]


def _shown(rows: list[tuple[int, int, int, int]]) -> str:
    more = [f"{len(rows) - MOST_SHOWN} more"] if len(rows) > MOST_SHOWN else []
    told = [
        f"{count:,} {'token' if count == 1 else 'tokens'} of request {request_id}, sample {sample}, from position "
        f"{start:,}"
        for request_id, sample, start, count in rows[:MOST_SHOWN]
    ]
    return "; ".join([*told, *more]) or "nothing"


def _readable(at: str) -> str:
    """A time of Kept, for people."""
    for form in ("%Y%m%dT%H%M%S.%fZ", "%Y%m%dT%H%M%SZ"):
        try:
            return f"on {datetime.strptime(at, form).replace(tzinfo=UTC):%Y-%m-%d at %H:%M:%S} UTC"
        except ValueError:
            continue
    return f"at {at}"


class Progress:
    """A line on stderr every few seconds of a long replay."""

    def __init__(self, records: list[AnyRecord], clock: Callable[[], float] = time.monotonic) -> None:
        self._num_steps = sum(isinstance(record, Step) for record in records)
        self._clock = clock
        self._done, self._next_s = 0, clock() + PROGRESS_S

    def step(self) -> None:
        """Count a step that begins."""
        now = self._clock()
        if now >= self._next_s:
            print(f"{self._done:,} of {self._num_steps:,} steps", file=sys.stderr, flush=True)
            self._next_s = now + PROGRESS_S
        self._done += 1


def main() -> int:
    """Replay a file; the exit status: 0 the same run, 1 another one, or one that failed, 2 no record."""
    parser = argparse.ArgumentParser(prog="cierzo.engine.worker.replay", allow_abbrev=False)
    parser.add_argument("file")
    parser.add_argument("--socket", required=True)
    arguments = parser.parse_args()
    signs = SignsPage.beside(arguments.socket)

    def begin_step(step: int) -> None:
        signs.begin_step(step)
        progress.step()

    try:
        records = read(arguments.file)
        replay, progress = Replay(records, begin_step=begin_step), Progress(records)
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
