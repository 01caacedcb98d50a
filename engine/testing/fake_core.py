"""A core without a model: its requests' tokens are known beforehand, and it makes one of each in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from cierzo.engine.messages import (
    Abort,
    CoreStats,
    Finish,
    FinishReason,
    StepOutput,
    Submit,
    TokenDelta,
    TokenLogprobs,
)
from cierzo.engine.testing.words import EOS

Answer = Callable[[Submit, int], list[int]]  # (request, sample) -> all its output tokens
Key = tuple[int, int]  # request, sample


def plain_answer(submit: Submit, sample: int) -> list[int]:
    """`max_tokens` tokens that depend on prompt, seed, sample and position."""
    start = sum(submit.prompt_token_ids) + (submit.sampling.seed or 0) + 17 * sample
    return [(start + 7 * position) % 256 for position in range(submit.sampling.max_tokens)]


def made_up_entry(place: int, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of the prompt's token behind `place`, and of others."""
    top = [(token + rank) % 256 for rank in range(count)]
    return TokenLogprobs(token, -float(place), top, [-float(place + rank) for rank in range(count)])


@dataclass
class Sequence:
    """A sample of a request while it runs. `due_s`: when its next token comes, where tokens have times. `scored`:
    log-probabilities of the prompt that were told."""

    submit: Submit
    answer: list[int]
    done: int
    scored: int
    due_s: float = 0.0


class FakeCore:
    """Takes commands, and makes steps when it is told to; masks and all that shapes chances are ignored."""

    def __init__(self, answer: Answer) -> None:
        self.submits: list[Submit] = []
        self.aborts: list[Abort] = []
        self.running: dict[Key, Sequence] = {}
        self.scored_at_once = 1024  # tokens of a prompt, in a step
        self._answer = answer

    def take(self, submit: Submit) -> list[Sequence]:
        """Run a request, from where it is; the samples that have begun."""
        prompt = submit.prompt_token_ids
        if isinstance(prompt, msgspec.Raw):
            submit = msgspec.structs.replace(submit, prompt_token_ids=msgspec.msgpack.decode(prompt))
        self.submits.append(submit)
        begun = []
        for sample in range(submit.first_sample, submit.first_sample + submit.sampling.n):
            key = (submit.request_id, sample)
            assert key not in self.running
            answer = self._answer(submit, sample)
            assert answer[: len(submit.output_token_ids)] == submit.output_token_ids
            is_scored = submit.sampling.prompt_logprobs is not None and sample == submit.first_sample
            scored = submit.num_scored if is_scored else len(submit.prompt_token_ids)
            begun.append(Sequence(submit, answer, len(submit.output_token_ids), scored))
            self.running[key] = begun[-1]
        return begun

    def drop(self, abort: Abort) -> StepOutput:
        """End a request, or a sample of it; what is said of that."""
        self.aborts.append(abort)
        keys = [k for k in self.running if k[0] == abort.request_id and abort.sample in (None, k[1])]
        return StepOutput(deltas=[self.end(key, abort.reason) for key in keys])

    def make(self, keys: Iterable[Key] | None = None) -> StepOutput:
        """Make one token for each of these sequences, or for every running one; what is scored of prompts first."""
        deltas = [self._next(key) for key in list(self.running if keys is None else keys)]
        return StepOutput(deltas=deltas, stats=CoreStats(running=len(self.running), total_blocks=9))

    def _next(self, key: Key) -> TokenDelta:
        sequence = self.running[key]
        if entries := self._score(sequence):
            return TokenDelta(*key, [], None, None, entries)
        token = sequence.answer[sequence.done]
        sequence.done += 1
        sampling = sequence.submit.sampling
        stops = (*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS]))
        if token in stops and sequence.done >= sampling.min_tokens:
            return self.end(key, "stop", (token,))
        if sequence.done == len(sequence.answer):
            return self.end(key, "length", (token,))
        return TokenDelta(*key, [token], self.logprobs(sequence, (token,)), None)

    def _score(self, sequence: Sequence) -> list[msgspec.Raw]:
        """The next log-probabilities of a prompt, as many as come in a step; made up of place and token."""
        start, count = sequence.scored, sequence.submit.sampling.prompt_logprobs or 0
        sequence.scored += self.scored_at_once
        scored = sequence.submit.prompt_token_ids[start + 1 : sequence.scored + 1]
        entries = (made_up_entry(place, token, count) for place, token in enumerate(scored, start))
        return [msgspec.Raw(msgspec.msgpack.encode(entry)) for entry in entries]

    def end(self, key: Key, reason: FinishReason, token_ids: tuple[int, ...] = ()) -> TokenDelta:
        """End a sample with its last tokens; what is said of that."""
        sequence = self.running.pop(key)
        stop = token_ids[-1] if reason == "stop" and token_ids else None
        num_prompt_tokens = len(sequence.submit.prompt_token_ids)
        finish = Finish(reason, "", stop, num_prompt_tokens, sequence.done, 3, 1, 0.1, 0.2, 0.3)
        return TokenDelta(*key, list(token_ids), self.logprobs(sequence, token_ids), finish)

    def logprobs(self, sequence: Sequence, token_ids: tuple[int, ...]) -> list[TokenLogprobs] | None:
        """Make up log-probabilities, where the request wants any."""
        if sequence.submit.sampling.logprobs is None:
            return None
        return [TokenLogprobs(token, -1.0, [token, 0], [-1.0, -2.0]) for token in token_ids]
