"""Messages about words, from their arrival to their answer: nothing of them reaches the core.

Short ones are answered at once. Others wait for an encoder process, and their answers, which may be long, for the
reader: they are charged as unencoded prompts are, and a connection that takes nothing of them ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial

import msgspec

from cierzo.engine.errors import CierzoError, InvalidRequest, Overloaded
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoders import Encoder, Late
from cierzo.engine.frontend.encoding import Job
from cierzo.engine.frontend.expiry import Expiry
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.frames import Buffer, pack
from cierzo.engine.frontend.limits import require_room
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.stream import Sink
from cierzo.engine.frontend.tenancy import Book, Tenancy
from cierzo.engine.frontend.tenants import Tenant
from cierzo.engine.frontend.whole import cut
from cierzo.engine.frontend.wire_checks import features
from cierzo.engine.frontend.wording import Wording, prompt_of
from cierzo.engine.messages import Detokenize, GetTokenizer, ModelInfo, Tokenize, TokenizerInfo, Worded
from cierzo.engine.text.prompt import PromptEncoder

log = logging.getLogger(__name__)

WAIT_S = 60.0  # for an encoder process


class Words:
    """Answers about words. `ask` is for whoever wants the answer itself, the others for connections."""

    def __init__(
        self,
        config: FrontendConfig,
        model: ModelInfo,
        prompts: PromptEncoder,
        encoders: Encoder,
        tenancy: Tenancy,
        streams: Registry,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._wording = Wording(prompts, config, model)
        self._encoders = encoders
        self._tenancy = tenancy
        self._streams = streams
        self._clock = clock
        self._asked: dict[Sink, dict[int, asyncio.Future[Worded]]] = {}
        self._ready: dict[Sink, deque[bytearray]] = {}  # frames, of which the first may be half sent
        self._stuck: Expiry[Sink] = Expiry(config.slow_reader_s, clock, self._look)
        self._taken: dict[Sink, int] = {}

    def ask(
        self, message: Tokenize | Detokenize, granted: Collection[str], tenant: Tenant
    ) -> asyncio.Future[Worded]:
        """Have a message answered, on behalf of a tenant with these features; cancel the future to drop it. Raises
        the CierzoError that refuses it, as the future does; that may also raise Late, which `late` tells."""
        if isinstance(message, Tokenize):
            features(prompt_of(message), granted)
        if self._wording.weight(message) <= self._config.inline_chars:
            answer: asyncio.Future[Worded] = asyncio.get_running_loop().create_future()
            answer.set_result(self._wording.answer(message))
            return answer
        method, body = str(type(message).__struct_config__.tag), msgspec.msgpack.encode(message)
        return self._aside(
            Job(stream=message.stream, features=[*granted], has_attached=False, method=method), body, tenant
        )

    def late(self) -> Overloaded:
        """The refusal of a message that no process came to in time."""
        what = f"the processes that encode were busy for {WAIT_S:g} s"
        return Overloaded(what, field="encoders", retry_after_s=self._config.retry_after_s)

    def info(self, message: GetTokenizer) -> TokenizerInfo:
        """Describe the tokenizer."""
        return self._wording.info(message.stream)

    # --- from the connections --------------------------------------------------------------------------

    def take(self, sink: Sink, message: Tokenize | Detokenize) -> None:
        """Answer a message. Raises the CierzoError that refuses it."""
        self._place(sink, message.stream)
        answer = self.ask(message, sink.features, sink.access.tenant)
        if answer.done():
            sink.put(answer.result())
        else:
            self._follow(sink, message.stream, answer)

    def take_large(self, sink: Sink, stream_id: int, method: str, body: bytearray) -> None:
        """Answer a message that is too long to be decoded here. Raises the CierzoError that refuses it."""
        self._place(sink, stream_id)
        job = Job(stream=stream_id, features=[*sink.features], has_attached=False, method=method)
        self._follow(sink, stream_id, self._aside(job, body, sink.access.tenant))

    def disconnect(self, sink: Sink) -> None:
        """A connection is gone, and nobody waits for its answers."""
        for answer in [*self._asked.pop(sink, {}).values()]:
            _drop(answer)
        for frame in self._ready.pop(sink, ()):
            self._encoders.budget.give(len(frame), sink.access.tenant.name)
        self._stuck.discard(sink)
        self._taken.pop(sink, None)

    def writable(self, sink: Sink) -> None:
        """A connection takes output again: send it the next answer that waits."""
        ready = self._ready.get(sink)
        if ready and not sink.is_paused:
            self._watch(sink)
            sink.put_frame(self._sending(sink, ready[0]))

    def close(self) -> None:
        """Stop what runs on the side."""
        for answers in [*self._asked.values()]:
            for answer in [*answers.values()]:
                _drop(answer)
        self._stuck.close()

    # --- inside ----------------------------------------------------------------------------------------

    def _place(self, sink: Sink, stream_id: int) -> None:
        """Refuse a stream id that is taken, and one question too many."""
        streams, asked = self._streams.of(sink), self._asked.get(sink, {})
        if stream_id in streams or stream_id in asked:
            raise InvalidRequest("this stream is already open", field="stream", limit="unique", value=stream_id)
        require_room(self._config, "max_streams_per_connection", len(streams) + len(asked) + 1)

    def _aside(self, job: Job, body: Buffer, tenant: Tenant) -> asyncio.Future[Worded]:
        """Have a process answer; until then it is an open request of the tenant's."""
        book = self._tenancy.book(tenant)
        self._tenancy.require_request(book, 0)
        answer = self._encoders.word(job, body, self._clock() + WAIT_S, tenant.name)
        book.num_requests += 1
        answer.add_done_callback(partial(_closed, book))
        return answer

    def _follow(self, sink: Sink, stream_id: int, answer: asyncio.Future[Worded]) -> None:
        self._asked.setdefault(sink, {})[stream_id] = answer
        answer.add_done_callback(partial(self._answered, sink, stream_id))

    def _answered(self, sink: Sink, stream_id: int, answer: asyncio.Future[Worded]) -> None:
        """Send an answer, or why there is none; one that nobody waits for has been cancelled."""
        asked = self._asked.get(sink, {})
        if answer.cancelled() or asked.pop(stream_id, None) is None:
            return
        if not asked:
            del self._asked[sink]
        try:
            frame = pack([answer.result()])
            self._encoders.budget.take(len(frame), sink.access.tenant.name)
        except Late:
            sink.put(failure(stream_id, self.late()))
        except CierzoError as error:
            sink.put(failure(stream_id, error))
        else:
            self._ready.setdefault(sink, deque()).append(frame)
            self._watch(sink)
            self.writable(sink)

    def _sending(self, sink: Sink, frame: bytearray) -> Iterator[memoryview]:
        """Give the pieces of an answer as the reader takes them."""
        yield from cut([frame])
        ready = self._ready.get(sink)
        if ready is None:
            return
        ready.popleft()
        self._encoders.budget.give(len(frame), sink.access.tenant.name)
        if not ready:
            del self._ready[sink]
            self._stuck.discard(sink)
            self._taken.pop(sink, None)

    def _watch(self, sink: Sink) -> None:
        """See from now on whether a reader takes anything."""
        self._taken[sink] = sink.num_taken
        self._stuck.add(sink)

    def _look(self, sink: Sink) -> None:
        """End a connection whose peer has taken nothing since the last look."""
        if sink.num_taken != self._taken[sink]:
            self._watch(sink)
            return
        text = "closing a connection: answers about words were left unread for %g s"
        log.error(text, self._config.slow_reader_s)
        sink.drop()


def _drop(answer: asyncio.Future[Worded]) -> None:
    """Nobody waits for an answer."""
    if not answer.cancel() and not answer.cancelled():
        answer.exception()  # it is there, and is of no interest any more


def _closed(book: Book, answer: asyncio.Future[Worded]) -> None:
    """Count a question no more."""
    book.num_requests -= 1
