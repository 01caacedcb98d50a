"""The flight recorder: writes down what the core is told and what it computes, for whoever asks why it died.

Two segment files, written in turns, hold the last of it. They are written through a mapping of memory, for a
tenth of the time of a write(2): what is in it survives the end of the process, kill -9 included, though not that of
the machine. Their space is allocated beforehand, so that a full disk is told then, and not by a signal.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import secrets
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from cierzo.cache.hashing import TOKEN_BYTES, pack_tokens
from cierzo.cache.images import ImageSpan, marks
from cierzo.engine.config import EngineConfig
from cierzo.engine.flight import (
    DIGEST_BYTES,
    SIZE_BYTES,
    STEP_TAG,
    Aborted,
    Ended,
    Failed,
    Header,
    Known,
    Open,
    Record,
    Released,
    Submitted,
    Tokens,
    packed,
    segment_paths,
)
from cierzo.engine.messages import Abort, CoreCommand, SamplingParams, Submit, TokenDelta, Vocabulary
from cierzo.engine.server_process import private
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.grammars import Constraint
from cierzo.engine.worker.images import image_of
from cierzo.scheduler.images import Image
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


class PieceDigests:
    """Digests of the pieces of sequences, as of flight.Open: equal ones for equal pieces, by a key that nobody else
    knows and that goes with the process."""

    def __init__(self, block_tokens: int) -> None:
        self._keyed = blake2b(key=secrets.token_bytes(32), digest_size=DIGEST_BYTES)
        self._block_bytes = block_tokens * TOKEN_BYTES

    def of(self, prompt: Sequence[int], output: Sequence[int], images: Sequence[ImageSpan] = ()) -> bytes:
        """Digests of prompt and output, cut at multiples of a block and where the output begins. images: of the
        prompt, without which tokens that stand for them are all equal."""
        packed, size = pack_tokens(prompt), self._block_bytes
        end = len(packed)
        cuts = [*range(0, end, size), end]
        if output:
            packed += pack_tokens(output)
            cuts += [*range((end // size + 1) * size, len(packed), size), len(packed)]
        found, copy = [], self._keyed.copy
        for start, stop in itertools.pairwise(cuts):
            state = copy()
            state.update(packed[start:stop])
            if images:
                state.update(marks(images, start // TOKEN_BYTES, stop // TOKEN_BYTES))
            found.append(state.digest())
        return b"".join(found)

    def of_bounds(self, words: Sequence[Sequence[int]], grammar: str) -> bytes:
        """Digest of a grammar and a list of words, each of some tokens."""
        state = self._keyed.copy()
        state.update(grammar.encode())
        for word in words:
            state.update(pack_tokens([len(word), *word]))
        return state.digest()

    def of_salt(self, salt: bytes) -> bytes:
        """Digest of a salt of the prefix cache, or of an image's digest."""
        state = self._keyed.copy()
        state.update(salt)
        return state.digest()


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
        self._pieces = PieceDigests(config.cache.block_tokens)
        self._config = msgspec.msgpack.encode(config)
        self._paths = segment_paths(config.flight_folder, os.getpid())
        self._memory: mmap.mmap | None = None
        self._counter = memoryview(b"")  # of bytes written; a word of the memory
        self._number = -1
        self._size = 0
        self._num_seqs = 0
        self._num_finished = core.num_finished
        self._vocabulary: Vocabulary | None = None
        self._has_vocabulary = False  # whether this segment has it
        core.released = self.released
        try:
            os.makedirs(config.flight_folder, mode=0o700, exist_ok=True)
        except OSError as error:
            self._switch_off(error.strerror or str(error))
            return
        self._begin_segment()

    @property
    def is_on(self) -> bool:
        """Whether anything is written."""
        return self._memory is not None

    def command(self, command: CoreCommand) -> None:
        """Write down a command."""
        match command:
            case Vocabulary() if self._with_prompts:
                self._vocabulary = command
                return
            case Submit():
                self._write_vocabulary(command.grammar)
                prompt, output = command.prompt_token_ids, command.output_token_ids
                images = [image_of(image) for image in command.images]
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
                    pieces=b"" if self._with_prompts or not self.is_on else self._pieces.of(prompt, output, images),
                    thinking=command.thinking,
                    banned=command.banned_token_ids if self._with_prompts else [],
                    banned_digest=self._bounds_digest(command.banned_token_ids, command.grammar),
                    tenant=command.tenant,
                    weight=command.weight,
                    salt=self._shown_salt(command.cache_salt),
                    num_scored=command.num_scored,
                    grammar=command.grammar if self._with_prompts else "",
                    is_held=bool(command.grammar),
                    images=self._shown_images(images),
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

    def released(self, request_id: int) -> None:
        """Write down that a request's grammar is made."""
        self._num_seqs = -1
        self._write(Released(readings=self._readings.times, request_id=request_id))

    def step(self, plan: StepPlan) -> None:
        """Write down a step that is about to be launched."""
        seqs = plan.seqs
        rows = None
        if plan.num_tokens != len(seqs) or len(seqs) != self._num_seqs:
            rows = [(*seq.key, seq.start, len(seq.token_ids)) for seq in seqs]
            self._num_seqs = len(seqs) if plan.num_tokens == len(seqs) else -1
        # a Step, without the microsecond of making one
        self._write((STEP_TAG, plan.step, len(seqs), plan.num_tokens, rows, self._readings.times))

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

        if self.is_on and self._size > self._segment_bytes * 7 // 8:  # what a turn writes fits into the rest
            self._begin_segment()

    def failed(self, message: str) -> None:
        """Write down why the core cannot go on."""
        self._write(Failed(readings=self._readings.times, message=message))

    def close(self) -> None:
        """Stop, and remove what was written: the core ends in order."""
        self._close_file()
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _write(self, record: Record | tuple[Any, ...]) -> None:
        """Append a record, which holds the readings made until now; where one is too long, to a new segment."""
        data = packed(record)
        self._readings.times.clear()
        if not self._append(data):
            self._begin_segment()
            if not self._append(data):
                self._switch_off(f"a record of {len(data)} bytes is larger than a segment")

    def _append(self, data: bytes) -> bool:
        """Write a record if there is room for it; its bytes count once they are there. Off, it takes everything."""
        memory, end = self._memory, self._size + len(data)
        if memory is None:
            return True
        if end > self._segment_bytes:
            return False
        memory[self._size : end] = data
        self._size = end
        self._counter[0] = end - SIZE_BYTES
        return True

    def _begin_segment(self) -> None:
        """Go on in the older one of the two files, from its start."""
        self._close_file()
        self._number += 1
        self._size, self._num_seqs, self._has_vocabulary = SIZE_BYTES, -1, False
        path = self._paths[self._number % 2]
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            with open(path, "x+b", opener=private) as file:
                os.posix_fallocate(file.fileno(), 0, self._segment_bytes)
                self._memory = mmap.mmap(file.fileno(), self._segment_bytes)
        except OSError as error:
            self._switch_off(error.strerror or str(error))
            with contextlib.suppress(OSError):
                os.unlink(path)  # what there was room for
            return
        self._counter = memoryview(self._memory)[:SIZE_BYTES].cast("Q")
        self._append_head()

    def _append_head(self) -> None:
        """Write down the configuration, and what is in flight."""
        header = Header(number=self._number, config=self._config, with_prompts=self._with_prompts)
        self._append(packed(header))
        room = self._segment_bytes // 2  # for the tokens of those in flight
        for request in self._core.requests():
            if self._size > self._segment_bytes * 3 // 4:
                break  # thousands with a long logit_bias each: the rest is not written
            constraint: Constraint | None = request.new.constraint
            grammar = "" if constraint is None or not self._with_prompts else constraint.grammar
            self._write_vocabulary(grammar)
            new, tokens, num_prompt = request.new, request.tokens, request.num_prompt_tokens
            room -= 5 * len(tokens)  # bytes of a token, at most; digests have less, but take time
            has_room = room >= 0
            record = Open(
                request_id=request.key[0],
                sample=request.key[1],
                num_prompt=num_prompt,
                num_tokens=len(tokens),
                num_computed=request.num_computed,
                sampling=self._shown(new.sampling),
                priority=new.priority,
                arrival_s=request.arrived_at,
                deadline_at_s=new.deadline_at_s,
                tokens=tokens if self._with_prompts and has_room else None,
                pieces=self._pieces.of(tokens[:num_prompt], tokens[num_prompt:], new.images)
                if has_room and not self._with_prompts
                else b"",
                thinking=new.thinking,
                banned=[[*word] for word in new.banned] if self._with_prompts else [],
                banned_digest=self._bounds_digest(new.banned, "" if constraint is None else constraint.grammar),
                tenant=new.tenant,
                weight=request.tenant.weight,
                salt=self._shown_salt(new.salt),
                num_scored=request.num_scored,
                grammar=grammar,
                is_held=request.is_held,
                images=self._shown_images(new.images),
            )
            self._append(packed(record))

    def _write_vocabulary(self, grammar: str) -> None:
        """Write down what a grammar is about, once in each segment that has one, if there is room for it."""
        if grammar and self._vocabulary is not None and not self._has_vocabulary:
            self._has_vocabulary = self._append(packed(Known(vocabulary=self._vocabulary)))

    def _bounds_digest(self, banned: Sequence[Sequence[int]], grammar: str) -> bytes:
        """Tell banned words and grammars apart where they are not recorded."""
        if self._with_prompts or not (banned or grammar) or not self.is_on:
            return b""
        return self._pieces.of_bounds(banned, grammar)

    def _shown_salt(self, salt: bytes) -> bytes:
        """Tell salts apart; whoever knows one could probe the cache for prompts."""
        return salt if self._with_prompts or not salt else self._pieces.of_salt(salt)

    def _shown_images(self, images: Sequence[Image]) -> list[tuple[int, int, int, bytes]]:
        """Tell images apart; their own digests would tell which known image one is."""
        return [(image.offset, image.rows, image.columns, self._pieces.of_salt(image.digest)) for image in images]

    def _shown(self, sampling: SamplingParams) -> SamplingParams:
        """Sampling parameters without text of the user's, unless prompts are recorded; the core needs none."""
        if self._with_prompts or not (sampling.stop or sampling.bad_words):
            return sampling
        return msgspec.structs.replace(sampling, stop=(), bad_words=())

    def _switch_off(self, why: str) -> None:
        log.warning("the flight recorder is off: %s: %s", self._paths[self._number % 2], why)
        self._close_file()

    def _close_file(self) -> None:
        if self._memory is not None:
            self._counter.release()
            self._memory.close()
            self._memory = None
