"""What the clients of a simulation asked for, and what they were told, in virtual seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]  # a message as a client writes it


@dataclass(eq=False)
class Request:
    """A generation that a client wants, over all its attempts to get it."""

    number: int
    body: Body  # of generate, without the stream; a prompt is always there as `token_ids`
    as_text: bool = False  # the prompt is sent as text
    tenant: str = ""  # whose it is
    attempts: list[Attempt] = field(default_factory=list)
    cancelled_s: list[float] = field(default_factory=list)  # when anybody asked for it

    @property
    def num_samples(self) -> int:
        """Answers to it."""
        return int(self.body["sampling"].get("n", 1))

    @property
    def is_apart(self) -> bool:
        """Whether who asked first has the feature "parts"."""
        return bool(self.attempts) and "parts" in self.attempts[0].features

    @property
    def request_id(self) -> str | None:
        """The server's name for it, of those told by `accepted` the last."""
        told = [one.accepted["request_id"] for one in self.attempts if one.accepted is not None]
        return told[-1] if told else None

    @property
    def has_ended(self) -> bool:
        """Tell whether a final or an error has come."""
        return bool(self.attempts) and self.attempts[-1].end is not None


@dataclass(eq=False)
class Attempt:
    """A stream of one connection: a generate, or a resume, and what came of it.

    tokens, texts, thoughts, logprobs: by sample, with what earlier attempts had brought. marks: by sample, tokens,
    and characters of text and of thoughts, after each delta. disturbed: for a while the client did not read, or the
    link was frozen.
    """

    request: Request
    kind: str
    stream: int
    connection: int
    features: frozenset[str]
    sent_s: float
    tokens: list[list[int]]
    texts: list[str]
    thoughts: list[str]
    logprobs: list[list[Any]]
    marks: list[list[tuple[int, int, int]]]
    shortened: bool = False  # the client has thrown away some of what had come
    accepted: Body | None = None
    end: Body | None = None
    end_s: float = 0.0
    lost_s: float | None = None  # the connection went before the end
    taken: bool = False  # another attempt has taken it over
    disturbed: bool = False
    cancelled_s: float | None = None

    def text_to_resume(self, sample: int) -> str:
        """The text of the tokens that have come: a delta without tokens is not counted, and comes again."""
        return self.texts[sample][: self.marks[sample][-1][1]] if self.marks[sample] else ""

    def thoughts_to_resume(self, sample: int) -> str:
        """The same of the thoughts."""
        return self.thoughts[sample][: self.marks[sample][-1][2]] if self.marks[sample] else ""

    @property
    def is_open(self) -> bool:
        """Tell whether more may come."""
        return self.end is None and self.lost_s is None and not self.taken


@dataclass(eq=False)
class Question:
    """A message with one answer: ping, stats, cancel_request, ..., or a faulty one about a stream of its own."""

    kind: str
    stream: int
    answers: tuple[str, ...]  # types that may come
    sent_s: float
    answer: Body | None = None
    lost: bool = False


@dataclass
class History:
    """The logs of all clients. `wrongs`: what a client saw that must not be, told at once."""

    requests: list[Request] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    wrongs: list[str] = field(default_factory=list)
    leaps: list[tuple[float, float]] = field(default_factory=list)  # time stood still for everyone between
    drains: list[float] = field(default_factory=list)  # when one was asked for

    def wrong(self, what: str) -> None:
        """Note a violation that shows at once."""
        self.wrongs.append(what)

    def leapt_s(self, begin_s: float, end_s: float) -> float:
        """Seconds that were skipped between two times."""
        return sum(max(0.0, min(end_s, to) - max(begin_s, at)) for at, to in self.leaps)
