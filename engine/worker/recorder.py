"""The flight recorder: writes down what the core is told and what it computes, for whoever asks why it died.

Two segment files, written in turns, hold the last of it. Each record is one plain write(2): it survives the end of
the process, kill -9 included, though not that of the machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable

import msgspec

from cierzo.engine.config import EngineConfig
from cierzo.engine.flight import (
    Aborted,
    Ended,
    Failed,
    Header,
    Open,
    Record,
    Step,
    Submitted,
    Tokens,
    packed,
    segment_paths,
)
from cierzo.engine.messages import Abort, CoreCommand, SamplingParams, Submit, TokenDelta
from cierzo.engine.worker.core import EngineCore
from cierzo.scheduler.plan import StepPlan

log = logging.getLogger(__name__)

SEGMENT_BYTES = 8 << 20


class Readings:
    """A clock that keeps what it read, until the recorder takes it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.times: list[float] = []

    def __call__(self) -> float:
        now = self._clock()
        self.times.append(now)
        return now


class Recorder:
    """A writer of flight records. It switches itself off, with one line of the log, when the disk refuses.

    `core` runs on the clock `readings`. Call `command` before the core gets one, `step` with its plan before that
    is launched, `results` with what a turn brought.
    """

    def __init__(
        self, config: EngineConfig, core: EngineCore, readings: Readings, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self._core = core
        self._readings = readings
        self._segment_bytes = segment_bytes
        self._with_prompts = config.record_prompts
        self._config = msgspec.msgpack.encode(config)
        self._paths = segment_paths(config.flight_folder, os.getpid())
        self._file = -1
        self._number = -1
        self._size = 0
        self._num_seqs = 0
        self._num_finished = core.num_finished
        try:
            os.makedirs(config.flight_folder, mode=0o700, exist_ok=True)
            self._begin_segment()
        except OSError as error:
            self._switch_off(error)

    @property
    def is_on(self) -> bool:
        """Whether anything is written."""
        return self._file >= 0

    def command(self, command: CoreCommand) -> None:
        """Write down a command."""
        match command:
            case Submit():
                prompt, output = command.prompt_token_ids, command.output_token_ids
                record: Record = Submitted(
                    readings=self._readings.times,
                    request_id=command.request_id,
                    num_prompt=len(prompt),
                    num_output=len(output),
                    sampling=self._shown(command.sampling),
                    priority=command.priority,
                    arrival_s=command.arrival_s,
                    deadline_at_s=command.deadline_at_s,
                    first_sample=command.first_sample,
                    tokens=[*prompt, *output] if self._with_prompts else None,
                )
            case Abort():
                record = Aborted(
                    readings=self._readings.times,
                    request_id=command.request_id,
                    sample=command.sample,
                    reason=command.reason,
                )
            case _:
                return
        self._num_seqs = -1  # the next step's rows are written out
        self._write(record)

    def step(self, plan: StepPlan) -> None:
        """Write down a step that is about to be launched."""
        seqs = plan.seqs
        rows = None
        if plan.num_tokens != len(seqs) or len(seqs) != self._num_seqs:
            rows = [(*seq.key, seq.start, len(seq.token_ids)) for seq in seqs]
            self._num_seqs = len(seqs) if plan.num_tokens == len(seqs) else -1
        self._write(
            Step(
                readings=self._readings.times,
                step=plan.step,
                num_seqs=len(seqs),
                num_tokens=plan.num_tokens,
                rows=rows,
            )
        )

    def results(self, deltas: list[TokenDelta]) -> None:
        """Write down what a turn of the core brought."""
        num_finished = self._core.num_finished
        if self._with_prompts and deltas:
            tokens = [(delta.request_id, delta.sample, delta.token_ids) for delta in deltas if delta.token_ids]
            self._write(Tokens(readings=self._readings.times, tokens=tokens))
        if num_finished != self._num_finished:
            self._num_finished, self._num_seqs = num_finished, -1
            for delta in deltas:
                if delta.finish is not None:
                    self._write(
                        Ended(
                            readings=self._readings.times,
                            request_id=delta.request_id,
                            sample=delta.sample,
                            reason=delta.finish.reason,
                            output_tokens=delta.finish.output_tokens,
                            message=delta.finish.message,
                        )
                    )
        if self._size >= self._segment_bytes:
            try:
                self._begin_segment()
            except OSError as error:
                self._switch_off(error)

    def failed(self, message: str) -> None:
        """Write down why the core cannot go on."""
        self._write(Failed(readings=self._readings.times, message=message))

    def close(self) -> None:
        """Stop, and remove what was written: the core ends in order."""
        self._close_file()
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _write(self, record: Record) -> None:
        """Append a record, which holds the readings made until now."""
        if self._file >= 0:
            data = packed(record)
            try:
                written = os.write(self._file, data)
                if written != len(data):
                    raise OSError(f"{written} of {len(data)} bytes written")
                self._size += written
            except OSError as error:
                self._switch_off(error)
        self._readings.times.clear()

    def _begin_segment(self) -> None:
        """Go on in the older one of the two files, from its start. Raises OSError."""
        self._close_file()
        self._number += 1
        self._size, self._num_seqs = 0, -1
        path = self._paths[self._number % 2]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        readings = [*self._readings.times]
        header = Header(number=self._number, config=self._config, with_prompts=self._with_prompts)
        self._write(header)
        room = self._segment_bytes // 2  # for the tokens of those in flight
        for request in self._core.requests():
            new, tokens = request.new, request.tokens
            room -= 5 * len(tokens)  # bytes of a token, at most
            self._write(
                Open(
                    request_id=request.key[0],
                    sample=request.key[1],
                    num_prompt=request.num_prompt_tokens,
                    num_tokens=len(tokens),
                    num_computed=request.num_computed,
                    sampling=self._shown(new.sampling),
                    priority=new.priority,
                    arrival_s=request.arrived_at,
                    deadline_at_s=new.deadline_at_s,
                    tokens=tokens if self._with_prompts and room >= 0 else None,
                )
            )
        self._readings.times[:] = readings

    def _shown(self, sampling: SamplingParams) -> SamplingParams:
        """Sampling parameters without text of the user's, unless prompts are recorded; the core needs none."""
        return sampling if self._with_prompts or not sampling.stop else msgspec.structs.replace(sampling, stop=())

    def _switch_off(self, error: OSError) -> None:
        log.warning("the flight recorder is off: %s: %s", self._paths[self._number % 2], error.strerror or error)
        self._close_file()

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
