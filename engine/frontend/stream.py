"""An accepted request: its samples, what was delivered of them, and what is still to be computed.

Pure bookkeeping, no sockets: `Frontend` moves the messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from cierzo.engine.frontend.detok import Detokenizer
from cierzo.engine.messages import (
    Delta,
    Final,
    Finish,
    FinishReason,
    Message,
    SampleEnd,
    Submit,
    Timings,
    TokenDelta,
    TokenLogprobs,
    Usage,
)


class Sink(Protocol):
    """Where a stream's messages go: one connection, with the features that it was granted."""

    features: frozenset[str]

    def put(self, message: Message) -> None:
        """Add a message to what the next `flush` sends."""
        ...

    def flush(self) -> None:
        """Send what was put, in order."""
        ...


@dataclass(slots=True, eq=False)
class Sample:
    """A sample: one of the request's n answers. `token_ids` includes the tokens of a resumed request."""

    index: int
    detokenizer: Detokenizer | None
    token_ids: list[int]
    stop: str | int | None = None
    finish: Finish | None = None
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def cut(self) -> bool:
        """A stop string was found: whatever the core still sends is overrun."""
        return isinstance(self.stop, str)

    def take(self, delta: TokenDelta) -> tuple[list[int], str, list[TokenLogprobs] | None]:
        """The tokens of `delta` that belong to the answer, the text that is now certain, and their logprobs."""
        token_ids, logprobs, text = delta.token_ids, delta.logprobs, ""
        detokenizer = self.detokenizer
        if detokenizer is not None:
            text = detokenizer.push(token_ids)
            if detokenizer.stop is None and delta.finish is not None:
                text += detokenizer.flush()
            if detokenizer.stop is not None:
                self.stop = detokenizer.stop
                token_ids = token_ids[: detokenizer.num_tokens - len(self.token_ids)]
                logprobs = None if logprobs is None else logprobs[: len(token_ids)]
        self.token_ids += token_ids
        return token_ids, text, logprobs

    def end(self, finish: Finish) -> None:
        """The sample is over; a stop string found before keeps its say about why."""
        self.finish = finish
        if self.stop is None:
            self.stop = finish.stop_token_id

    def reason(self, finish: Finish) -> FinishReason:
        """Why it ended, as the client sees it."""
        return "stop" if self.cut else finish.reason


@dataclass(slots=True, eq=False)
class Stream:
    """An accepted request. `submit` is None while its prompt is still being encoded; then its prompt is packed.

    `arrived` and `deadline_at_s` are times of the clock in seconds; `sent_s` (None: the core that runs now has not
    got it) and `first_token_s` count from arrival. `run_id`: the core's name of its present run. `deaths`: how many
    cores have died that had it.
    """

    request_id: int
    stream_id: int
    sink: Sink | None
    deltas: bool
    num_samples: int
    num_tokens: int
    arrived: float
    deadline_at_s: float
    submit: Submit | None = None
    num_prompt_tokens: int = 0
    run_id: int = -1
    aborted: FinishReason | None = None
    sent_s: float | None = None
    first_token_s: float | None = None
    deaths: int = 0
    samples: list[Sample] = field(default_factory=list)
    running: int = 0

    def start(self, submit: Submit, num_prompt_tokens: int, detokenizers: Sequence[Detokenizer | None]) -> None:
        """The prompt is ready. What a resumed request brought was delivered before: its text is not sent again."""
        self.submit = submit
        self.num_prompt_tokens = num_prompt_tokens
        self.samples = [Sample(i, detok, list(submit.output_token_ids)) for i, detok in enumerate(detokenizers)]
        self.running = len(self.samples)

    def take(self, sample: Sample, delta: TokenDelta) -> Delta | None:
        """Advance `sample`; the message that the client gets for it, None if there is nothing to say."""
        if sample.cut:
            return None
        token_ids, text, logprobs = sample.take(delta)
        if self.deltas:
            if not token_ids and not text:
                return None
            return Delta(
                stream=self.stream_id, sample=delta.sample, token_ids=token_ids, text=text, logprobs=logprobs
            )
        sample.texts.append(text)
        if logprobs is not None:
            sample.logprobs += logprobs
        return None

    def end(self, sample: Sample, finish: Finish) -> bool:
        """Record the end of a sample; True if it was the last one."""
        if sample.finish is None:
            sample.end(finish)
            self.running -= 1
        return self.running == 0

    def end_all(self, reason: FinishReason, now: float, message: str = "") -> None:
        """End what still runs without the core's word: it is not there to be asked."""
        self.samples = self.samples or [Sample(index, None, []) for index in range(self.num_samples)]
        self.running = sum(sample.finish is None for sample in self.samples)
        for sample in self.samples:
            self._end_here(sample, reason, now, message)

    def end_cut(self, now: float) -> bool:
        """End the samples whose stop string was found, as if the core had answered; True if none is left."""
        for sample in self.samples:
            if sample.cut:
                self._end_here(sample, "stop", now, "")
        return self.running == 0

    def _end_here(self, sample: Sample, reason: FinishReason, now: float, message: str) -> None:
        prompt_tokens = self.num_prompt_tokens
        output_tokens, waited_s = len(sample.token_ids), now - self.arrived
        self.end(sample, Finish(reason, message, None, prompt_tokens, output_tokens, 0, 0, waited_s, 0.0, 0.0))

    def submits(self, run_id: int) -> list[Submit]:
        """Build the messages that make a core compute the rest: one `Submit` for all samples, or, once tokens have
        come, one for each sample that still runs.

        The same tokens follow, as the seed is kept and random numbers belong to (seed, sample, position).
        """
        assert self.submit is not None
        submit = msgspec.structs.replace(
            self.submit, request_id=run_id, arrival_s=self.arrived, deadline_at_s=self.deadline_at_s
        )
        if self.first_token_s is None and self.running == len(self.samples):
            return [submit]
        return [
            msgspec.structs.replace(
                submit,
                sampling=msgspec.structs.replace(submit.sampling, n=1),
                output_token_ids=sample.token_ids,
                first_sample=sample.index,
            )
            for sample in self.samples
            if sample.finish is None
        ]

    def final(self, now: float) -> Final:
        """The last message, once no sample runs."""
        ends = [(sample, sample.finish) for sample in self.samples if sample.finish is not None]
        finishes = [finish for _, finish in ends]
        prompt_tokens = self.num_prompt_tokens
        return Final(
            stream=self.stream_id,
            samples=[self._sample_end(sample, finish) for sample, finish in ends],
            usage=Usage(
                prompt_tokens=prompt_tokens,
                output_tokens=sum(len(sample.token_ids) for sample in self.samples),
                cached_tokens=min(min((f.cached_tokens for f in finishes), default=0), prompt_tokens),
            ),
            timings=self._timings(finishes, now - self.arrived),
            seed=0 if self.submit is None else self.submit.sampling.seed or 0,
        )

    def _timings(self, finishes: list[Finish], total_s: float) -> Timings:
        """By the front end's clock, but for the wait until the first step, which only the core knows.

        If a core has died since the first token, nobody knows that wait any more: it counts as prefill.
        """
        started_s = min(finish.queue_s for finish in finishes)
        first_token_s = total_s if self.first_token_s is None else self.first_token_s
        if not any(finish.prefill_s for finish in finishes):
            started_s = total_s  # it never ran
        queue_s = started_s if started_s <= first_token_s else 0.0
        return Timings(
            queue_s=queue_s,
            prefill_s=first_token_s - queue_s,
            decode_s=total_s - first_token_s,
            total_s=total_s,
        )

    def _sample_end(self, sample: Sample, finish: Finish) -> SampleEnd:
        whole = not self.deltas
        return SampleEnd(
            sample=sample.index,
            finish_reason=sample.reason(finish),
            output_tokens=len(sample.token_ids),
            stop=sample.stop,
            message=finish.message,
            preemptions=finish.preemptions,
            token_ids=sample.token_ids if whole else [],
            text="".join(sample.texts) if whole else "",
            logprobs=sample.logprobs if whole and sample.logprobs else None,
        )
