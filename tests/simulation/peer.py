"""A client's connection, frame by frame and by hand: nothing of our own client is used."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec

from cierzo.engine import messages
from cierzo.engine.frontend import delta_cost as costs
from cierzo.engine.messages import PROTOCOL_VERSION

from .history import Attempt, Body, History, Question, Request
from .network import Wire

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode


def frame(body: Body | bytes) -> bytes:
    """A message as it travels."""
    data = body if isinstance(body, bytes) else _encode(body)
    return len(data).to_bytes(4, "big") + data


class Peer:
    """A connection of a client: attempts and questions by stream id, and a task that reads."""

    def __init__(self, wire: Wire, history: History, features: tuple[str, ...], key: str = "") -> None:
        self.wire = wire
        self.features: frozenset[str] = frozenset()
        self.attempts: dict[int, Attempt] = {}
        self.questions: dict[int, Question] = {}
        self.welcome: asyncio.Future[Body | None] = asyncio.get_running_loop().create_future()
        self.failure: Body | None = None  # of the connection
        self.news = asyncio.Event()
        self.withholds_credit = False
        self._owed: Counter[int] = Counter()  # credit that was withheld, by stream
        self._history = history
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        self._next_stream = 1
        self._reads = asyncio.Event()
        self._reads.set()
        wire.on_freeze = self.disturb
        hello: Body = {"type": "hello", "magic": "cierzo", "version": PROTOCOL_VERSION, "features": list(features)}
        wire.send(frame({**hello, "key": key} if key else hello))
        self.task = self._loop.create_task(self._read())

    @property
    def is_up(self) -> bool:
        """Tell whether messages can be sent."""
        return self.welcome.done() and self.welcome.result() is not None and not self.wire.is_lost

    # --- what a client does ----------------------------------------------------------------------------

    def say(self, message: Body) -> None:
        """Send a message."""
        self.wire.send(frame(message))

    def next_stream(self) -> int:
        """A stream id that was not used."""
        self._next_stream += 1
        return self._next_stream

    def start(self, request: Request, message: Body, kind: str, base: Attempt | None = None) -> Attempt:
        """Send generate or resume, as the next attempt at `request`; `base` is what the client goes on from."""
        count, stream = request.num_samples, self.next_stream()
        given = list(request.body.get("output_token_ids", ()))
        attempt = Attempt(
            request=request,
            kind=kind,
            stream=stream,
            connection=self.wire.number,
            features=self.features,
            sent_s=self._loop.time(),
            tokens=[list(base.tokens[i]) if base else list(given) for i in range(count)],
            texts=[base.text_to_resume(i) if base else "" for i in range(count)],
            thoughts=[base.thoughts_to_resume(i) if base else "" for i in range(count)],
            logprobs=[list(base.logprobs[i]) if base else [] for i in range(count)],
            marks=[list(base.marks[i]) if base else [] for i in range(count)],
            shortened=base is not None and base.shortened,
            disturbed=not self._reads.is_set() or self.withholds_credit or self.wire.is_hard,
        )
        for earlier in request.attempts:
            if earlier.is_open:
                earlier.taken = True
        request.attempts.append(attempt)
        self.attempts[stream] = attempt
        self.say({**message, "stream": stream})
        return attempt

    def ask(self, kind: str, answers: tuple[str, ...], **fields: Any) -> Question:
        """Send a message that has one answer."""
        question = Question(kind, self.next_stream(), answers, self._loop.time())
        self.questions[question.stream] = question
        self._history.questions.append(question)
        self.say({"type": kind, "stream": question.stream, **fields})
        return question

    def pause(self, is_paused: bool) -> None:
        """Read nothing more, or go on."""
        if is_paused:
            self._reads.clear()
            self.disturb()
        else:
            self._reads.set()

    def give_credit(self) -> None:
        """Give back what deltas cost, and withhold it no more."""
        self.withholds_credit = False
        for stream, num_bytes in self._owed.items():
            self.say({"type": "credit", "stream": stream, "bytes": num_bytes})
        self._owed.clear()

    def disturb(self) -> None:
        """Say of what is open that its times do not count."""
        for attempt in self.attempts.values():
            attempt.disturbed = True

    def lost(self) -> None:
        """The connection is gone: nothing more comes of what is open."""
        for attempt in self.attempts.values():
            if attempt.end is None:  # also of one that was taken over: the messages may have crossed
                attempt.lost_s = self._loop.time()
        for question in self.questions.values():
            question.lost = question.answer is None
        self.attempts.clear()
        self.questions.clear()
        if not self.welcome.done():
            self.welcome.set_result(None)
        self.news.set()

    # --- what it is told -------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            await self._reads.wait()
            data = await self.wire.read()
            if not data:
                break
            self._rest += data
            while len(self._rest) >= 4 and len(self._rest) >= 4 + int.from_bytes(self._rest[:4], "big"):
                end = 4 + int.from_bytes(self._rest[:4], "big")
                body, self._rest = self._rest[4:end], self._rest[end:]
                self._hear(_decode(body))
            self.news.set()
        self.lost()

    def _hear(self, message: Body) -> None:
        kind, stream = message["type"], message.get("stream")
        if kind == "welcome":
            self.features = frozenset(message.get("features", ()))
            self.welcome.set_result(message)
        elif kind == "error" and stream == -1:
            self.failure = message
        elif kind == "ping":
            self.say({"type": "pong", "stream": stream})
        elif kind == "deltas":
            for delta in message["deltas"]:
                self._hear(delta)
        elif stream in self.questions:
            question = self.questions.pop(stream)
            question.answer = message
            if kind not in question.answers:
                self._history.wrong(f"{question.kind} was answered by {message}")
        elif stream in self.attempts:
            self._of_attempt(self.attempts[stream], kind, message)
        else:
            self._history.wrong(f"connection {self.wire.number}: a message of no open stream: {message}")

    def _of_attempt(self, attempt: Attempt, kind: str, message: Body) -> None:
        if kind == "accepted":
            if attempt.accepted is not None:
                self._history.wrong(f"accepted twice: {message}")
            attempt.accepted = message
        elif kind == "delta":
            self._delta(attempt, message)
        elif kind in ("final", "error"):
            attempt.end, attempt.end_s = message, self._loop.time()
            del self.attempts[attempt.stream]
        else:
            self._history.wrong(f"a generation was answered by {message}")

    def _delta(self, attempt: Attempt, message: Body) -> None:
        sample = message.get("sample", 0)
        attempt.tokens[sample] += message.get("token_ids", [])
        attempt.texts[sample] += message.get("text", "")
        attempt.thoughts[sample] += thoughts_of(message)
        attempt.logprobs[sample] += message.get("logprobs") or []
        if message.get("token_ids"):
            lengths = (attempt.tokens, attempt.texts, attempt.thoughts)
            num_tokens, num_chars, num_thought = (len(each[sample]) for each in lengths)
            attempt.marks[sample].append((num_tokens, num_chars, num_thought))
        if "credit" in self.features:
            self._owed[attempt.stream] += delta_cost(message)
            if not self.withholds_credit:
                self.give_credit()


def thoughts_of(message: Body) -> str:
    """The thoughts that a delta, or a sample's record, has among its parts."""
    return "".join(part.get("text", "") for part in message.get("parts", []) if part["kind"] == "thinking")


def delta_cost(message: Body) -> int:
    """Credit that a delta takes."""
    return costs.delta_cost(msgspec.convert({k: v for k, v in message.items() if k != "type"}, messages.Delta))
