"""The history checker: what must hold of the clients' logs, whatever a seed did."""

from __future__ import annotations

from typing import Any

from cierzo.engine.frontend.config import FrontendConfig

from .history import Attempt, Body, History, Request
from .link import POISON, SimulatedLink
from .network import MOST_DELAY_S
from .peer import thoughts_of
from .reference import Answer, References

CANCEL_S = 0.1  # within which a cancel is answered
STEP_S = 0.02  # longest step
ROUND_TRIP_S = 2 * MOST_DELAY_S + 0.002
REFUSALS = {"overloaded", "draining", "deadline_unreachable", "core_stalled", "core_failed"}
BY_ITSELF = ("stop", "length")


class Checker:
    """Collects violations."""

    def __init__(
        self,
        history: History,
        link: SimulatedLink,
        config: FrontendConfig,
        references: References,
        thinks: bool = False,
    ) -> None:
        self._history = history
        self._link = link
        self._config = config
        self._references = references
        self._thinks = thinks
        self.wrongs = list(history.wrongs)

    def check(self) -> list[str]:
        """Look at everything; what is wrong."""
        for request in self._history.requests:
            for before, attempt in zip([None, *request.attempts], request.attempts, strict=False):
                self._outcome(attempt)
                self._times(attempt)
                if attempt.end is None or attempt.end["type"] != "error":
                    self._answer(attempt)
                else:
                    self._error(before, attempt)
            self._once(request)
        for question in self._history.questions:
            if question.answer is None and not question.lost:
                self._wrong(f"{question.kind} on stream {question.stream} was never answered")
        return self.wrongs

    def _wrong(self, what: str) -> None:
        self.wrongs.append(what)

    def _outcome(self, attempt: Attempt) -> None:
        name = _name(attempt)
        if attempt.is_open:
            self._wrong(f"{name} never ended")
        if attempt.end is not None and attempt.end["type"] == "final" and "resume" in attempt.features:
            if attempt.accepted is None:
                reasons = {sample["finish_reason"] for sample in attempt.end["samples"]}
                if reasons - {"cancelled", "deadline"}:  # which may come while the prompt is encoded
                    self._wrong(f"{name}: a final without accepted")
            elif attempt.accepted["seed"] != attempt.end["seed"]:
                self._wrong(f"{name}: two seeds: {attempt.accepted}, {attempt.end}")

    def _answer(self, attempt: Attempt) -> None:
        """Tokens, text and log-probabilities are those of the reference, as far as they go."""
        is_apart = self._thinks and attempt.request.is_apart
        answers, final = self._references.of(attempt.request, is_apart), attempt.end
        name = _name(attempt)
        if final is not None and attempt.request.body.get("deltas", True) is False:
            if any(attempt.tokens):
                self._wrong(f"{name}: deltas nobody wanted")
            for sample in final["samples"]:
                attempt.tokens[sample["sample"]] = list(sample.get("token_ids", []))
                attempt.texts[sample["sample"]] = sample.get("text", "")
                attempt.thoughts[sample["sample"]] = thoughts_of(sample)
                attempt.logprobs[sample["sample"]] = list(sample.get("logprobs") or [])
        for index, right in enumerate(answers):
            tokens, text, logprobs = attempt.tokens[index], attempt.texts[index], attempt.logprobs[index]
            if tokens != right.tokens[: len(tokens)]:
                self._wrong(f"{name}: sample {index} has {tokens}, right is {right.tokens}")
            if not right.text.startswith(text) and not self._is_cut_character(attempt, index, right):
                self._wrong(f"{name}: sample {index} reads {text!r}, right is {right.text!r}")
            thoughts = attempt.thoughts[index]
            if not right.thoughts.startswith(thoughts.removesuffix("\ufffd")):
                self._wrong(f"{name}: sample {index} thinks {thoughts!r}, right is {right.thoughts!r}")
            plain = [[one.token_id, one.logprob, one.top_token_ids, one.top_logprobs] for one in right.logprobs]
            if "logprobs" in attempt.request.body["sampling"] and logprobs != plain[: len(tokens)]:
                self._wrong(f"{name}: log-probabilities of sample {index}: {logprobs} for {tokens}")
        if final is not None:
            self._final(attempt, final, answers)

    def _final(self, attempt: Attempt, final: Body, answers: list[Answer]) -> None:
        name, samples = _name(attempt), final["samples"]
        if [sample["sample"] for sample in samples] != list(range(len(answers))):
            self._wrong(f"{name}: samples {samples}")
            return
        for sample, right in zip(samples, answers, strict=True):
            index, reason = sample["sample"], sample["finish_reason"]
            count = len(attempt.tokens[index])
            if attempt.request.cancelled_s and count < sample["output_tokens"] <= len(right.tokens):
                continue  # what waited for a reader that was slow is dropped with a cancel, though it counts
            if sample["output_tokens"] != count:
                self._wrong(f"{name}: {sample} after {count} tokens")
            if reason in BY_ITSELF:
                if attempt.request.body["token_ids"][0] == POISON:
                    self._wrong(f"{name}: poison ended by {reason}")
                said = (attempt.texts[index], attempt.thoughts[index])
                got = (attempt.tokens[index], *said, reason, sample.get("stop"))
                if got != (right.tokens, right.text, right.thoughts, right.reason, right.stop):
                    self._wrong(f"{name}: {got}, right is {right}")
            else:
                self._early(attempt, reason, sample)
        if attempt.request.cancelled_s:
            return
        usage = final["usage"]
        expected = (len(attempt.request.body["token_ids"]), sum(map(len, attempt.tokens)))
        if (usage["prompt_tokens"], usage["output_tokens"]) != expected and usage["prompt_tokens"]:
            self._wrong(f"{name}: {usage}, counted {expected}")

    def _early(self, attempt: Attempt, reason: str, sample: Body) -> None:
        name, request = _name(attempt), attempt.request
        if reason == "cancelled":
            asked = any(at <= attempt.end_s for at in request.cancelled_s)
            if not asked and not any(self._let_go(earlier, attempt) for earlier in request.attempts):
                self._wrong(f"{name}: cancelled by nobody")
        elif reason == "deadline":
            deadline_s = request.body.get("deadline_s", self._config.default_deadline_s)
            if attempt.end_s - request.attempts[0].sent_s < deadline_s - 1e-6:
                self._wrong(f"{name}: deadline after {attempt.end_s - request.attempts[0].sent_s} s")
        elif reason == "failed":
            begin_s = request.attempts[0].sent_s
            if sum(begin_s <= at <= attempt.end_s for at in self._link.deaths) < 2:
                self._wrong(f"{name}: failed, though fewer than two cores died: {sample}")
        else:
            self._wrong(f"{name}: {sample}")

    def _error(self, before: Attempt | None, attempt: Attempt) -> None:
        """An error has a reason that the seed gave."""
        assert attempt.end is not None
        name, code = _name(attempt), attempt.end["code"]
        leapt_s = self._history.leapt_s(attempt.sent_s, attempt.end_s)
        fits = {
            "overloaded": attempt.accepted is None,
            "draining": attempt.accepted is None and any(at <= attempt.end_s for at in self._history.drains),
            "deadline_unreachable": attempt.accepted is None,
            "core_stalled": attempt.accepted is None and bool(self._link.stalls),
            "core_failed": self._link.has_failed,
            "slow_reader": attempt.disturbed or leapt_s > 0 or self._joins_slow_reader(attempt),
            "taken_over": len(attempt.request.attempts) > 1,
            "not_found": (attempt.kind == "resume" and self._may_be_forgotten(before, attempt))
            or (before is not None and attempt.kind == "generate" and self._may_lack_logprobs(attempt)),
            "invalid_request": self._lacks_some(attempt) and self._may_lack_logprobs(attempt),
        }
        if not fits.get(code, False):
            self._wrong(f"{name}: {attempt.end}")

    def _let_go(self, earlier: Attempt, attempt: Attempt) -> bool:
        """Whether an earlier attempt left the request without a reader for so long that the server cancelled it."""
        if earlier is attempt or "resume" not in attempt.features:
            return False
        if earlier.end is not None:
            return earlier.end.get("code") == "slow_reader"
        return earlier.lost_s is not None and self._may_be_forgotten(earlier, attempt)

    def _may_lack_logprobs(self, attempt: Attempt) -> bool:
        """Whether the first log-probabilities may be gone: the stream was paused, and its reader had some of it."""
        body = attempt.request.body
        paused = self._link.withdrawals[tuple(body["token_ids"])] > 0
        return (
            paused and "logprobs" in body["sampling"] and any(any(one.tokens) for one in attempt.request.attempts)
        )

    def _lacks_some(self, attempt: Attempt) -> bool:
        """Whether a client asks for what it, or another attempt of its own, had once."""
        return attempt.shortened or any(
            len(mine) < len(theirs)
            for other in attempt.request.attempts
            for mine, theirs in zip(attempt.tokens, other.tokens, strict=True)
        )

    def _is_cut_character(self, attempt: Attempt, index: int, right: Answer) -> bool:
        """Whether a sample ends in the replacement of an incomplete character, as one may that was ended early: by
        its final, or by what was asked where that was lost."""
        text, final = attempt.texts[index], attempt.end
        if not (text.endswith("\ufffd") and right.text.startswith(text[:-1])):
            return False
        if final is not None:
            return final["samples"][index]["finish_reason"] not in BY_ITSELF
        first, lost_s = attempt.request.attempts[0], attempt.lost_s or 0.0
        deadline_s = attempt.request.body.get("deadline_s", self._config.default_deadline_s)
        return any(at <= lost_s for at in attempt.request.cancelled_s) or lost_s >= first.sent_s + deadline_s

    def _joins_slow_reader(self, attempt: Attempt) -> bool:
        """Whether it is told how the stream ended that it resumes, or that its key names."""
        earlier = (one.end for one in attempt.request.attempts if one is not attempt)
        return attempt.kind == "resume" or any(
            end is not None and end.get("code") == "slow_reader" for end in earlier
        )

    def _may_be_forgotten(self, before: Attempt | None, attempt: Attempt) -> bool:
        """Whether the request may have been without a reader for long, since the last attempt that surely reached
        the server: others were lost, perhaps on their way."""
        attempts = attempt.request.attempts
        for earlier in reversed(attempts[: attempts.index(attempt)]) if before is not None else ():
            if earlier.disturbed or earlier.taken or earlier.lost_s is None:
                return True
            if earlier.accepted is not None:
                return attempt.end_s - earlier.lost_s > 0.5 * self._config.orphan_s
        return True

    def _times(self, attempt: Attempt) -> None:
        """Bounds in time, of streams whose client and connection were sound."""
        if attempt.disturbed or attempt.end is None or attempt.kind == "resume":
            return
        leapt_s = self._history.leapt_s(attempt.sent_s, attempt.end_s)
        deadline_s = attempt.request.body.get("deadline_s")
        took_s = attempt.end_s - attempt.sent_s
        first = attempt is attempt.request.attempts[0]
        if first and deadline_s is not None and took_s > deadline_s + STEP_S + 0.01 + ROUND_TRIP_S + leapt_s:
            self._wrong(f"{_name(attempt)}: a deadline of {deadline_s} s, ended after {took_s} s: {attempt.end}")
        if attempt.cancelled_s is not None:
            took_s = attempt.end_s - attempt.cancelled_s
            if took_s > CANCEL_S + ROUND_TRIP_S + leapt_s:
                self._wrong(f"{_name(attempt)}: cancelled, ended {took_s} s later: {attempt.end}")

    def _computed(self, request: Request, final: Body) -> None:
        """A request that ended by the core's word costs what cores have told of it, also those that were killed."""
        by_core = all(
            s["finish_reason"] in BY_ITSELF and isinstance(s.get("stop"), int | None) for s in final["samples"]
        )
        if by_core and final.get("cost") is not None:
            told, right = final["cost"]["computed_tokens"], self._link.computed[tuple(request.body["token_ids"])]
            if told != right:
                self._wrong(
                    f"request {request.number} cost {told} computed tokens by its final, {right} by the core"
                )

    def _once(self, request: Request) -> None:
        """No request generates twice."""
        ids = {one.accepted["request_id"] for one in request.attempts if one.accepted is not None}
        if len(ids) > 1:
            self._wrong(f"request {request.number} was accepted as {sorted(ids)}")
        finals = [one.end for one in request.attempts if one.end is not None and one.end["type"] == "final"]
        for final in finals:
            self._computed(request, final)
            if _told(final) != _told(finals[0]):
                self._wrong(f"request {request.number} ended as {finals[0]}, and as {final}")
        if not self._link.deaths:
            prompt = tuple(request.body["token_ids"])
            count = self._link.submissions[prompt]
            if count > 1 + self._link.withdrawals[prompt]:
                self._wrong(f"request {request.number} was given to the core {count} times")


def costs(history: History) -> dict[str, float] | None:
    """Sums of `cost` over all requests; None unless each one's is known."""
    sums = {"computed_tokens": 0, "recomputed_tokens": 0, "steps": 0, "preemptions": 0, "kv_block_s": 0.0}
    for request in history.requests:
        cost = _cost(request)
        if cost is None:
            return None
        for name, value in cost.items():
            sums[name] += value
    return sums


def _told(final: Body) -> list[Any]:
    """What every reader of a request is told of its end, whatever came before."""
    ends = [
        [sample.get(name) for name in ("sample", "finish_reason", "output_tokens", "stop")]
        for sample in final["samples"]
    ]
    return [ends, final["usage"], final["timings"], final["seed"]]


def _cost(request: Request) -> Body | None:
    """What a request cost by its last final, whatever was answered to who asked again; nothing if it was refused
    each time; None if it may have run, and no client got to know."""
    ends = [attempt.end for attempt in request.attempts]
    told: list[Body] = [end["cost"] for end in ends if end is not None and end.get("cost") is not None]
    if told:
        return told[-1]
    return {} if all(end is not None and end.get("code") in REFUSALS for end in ends) else None


def _name(attempt: Attempt) -> str:
    return (
        f"request {attempt.request.number}, {attempt.kind} as stream {attempt.stream} of connection "
        f"{attempt.connection} at {attempt.sent_s:.4f}"
    )
