"""Requests between their message and the core: attached bytes, bounds, keys, and the encoding of their prompts."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import msgspec

from cierzo.engine.errors import CierzoError, Draining, InvalidRequest
from cierzo.engine.frontend import validate
from cierzo.engine.frontend.attachments import ATTACHED_S, Attached, Attachments
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_side import CoreSide
from cierzo.engine.frontend.encoders import Encoder, Late
from cierzo.engine.frontend.encoding import Encoded, Job, RequestEncoder, pack_prompt
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.grammar_checks import GrammarChecks
from cierzo.engine.frontend.heap import Heap
from cierzo.engine.frontend.image_parts import lacks_files
from cierzo.engine.frontend.keeper import Keeper
from cierzo.engine.frontend.outlet import Outlets
from cierzo.engine.frontend.readers import Readers
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.sample import require_bounded
from cierzo.engine.frontend.stream import Sink, Stream, reader_of
from cierzo.engine.frontend.tenancy import Tenancy
from cierzo.engine.frontend.tenants import Tenant
from cierzo.engine.frontend.validate import SEED_BITS
from cierzo.engine.messages import FinishReason, Generate, ModelInfo, Submit
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.grammar import about
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.prompt import PromptEncoder, Reader

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """Since the start of the front end."""

    accepted: int = 0
    refused: int = 0
    finished: int = 0


class Owner(Protocol):
    """Who is told what becomes of a stream: the `Frontend`."""

    counters: Counters

    @property
    def is_refusing(self) -> bool:
        """Whether a drain has ended admission."""
        ...

    def end(self, stream: Stream, reason: FinishReason, message: str = "") -> None:
        """End a stream that never reached the core."""
        ...

    def left(self, stream: Stream) -> None:
        """A stream was refused: nothing of it is left."""
        ...

    def refused(self, error: CierzoError, sink: Sink, message: Generate | None = None) -> None:
        """Learn that a request was refused before a stream was opened for it."""
        ...

    def refused_late(self, error: CierzoError, stream: Stream) -> None:
        """Learn that a request was refused for what its prompt turned out to be."""
        ...


class Arrivals:
    """Takes requests until the core has them. A request is refused here, or started."""

    def __init__(
        self,
        config: FrontendConfig,
        model: ModelInfo,
        prompts: PromptEncoder,
        encoders: Encoder,
        tenancy: Tenancy,
        streams: Registry,
        core: CoreSide,
        keeper: Keeper,
        readers: Readers,
        outlets: Outlets,
        heap: Heap,
        owner: Owner,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._model = model
        self._prompts = prompts
        self._new_reader = reader_of(prompts)
        self._inline = RequestEncoder(prompts, config, model)
        self._encoders = encoders
        self.grammars = GrammarChecks(config, encoders, clock)
        self._encoding: dict[int, asyncio.Future[Any]] = {}  # of prompts, and then grammars, by request id
        self._grammar_bytes: dict[int, int] = {}  # of open requests, by id: a new core gets them again
        self._attachments = Attachments(config, encoders.budget, clock, self._attachment_expired)
        self._tenancy = tenancy
        self._streams = streams
        self._core = core
        self._keeper = keeper
        self._readers = readers
        self._outlets = outlets
        self._heap = heap
        self._owner = owner
        self._clock = clock
        self._random = random.SystemRandom()
        self._next_request_id = 0

    # --- from the connections --------------------------------------------------------------------------

    def attach(self, sink: Sink, stream_id: int, data: Buffer, image: int | None = None) -> None:
        """Append bytes to what the next `generate` of this stream says they are, or to the image of this number."""
        if stream_id in self._streams.of(sink):
            raise InvalidRequest(
                "this stream is already open", field="stream", limit="attached before generate", value=stream_id
            )
        self._attachments.add(sink, stream_id, data, image)

    def generate(self, sink: Sink, message: Generate) -> None:
        """Accept a request, or join the one that its idempotency key names, or raise the CierzoError that says why
        not."""
        attached = self._attachments.take(sink, message.stream)
        if attached is not None and attached.refused:
            if message.attached is not None or lacks_files(message):
                return  # the client has its answer
            attached = None
        try:
            self._readers.place(sink, message.stream)
            if attached is None and (stream := self._keeper.find_key(message, sink.access.tenant)) is not None:
                self._readers.join(sink, message, stream)
                return
            prompts = self._prompts
            validate.fields(
                message,
                self._config,
                self._model,
                prompts.special_ids,
                efforts=prompts.efforts,
                num_attached=0 if attached is None else len(attached.images),
            )
            self._admit(sink.access.tenant, message.sampling.n)
            if attached is not None or message.attached is not None:
                num_bytes = None if attached is None else attached.prompt_bytes
                most = self._model.max_model_len
                validate.attached(message, num_bytes, most, self._prompts.max_text_bytes(most))
        except CierzoError as error:
            self._owner.refused(error, sink, message)
            raise
        stream = self._open(sink, message)
        try:
            if attached is None:
                self._keeper.claim(stream, message)
            if attached is not None or self._prompts.weight(message) > self._config.inline_chars:
                self._encode_aside(stream, msgspec.msgpack.encode(message), attached)
            else:
                self._held(stream, self._inline.encode(message, apart=stream.apart))
        except CierzoError as error:
            self._refuse(stream, error)
            raise

    def generate_large(self, sink: Sink, stream_id: int, body: bytearray, deadline_s: float | None) -> None:
        """Accept a request that is too long to be decoded here, or raise the CierzoError that says why not.
        deadline_s: what it says of it, where that was found."""
        attached = self._attachments.take(sink, stream_id)
        try:
            self._readers.place(sink, stream_id)
            self._admit(sink.access.tenant, 1)
        except CierzoError as error:
            self._owner.refused(error, sink)
            raise
        if deadline_s is not None and not 0 < deadline_s <= self._config.max_deadline_s:
            deadline_s = None  # which will be refused
        stream = self._open(sink, Generate(stream=stream_id, deadline_s=deadline_s))  # the true one comes later
        try:
            self._encode_aside(stream, body, attached)
        except CierzoError as error:
            self._refuse(stream, error)
            raise

    def forget_attached(self, sink: Sink, stream_id: int) -> None:
        """Let go of what is attached to a stream."""
        self._attachments.take(sink, stream_id)

    def refuse_attached(self, sink: Sink, stream_id: int) -> None:
        """Part of a prompt was refused: pass over the rest of it."""
        self._attachments.refuse(sink, stream_id)

    def disconnect(self, sink: Sink) -> None:
        """A connection is gone, and what it attached."""
        self._attachments.disconnect(sink)

    def ended(self, stream: Stream) -> None:
        """A stream has ended: its prompt and its grammar are not wanted any more."""
        if (num_bytes := self._grammar_bytes.pop(stream.request_id, 0)) != 0:
            self._encoders.budget.give(num_bytes, stream.tenant.name)
        if (future := self._encoding.pop(stream.request_id, None)) is not None:
            future.cancel()
        self._heap.let_go(stream)

    def close(self) -> None:
        """Stop what runs on the side."""
        self._attachments.close()
        for future in [*self._encoding.values()]:
            future.cancel()
        self.grammars.close()

    # --- inside ----------------------------------------------------------------------------------------

    def _admit(self, tenant: Tenant, num_samples: int) -> None:
        if self._owner.is_refusing:
            raise Draining("the server is draining", retry_after_s=self._config.retry_after_s)
        self._core.require()
        self._heap.require(tenant)
        self._tenancy.require_request(self._tenancy.book(tenant), num_samples)

    def _open(self, sink: Sink, message: Generate) -> Stream:
        request_id = self._next_request_id
        self._next_request_id += 1
        arrived = self._clock()
        stream = Stream(
            request_id=request_id,
            stream_id=message.stream,
            sink=sink,
            deltas=message.deltas,
            num_samples=message.sampling.n,
            num_tokens=0,
            sampling=message.sampling,
            arrived=arrived,
            deadline_at_s=arrived + (message.deadline_s or self._config.default_deadline_s),
            apart=self._prompts.syntax is not None and "parts" in sink.features,
            book=self._tenancy.book(sink.access.tenant),
            peer=sink.peer,
            caller_id=message.caller_id,
            traceparent=message.traceparent,
        )
        if "resume" in sink.features:
            self._keeper.enter(stream)
        self._streams.open(stream)
        self._core.opened(stream)
        return stream

    def _encode_aside(self, stream: Stream, body: bytes | bytearray, attached: Attached | None) -> None:
        """A long prompt is rendered and encoded by a process; meanwhile the stream can be cancelled."""
        assert stream.sink is not None
        features = sorted(stream.sink.features)
        was_refused = attached is not None and attached.refused
        attached = None if was_refused else attached
        pieces, images = ([], []) if attached is None else (attached.pieces, attached.images)
        job = Job(
            stream=stream.stream_id,
            features=features,
            has_attached=bool(pieces),
            num_images=len(images),
            was_refused=was_refused,
        )
        files = [image.pieces for image in images]
        future = self._encoders.submit(job, body, pieces, stream.deadline_at_s, stream.tenant.name, files)
        self._encoding[stream.request_id] = future
        future.add_done_callback(lambda done: self._encoded(stream, done, was_refused))

    def _encoded(self, stream: Stream, future: asyncio.Future[Encoded], was_refused: bool) -> None:
        """An answer for a stream that waits for it; a stream that ended meanwhile has cancelled it. was_refused: of
        bytes that were attached, the client has heard so already."""
        self._encoding.pop(stream.request_id, None)
        if future.cancelled() or stream not in self._streams:
            return
        with self._refusing(stream, was_refused=was_refused):
            encoded = future.result()
            if self._settle(stream, encoded):
                self._held(stream, encoded)

    @contextmanager
    def _refusing(self, stream: Stream, *, was_refused: bool = False) -> Iterator[None]:
        """Tell the client of whatever goes wrong with a stream that waited."""
        try:
            yield
        except Late:
            self._owner.end(stream, "deadline")
        except CierzoError as error:
            if was_refused and error.field == "attached":
                self._refuse(stream, error)
            else:
                self._refuse_late(stream, error)
        except Exception as error:
            log.exception("request %d could not be started", stream.request_id)
            self._refuse_late(stream, CierzoError(f"internal error: {type(error).__name__}"))

    def _held(self, stream: Stream, encoded: Encoded) -> None:
        """Start a request, once its grammar is known to be one; meanwhile its prompt counts as one that waits."""
        if encoded.submit.images:
            self._heap.hold(stream, sum(len(image.pixels) for image in encoded.submit.images))
        if not encoded.submit.grammar:
            self._start(stream, encoded)
            return
        tenant = stream.tenant.name
        try:
            checking = self.grammars.ask(encoded.submit.grammar, tenant)
        except CierzoError as error:
            raise about(encoded.grammar_field, error) from error
        if checking is None:
            self._start(stream, encoded)
            return
        submit = encoded.submit
        submit = msgspec.structs.replace(submit, prompt_token_ids=pack_prompt(submit.prompt_token_ids))
        encoded = msgspec.structs.replace(encoded, submit=submit)
        num_bytes = memoryview(cast(msgspec.Raw, submit.prompt_token_ids)).nbytes
        try:
            self._encoders.budget.take(num_bytes, tenant)
        except CierzoError:
            checking.cancel()
            raise
        self._encoding[stream.request_id] = checking
        checking.add_done_callback(partial(self._checked, stream, encoded, num_bytes, tenant))

    def _checked(
        self, stream: Stream, encoded: Encoded, num_bytes: int, tenant: str, checking: asyncio.Future[None]
    ) -> None:
        """Start a request whose grammar was compiled, or refuse it; one that ended meanwhile has cancelled that."""
        self._encoders.budget.give(num_bytes, tenant)
        self._encoding.pop(stream.request_id, None)
        if checking.cancelled() or stream not in self._streams:
            return
        with self._refusing(stream):
            if (error := checking.exception()) is not None:
                raise about(encoded.grammar_field, error) if isinstance(error, CierzoError) else error
            self._start(stream, encoded)

    def _settle(self, stream: Stream, encoded: Encoded) -> bool:
        """Take over what a message says of its stream, which may have been opened without it; False if its key
        names another stream, which its reader gets instead."""
        message = encoded.message
        if message.idempotency_key is not None and stream.key is None:
            known = self._keeper.find_key(message, stream.tenant, encoded.content)
            if known is not None:
                sink = stream.sink
                self._leave(stream)
                if sink is not None:
                    self._join(sink, message, known)
                return False
            self._keeper.claim(stream, message, encoded.content)
        self._tenancy.require("max_open_samples", stream.tenant, message.sampling.n - stream.num_samples)
        self._streams.resize(stream, message.sampling.n)
        stream.deltas, stream.sampling = message.deltas, message.sampling
        stream.caller_id, stream.traceparent = message.caller_id, message.traceparent
        stream.deadline_at_s = stream.arrived + (message.deadline_s or self._config.default_deadline_s)
        self._core.opened(stream)
        return True

    def _join(self, sink: Sink, message: Generate, known: Stream) -> None:
        try:
            self._readers.join(sink, message, known)
        except CierzoError as error:
            sink.put(failure(message.stream, error))

    def _start(self, stream: Stream, encoded: Encoded) -> None:
        submit = encoded.submit
        num_tokens = encoded.num_prompt_tokens + len(submit.output_token_ids)
        if num_tokens > (most := self._config.max_open_tokens):
            raise InvalidRequest(
                f"{num_tokens} tokens are more than all open generations together may have (max_open_tokens)",
                field="max_open_tokens",
                limit=most,
                value=num_tokens,
            )
        self._core.require_in_time(stream, num_tokens, submit.priority)
        submit = self._as_sent(stream, submit, num_tokens)
        if not stream.deltas:
            require_bounded(submit, encoded.num_prompt_tokens, self._config.max_answer_bytes)
        stream.sampling, stream.in_thinking, stream.calls = submit.sampling, encoded.in_thinking, encoded.calls
        stream.num_prompt_tokens = encoded.num_prompt_tokens
        readers = [self._reader(stream, encoded, sample) for sample in range(stream.num_samples)]
        if submit.grammar:
            self._encoders.budget.take(len(submit.grammar), stream.tenant.name)
            self._grammar_bytes[stream.request_id] = len(submit.grammar)
        stream.start(submit, encoded.num_prompt_tokens, readers, encoded.states)
        self._streams.charge(stream, num_tokens)
        self._owner.counters.accepted += 1
        if submit.output_token_ids:
            self._heap.measure(stream)
        if stream.sink is not None:
            self._outlets.attach(stream)
        self._core.submit(stream)

    def _as_sent(self, stream: Stream, submit: Submit, num_tokens: int) -> Submit:
        """The request with a seed, as its tenant's and within that one's limits. Raises the CierzoError that says
        why it is not; num_tokens: of prompt and resumed answer."""
        tenant, sampling = stream.tenant, submit.sampling
        self._tenancy.require_tokens(stream.book, num_tokens, submit.priority)
        room = tenant.max_model_len - num_tokens + len(submit.output_token_ids)
        if sampling.seed is None or sampling.max_tokens > room:
            seed = self._random.getrandbits(SEED_BITS) if sampling.seed is None else sampling.seed
            sampling = msgspec.structs.replace(sampling, seed=seed, max_tokens=min(sampling.max_tokens, room))
        return msgspec.structs.replace(
            submit,
            prompt_token_ids=pack_prompt(submit.prompt_token_ids),
            sampling=sampling,
            tenant=tenant.name,
            weight=tenant.weight,
            cache_salt=tenant.cache_salt,
        )

    def _reader(self, stream: Stream, encoded: Encoded, sample: int) -> Reader | None:
        """A new one, which has seen what a resumed request brings."""
        reader, num_tokens = self._new_reader(stream, sample), len(encoded.submit.output_token_ids)
        if isinstance(reader, PartsReader) and num_tokens:
            reader.go_on_after(num_tokens, encoded.states[-1])
        elif isinstance(reader, Detokenizer):
            reader.go_on_after(num_tokens, encoded.tail)
        return reader

    def _attachment_expired(self, sink: Sink, stream_id: int) -> None:
        error = InvalidRequest(
            "bytes were attached, and no generate came",
            field="attached",
            limit=f"{ATTACHED_S:g} s",
            value=stream_id,
        )
        sink.put(failure(stream_id, error))

    def _refuse(self, stream: Stream, error: CierzoError) -> None:
        if stream in self._streams:
            self._owner.refused_late(error, stream)
            self._leave(stream)

    def _refuse_late(self, stream: Stream, error: CierzoError) -> None:
        sink = stream.sink
        self._refuse(stream, error)
        if sink is not None:
            sink.put(failure(stream.stream_id, error))

    def _leave(self, stream: Stream) -> None:
        """A stream that was not started leaves no trace."""
        self._heap.let_go(stream)
        self._streams.close(stream)
        self._streams.detach(stream)
        self._keeper.refused(stream)
        self._core.forget(stream)
        self._owner.left(stream)
