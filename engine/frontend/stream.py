"""An accepted request: its samples, who reads them, and what is still to be computed.

Pure bookkeeping, no sockets: `Frontend` and `Outlets` move the messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import msgspec

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.accounting import add_run
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.prompt_log import PromptLog
from cierzo.engine.frontend.sample import Sample
from cierzo.engine.frontend.tenancy import Book
from cierzo.engine.frontend.tenants import Access, Tenant
from cierzo.engine.messages import (
    Cost,
    Final,
    Finish,
    FinishReason,
    Message,
    SampleEnd,
    SamplingParams,
    Submit,
    Timings,
    TokenLogprobs,
    Usage,
)
from cierzo.engine.text.prompt import CallLimit, PromptEncoder, Reader
from cierzo.engine.text.reader_state import ReaderState

_NOTHING = SamplingParams()


class Sink(Protocol):
    """Where a stream's messages go: one connection, with the features that it was granted."""

    features: frozenset[str]
    access: Access
    peer: str  # where it comes from, for people
    is_paused: bool  # the reader does not keep up: streams keep their output back

    @property
    def num_taken(self) -> int:
        """A count that moves when the peer takes bytes, and while the connection is full not otherwise."""
        ...

    def put(self, message: Message) -> None:
        """Send a message, after all others that were put; soon, with those of the same turn of the loop."""
        ...

    def put_frame(self, pieces: Iterator[Buffer]) -> None:
        """Send a frame in pieces, as the reader takes them, after all that was put; what is put from now on comes
        after it. The iterator is asked for another one when the last is sent."""
        ...

    @property
    def unsent_bytes(self) -> int:
        """Bytes that were put, and that the kernel has not taken yet."""
        ...

    def drop(self) -> None:
        """End the connection at once."""
        ...

    def __hash__(self) -> int: ...


@dataclass(slots=True, eq=False)
class Stream:
    """An accepted request. `submit` is None while its prompt is still being encoded; then its prompt is packed.

    `arrived`, `deadline_at_s` and `ended_at_s` (None: it runs) are times of the clock in seconds; `sent_s` (None:
    the core that runs now has not got it) and `first_token_s` count from arrival. `run_id`: the core's name of its
    present run. `cost`: of the runs that cores have reported; `owed`: runs whose cost a core has still to report.
    `num_dropped`: tokens that were generated, of an answer that has been dropped.
    `error`: what it ended with, if not as planned.

    name: the request id that `accepted` tells, "" without the feature "resume". key: its idempotency key.
    sink: the connection that reads it, under `stream_id`; None for an orphan. credit: what that reader may still be
    sent, in delta costs; None without the feature "credit". flows: its reader has all there is, and gets what comes
    at once. skips: what its reader has not got by now is not sent any more. pending_bytes: heap of what waits for
    the reader; beyond `pending_limit` it is paused, which means that the core does not know it. consumed: tokens of
    each sample that a reader who gives credit has for sure; it has `mark` too after so many `mark_bytes` of credit.

    prompt: log-probabilities of the prompt, if they are wanted.

    apart: text, thoughts and calls are told apart, for whoever reads it: the model marks them, and the connection
    that asked has the feature "parts". in_thinking: the prompt ends within a thought. calls: how many the answer
    may hold.

    book: of the tenant whose it is. peer: where it came from. caller_id, traceparent: as the request names itself.
    """

    request_id: int
    stream_id: int
    sink: Sink | None
    deltas: bool
    num_samples: int
    num_tokens: int
    arrived: float
    deadline_at_s: float
    name: str = ""
    key: str | None = None
    submit: Submit | None = None
    sampling: SamplingParams = _NOTHING
    num_prompt_tokens: int = 0
    run_id: int = -1
    aborted: FinishReason | None = None
    sent_s: float | None = None
    first_token_s: float | None = None
    cost: Cost = field(default_factory=Cost)
    owed: int = 0
    num_dropped: int = 0
    ended_at_s: float | None = None
    error: CierzoError | None = None
    samples: list[Sample] = field(default_factory=list)
    prompt: PromptLog | None = None
    running: int = 0
    credit: int | None = None
    flows: bool = False
    skips: bool = False
    paused: bool = False
    pending_bytes: int = 0
    pending_limit: int = 0
    consumed: list[int] = field(default_factory=list)
    mark: list[int] = field(default_factory=list)
    mark_bytes: int = 0
    apart: bool = False
    in_thinking: bool = False
    calls: CallLimit = "many"
    book: Book = field(default_factory=lambda: Book(Tenant()))
    peer: str = ""
    caller_id: str = ""
    traceparent: str = ""

    @property
    def tenant(self) -> Tenant:
        """The tenant whose it is, with the limits that are in force."""
        return self.book.tenant

    def start(
        self,
        submit: Submit,
        num_prompt_tokens: int,
        detokenizers: Sequence[Reader | None],
        states: Sequence[ReaderState] = (),
    ) -> None:
        """The prompt is ready. What a resumed request brought was delivered before: its text is not sent again;
        `states` as in `Sample`."""
        self.submit = submit
        self.sampling = submit.sampling
        self.num_prompt_tokens = num_prompt_tokens
        keeps, whole = bool(self.name), not self.deltas
        self.samples = [
            Sample(i, detokenizer, submit.output_token_ids, keeps=keeps, whole=whole, states=states)
            for i, detokenizer in enumerate(detokenizers)
        ]
        if submit.sampling.prompt_logprobs is not None:
            self.prompt = PromptLog(submit.sampling.prompt_logprobs, keeps=keeps)
        self.running = len(self.samples)

    @property
    def _logs(self) -> list[Sample | PromptLog]:
        """All that has a cursor."""
        return [*self.samples] if self.prompt is None else [*self.samples, self.prompt]

    @property
    def unsent(self) -> bool:
        """Whether the reader has not got all deltas that there are."""
        return self.deltas and not self.skips and (self.has_scores or any(s.unsent for s in self.samples))

    @property
    def has_scores(self) -> bool:
        """Whether the reader has not got all log-probabilities of the prompt that there are."""
        return self.prompt is not None and self.prompt.is_unsent

    @property
    def unsent_bytes(self) -> int:
        """Heap of what the reader has not got."""
        return sum([log.unsent_bytes for log in self._logs]) if self.deltas else 0

    @property
    def has_logprobs(self) -> bool:
        """Whether its deltas have log-probabilities of any kind."""
        return self.sampling.logprobs is not None or self.prompt is not None

    def begin_reading(self) -> None:
        """A reader comes, who has all before the cursors."""
        self.consumed = self.mark = [log.sent for log in self._logs]
        self.mark_bytes = 0

    def keep_for_reader(self, num_bytes: int) -> None:
        """Drop log-probabilities that the reader has for sure; where it gives no credit, all that it was sent but
        for the last ones, in so many bytes."""
        share = num_bytes // len(self._logs)
        for log, consumed in zip(self._logs, self.consumed, strict=True):
            log.keep_sent(share) if self.credit is None else log.keep_from(consumed)

    def consume(self, num_bytes: int, lacking: int) -> None:
        """The reader has consumed so much more; of what was sent, it lacks at most `lacking` bytes."""
        self.mark_bytes -= num_bytes
        if self.mark_bytes <= 0:
            self.consumed, self.mark, self.mark_bytes = self.mark, [log.sent for log in self._logs], lacking

    def end(self, sample: Sample, finish: Finish) -> bool:
        """Record the end of a sample; True if it was the last one."""
        self.spend(sample.index, finish)
        if sample.finish is None:
            sample.end(finish)
            self.running -= 1
        return self.running == 0

    def spend(self, index: int, finish: Finish) -> None:
        """Add what a core reported of a run of a sample to the cost. Its answer may have been dropped."""
        self.cost = add_run(self.cost, finish, self.samples[index].computed if self.samples else 0)

    def end_all(self, reason: FinishReason, now: float, message: str = "") -> None:
        """End what still runs without the core's word: it is not there to be asked."""
        self.samples = self.samples or [Sample(index, None) for index in range(self.num_samples)]
        self.running = sum(sample.finish is None for sample in self.samples)
        for sample in self.samples:
            self._end_here(sample, reason, now, message)

    def close(self, now: float, error: CierzoError | None = None) -> None:
        """Nothing is computed any more: only what its readers may ask for is kept."""
        self.ended_at_s = now
        self.error = error
        self.submit = None
        if self.sampling.logit_bias or self.sampling.allowed_token_ids:
            self.sampling = msgspec.structs.replace(self.sampling, logit_bias={}, allowed_token_ids=())

    @property
    def num_generated(self) -> int:
        """Tokens of the answer, without those that the request brought."""
        return self.num_dropped + sum([len(sample.token_ids) - sample.num_brought for sample in self.samples])

    def drop_answer(self) -> None:
        """Let go of it all; what it ends with is an error."""
        self.num_dropped = self.num_generated
        self.samples, self.prompt = [], None

    @property
    def num_bytes(self) -> int:
        """Heap of the answer."""
        return sum([log.num_bytes for log in self._logs])

    def forget(self, share: float, *, sent_only: bool) -> None:
        """Drop the oldest log-probabilities, a share of those that are kept; `sent_only`: before the cursors."""
        if self.deltas:
            for log in self._logs:
                log.forget_logprobs(share, sent_only=sent_only)

    def end_cut(self, now: float) -> bool:
        """End the samples whose stop string was found, as if the core had answered; True if none is left."""
        for sample in self.samples:
            if sample.cut:
                self._end_here(sample, "stop", now, "")
        return self.running == 0

    def _end_here(self, sample: Sample, reason: FinishReason, now: float, message: str) -> None:
        output_tokens, waited_s = len(sample.token_ids), now - self.arrived
        self.end(
            sample, Finish(reason, message, None, self.num_prompt_tokens, output_tokens, 0, 0, waited_s, 0.0, 0.0)
        )

    def submits(self, run_id: int) -> list[Submit]:
        """Build the messages that make a core compute the rest: one `Submit` for all samples, or, once tokens have
        come, one for each sample that still runs.

        The same tokens follow, as the seed is kept and random numbers belong to (seed, sample, position).
        """
        assert self.submit is not None
        submit = msgspec.structs.replace(
            self.submit,
            request_id=run_id,
            arrival_s=self.arrived,
            deadline_at_s=self.deadline_at_s,
            num_scored=0 if self.prompt is None else self.prompt.end,
        )
        if self.first_token_s is None and self.running == len(self.samples):
            return [submit]
        for sample in self.samples:
            if len(sample.token_ids) > len(submit.output_token_ids):
                sample.computed = self.num_prompt_tokens + len(sample.token_ids) - 1
        return [
            msgspec.structs.replace(
                submit,
                sampling=_of_one(submit.sampling, sample.index),
                output_token_ids=sample.token_ids.tolist(),
                first_sample=sample.index,
            )
            for sample in self.samples
            if sample.finish is None
        ]

    def last(self, new_reader: NewReader) -> Message:
        """The last message, once it has ended."""
        if self.error is not None:
            return failure(self.stream_id, self.error)
        if self.deltas:
            return self.final([end for _, end in self.ends()])
        scores = [] if self.prompt is None else cast(list[TokenLogprobs], self.prompt.packed(0, self.prompt.end))
        samples = []
        for sample, end in self.ends():
            token_ids, logprobs = sample.token_ids.tolist(), sample.all_logprobs()
            text, parts = sample.read_whole(new_reader(self, sample.index))
            samples.append(
                msgspec.structs.replace(end, token_ids=token_ids, text=text, logprobs=logprobs, parts=parts)
            )
        return msgspec.structs.replace(self.final(samples), prompt_logprobs=scores)

    def final(self, samples: list[SampleEnd]) -> Final:
        """The final record, with these records of its samples."""
        return Final(
            stream=self.stream_id,
            samples=samples,
            usage=Usage(
                prompt_tokens=self.num_prompt_tokens,
                output_tokens=sum([len(sample.token_ids) for sample in self.samples]),
                cached_tokens=self.num_cached,
            ),
            timings=self.timings(),
            seed=self.sampling.seed or 0,
            cost=self.cost if self.sink is not None and "accounting" in self.sink.features else None,
        )

    def ends(self) -> list[tuple[Sample, SampleEnd]]:
        """Each sample, and how it ended."""
        ends, tells_grammars = [], self.sink is not None and "grammars" in self.sink.features
        for sample in self.samples:
            if (finish := sample.finish) is None:
                continue
            reason, broken_calls = sample.outcome(finish)
            end = SampleEnd(
                sample=sample.index,
                finish_reason=reason,
                output_tokens=len(sample.token_ids),
                stop=sample.stop,
                message=finish.message,
                preemptions=finish.preemptions,
                broken_calls=broken_calls,
                incomplete=finish.incomplete and tells_grammars,
            )
            ends.append((sample, end))
        return ends

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that came from the prefix cache, for all samples, as far as a core has said so. Of a
        scored prompt none: what is found behind a pause was computed for it."""
        if self.prompt is not None:
            return 0
        cached = [sample.finish.cached_tokens for sample in self.samples if sample.finish is not None]
        return min(min(cached), self.num_prompt_tokens) if cached else 0

    def timings(self) -> Timings:
        """Durations of one that has ended: by the front end's clock, but for the wait until the first step, which
        only the core knows.

        If a core has died since the first token, nobody knows that wait any more: it counts as prefill.
        """
        assert self.ended_at_s is not None
        total_s = self.ended_at_s - self.arrived
        started_s, has_run = total_s, False
        for sample in self.samples:
            if (finish := sample.finish) is not None:
                started_s = min(started_s, finish.queue_s)
                has_run = has_run or finish.prefill_s > 0
        if not has_run:
            started_s = total_s
        first_token_s = total_s if self.first_token_s is None else self.first_token_s
        queue_s = started_s if started_s <= first_token_s else 0.0
        return Timings(
            queue_s=queue_s,
            prefill_s=first_token_s - queue_s,
            decode_s=total_s - first_token_s,
            total_s=total_s,
        )


def _of_one(params: SamplingParams, sample: int) -> SamplingParams:
    """The parameters for a sample alone; the first one's run scores the prompt for all."""
    scored = params.prompt_logprobs if sample == 0 else None
    return msgspec.structs.replace(params, n=1, prompt_logprobs=scored)


NewReader = Callable[[Stream, int], Reader | None]  # of a stream's sample: one that has seen nothing of it yet


def reader_of(prompts: PromptEncoder) -> NewReader:
    """Give what makes readers for the streams of this model."""

    def new_reader(stream: Stream, sample: int) -> Reader | None:
        return prompts.reader(
            stream.sampling,
            apart=stream.apart,
            in_thinking=stream.in_thinking,
            calls=stream.calls,
            sample=sample,
            num_prompt_tokens=stream.num_prompt_tokens,
        )

    return new_reader
