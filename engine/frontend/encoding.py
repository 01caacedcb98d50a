"""The work of an encoder process: a request is decoded, checked, rendered and encoded; and the words for it.

The front end sends a `Job`, the bytes of the `generate` message and, if prompt or images were attached, those; the
answer is a `Failure`, or an `Encoded`, the prompt's token ids, and of each image its pixels, in pieces. Each is a
frame, the ids as one MessagePack list: they go on to the core as they are, and the front end never looks at them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import msgspec

from cierzo.engine.errors import CierzoError, InvalidRequest, ProtocolError
from cierzo.engine.frontend import image_parts, validate, wire_checks
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.frames import UNDECODABLE
from cierzo.engine.frontend.sample import STATE_TOKENS
from cierzo.engine.frontend.wording import DECODERS, Wording, prompt_of
from cierzo.engine.messages import ChatMessage, Failure, Generate, Message, ModelInfo, Submit, Tokenize, Worded
from cierzo.engine.text.grammar import GrammarWriter, asks_for_grammar, grammar_field, grammar_of, writer_of
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.prompt import CallLimit, Prompt, PromptEncoder
from cierzo.engine.text.reader_state import ReaderState

_decode_generate = msgspec.msgpack.Decoder(Generate).decode
_decode_attached = {
    "text": msgspec.msgpack.Decoder(str).decode,
    "messages": msgspec.msgpack.Decoder(list[ChatMessage]).decode,
    "token_ids": msgspec.msgpack.Decoder(list[int]).decode,
}
_encode = msgspec.msgpack.Encoder().encode
PIECE_BYTES = 128 * 1024  # of pixels, in a frame
COMPILE = "compile"  # a job's method


class Setup(Message, frozen=True):
    """First message to an encoder process. `checkpoint`: folder of the tokenizer; "": there is none. `tokenizer`:
    which of its files is read. `compiles`: its jobs are grammars, and not prompts."""

    checkpoint: str
    frontend: FrontendConfig
    model: ModelInfo
    tokenizer: str = "auto"
    compiles: bool = False


class Loaded(Message, frozen=True, tag="loaded"):
    """The encoder process has read its tokenizer, and takes jobs."""


class Job(Message, frozen=True):
    """A request to encode. `stream` is what its beginning named; `features` are those of its connection.
    `num_images`: files of images that were attached; `was_refused`: some were, and the client has heard so.
    `method`: the type of the message; of another than "generate" the answer is the one that its client gets, but of
    COMPILE, whose body is a grammar, Compiled."""

    stream: int
    features: list[str]
    has_attached: bool
    method: str = "generate"
    num_images: int = 0
    was_refused: bool = False


class Compiled(Message, frozen=True, tag="compiled"):
    """A grammar can be followed."""


class Encoded(Message, frozen=True, tag="encoded"):
    """A request that is valid. `message` lacks its prompt, `submit` too, and its images' pixels, and its seed if
    the client gave none.

    in_thinking: the prompt ends within a thought. calls: how many the answer may hold. tail: `Detokenizer.tail` of
    the output tokens; where the answer comes in parts, instead `states` of their reader, after each STATE_TOKENS of
    them and after all.
    content: `digest` of the whole message, if it has an idempotency key. grammar_field: the field that the grammar
    of `submit` is from. pixel_bytes: of each image, those that come behind the ids.
    """

    message: Generate
    submit: Submit
    num_prompt_tokens: int
    tail: list[int]
    states: list[ReaderState]
    content: bytes = b""
    in_thinking: bool = False
    calls: CallLimit = "many"
    grammar_field: str = ""
    pixel_bytes: list[int] = msgspec.field(default_factory=list)


Answer = Loaded | Compiled | Encoded | Worded | Failure


class RequestEncoder:
    """Turns requests into their answers. Holds no state between them."""

    def __init__(self, prompts: PromptEncoder, config: FrontendConfig, model: ModelInfo) -> None:
        self._prompts = prompts
        self._config = config
        self._model = model
        self._wording = Wording(prompts, config, model)

    @cached_property
    def _grammars(self) -> GrammarWriter | None:
        """Made with the first grammar: the bytes of all tokens take a process of its own half a second to find."""
        return writer_of(self._prompts, self._model)

    def answer(
        self, job: Job, body: bytes | bytearray, attached: bytes | bytearray | None, images: Sequence[bytes] = ()
    ) -> list[bytes]:
        """The frames of the answer. Never raises."""
        try:
            if job.method != "generate":
                return [_encode(self.word(job, body))]
            encoded, token_ids, pixels = self.encode_job(job, body, attached, images)
            return [_encode(encoded), token_ids, *(piece for each in pixels for piece in _pieces(each))]
        except CierzoError as error:
            return [_encode(failure(job.stream, error))]
        except Exception as error:
            return [_encode(failure(job.stream, CierzoError(f"internal error: {type(error).__name__}")))]

    def word(self, job: Job, body: bytes | bytearray) -> Worded:
        """Answer a message about words as it came. Raises CierzoError."""
        try:
            message = DECODERS[job.method](body)
        except UNDECODABLE as error:
            raise wire_checks.undecodable(error, body) from error
        _once(message.stream, job)
        if isinstance(message, Tokenize):
            wire_checks.features(prompt_of(message), frozenset(job.features))
        return self._wording.answer(message)

    def encode(self, message: Generate, *, apart: bool = False) -> Encoded:
        """Encode a decoded message whose fields are checked; the ids lie in `submit`. apart: its answer is to come
        in parts. Raises InvalidRequest."""
        prompts, model = self._prompts, self._model
        prompt = prompts.encode(message, model.max_model_len, image_parts.images_of(message, self._config, model))
        submit = validate.request(
            message,
            prompt.token_ids,
            0,
            message.sampling.seed,
            model,
            prompts.special_ids,
            image_token_ids=prompts.image_token_ids,
            images=prompt.images,
        )
        submit = prompts.masked(submit, message, model, in_thinking=prompt.in_thinking)
        calls, field = prompts.call_limit(message), ""
        if asks_for_grammar(message):
            field, one_call = grammar_field(message), calls == "one"
            how = {"in_thinking": prompt.in_thinking, "one_call": one_call, "apart": apart}
            submit = msgspec.structs.replace(submit, grammar=grammar_of(self._grammars, message, **how))
        tail, states = self._seen(message, submit, prompt, apart)
        return Encoded(
            message=message,
            submit=submit,
            num_prompt_tokens=len(prompt.token_ids),
            content=b"" if message.idempotency_key is None else digest(message),
            in_thinking=prompt.in_thinking,
            calls=calls,
            tail=tail,
            states=states,
            grammar_field=field,
        )

    def _seen(
        self, message: Generate, submit: Submit, prompt: Prompt, apart: bool
    ) -> tuple[list[int], list[ReaderState]]:
        """`Encoded.tail` and `Encoded.states`, of the tokens that a resumed request brings."""
        states: list[ReaderState] = []
        if not (brought := message.output_token_ids):
            return [], states
        in_thinking, calls = prompt.in_thinking, self._prompts.call_limit(message)
        reader = self._prompts.reader(submit.sampling, apart=apart, in_thinking=in_thinking, calls=calls)
        if reader is None:
            return [], states
        for start in range(0, len(brought), STATE_TOKENS):
            reader.push(brought[start : start + STATE_TOKENS])
            if reader.stop is not None:
                raise InvalidRequest(
                    "the generation has already ended: it holds a stop string",
                    field="output_token_ids",
                    value=reader.stop,
                )
            if isinstance(reader, PartsReader):
                states.append(reader.state())
        return [] if isinstance(reader, PartsReader) else reader.tail(brought, len(brought)), states

    def encode_job(
        self, job: Job, body: bytes | bytearray, attached: bytes | bytearray | None, images: Sequence[bytes] = ()
    ) -> tuple[Encoded, bytes, list[bytes]]:
        """Encode a message as it came, with what was attached; the prompt's ids and the images' pixels are apart.
        Raises CierzoError."""
        message, prompts = _with_images(self._message(job, body, attached), images, job), self._prompts
        validate.fields(message, self._config, self._model, prompts.special_ids, efforts=prompts.efforts)
        encoded = self.encode(message, apart="parts" in job.features)
        nothing: dict[str, Any] = dict.fromkeys(("text", "messages", "token_ids", "attached", "suffix"))
        bare = msgspec.structs.replace(message, **nothing, output_token_ids=[], tools=[], grammar=None, images=[])
        found = encoded.submit.images
        shapes = [msgspec.structs.replace(image, pixels=b"") for image in found]
        submit = msgspec.structs.replace(encoded.submit, prompt_token_ids=[], images=shapes)
        return (
            msgspec.structs.replace(
                encoded, message=bare, submit=submit, pixel_bytes=[len(image.pixels) for image in found]
            ),
            _encode(encoded.submit.prompt_token_ids),
            [image.pixels for image in found],
        )

    def _message(self, job: Job, body: bytes | bytearray, attached: bytes | bytearray | None) -> Generate:
        """The whole message, with what was attached in its place."""
        try:
            message = _decode_generate(body)
        except UNDECODABLE as error:
            raise wire_checks.undecodable(error, body) from error
        _once(message.stream, job)
        wire_checks.features(message, frozenset(job.features))
        num_bytes, most = None if attached is None else len(attached), self._model.max_model_len
        validate.attached(message, num_bytes, most, self._prompts.max_text_bytes(most))
        if message.attached is None or attached is None:
            return message
        try:
            self._check_length(message.attached, attached)
            value = _decode_attached[message.attached](attached)
        except UNDECODABLE as error:
            refused = wire_checks.undecodable(error, attached)
            raise InvalidRequest(
                f"attached {message.attached}: {refused.message}",
                field=message.attached,
                limit=refused.limit,
                value=refused.value,
            ) from error
        changes = {message.attached: value, "attached": None}
        whole = msgspec.structs.replace(message, **changes)
        wire_checks.features(whole, frozenset(job.features))
        return whole

    def _check_length(self, kind: str, attached: bytes | bytearray) -> None:
        """Refuse a list that is too long before its entries are made."""
        most = {"messages": self._config.max_turns, "token_ids": self._model.max_model_len}.get(kind)
        if most is not None and (length := _list_length(attached)) > most:
            raise InvalidRequest(
                f"{kind} has {length} entries, allowed: {most}", field=kind, limit=most, value=length
            )


def _with_images(message: Generate, images: Sequence[bytes], job: Job) -> Generate:
    """The message with the images that were attached. Raises InvalidRequest where it has some of its own, and where
    one was refused."""
    if job.was_refused and image_parts.lacks_files(message):
        raise InvalidRequest("an image that was attached was refused", field="attached")
    if images and message.images:
        raise image_parts.twice(len(images), len(message.images))
    return msgspec.structs.replace(message, images=[*images]) if images else message


def _once(stream_id: int, job: Job) -> None:
    """Refuse a message that turns out to be of another stream than its beginning said."""
    if stream_id != job.stream:
        raise ProtocolError("stream is named twice", field="stream", limit="once", value=stream_id)


def digest(message: Generate) -> bytes:
    """A digest of what is asked for, the same for every repetition of a request, attached or not."""
    params = message.sampling
    if params.logit_bias:
        params = msgspec.structs.replace(params, logit_bias=dict(sorted(params.logit_bias.items())))
    named: dict[str, Any] = {"idempotency_key": None, "caller_id": "", "traceparent": ""}
    content = msgspec.structs.replace(message, stream=0, deadline_s=None, sampling=params, **named)
    return hashlib.blake2b(_encode(content), digest_size=16).digest()


def joined(encoded: Encoded, token_ids: bytes, pixels: Sequence[bytes | bytearray]) -> Encoded:
    """A request with what came behind it: its prompt's ids, and the pixels of each image."""
    images = [
        msgspec.structs.replace(image, pixels=cast("bytes", own))
        for image, own in zip(encoded.submit.images, pixels, strict=True)
    ]
    submit = msgspec.structs.replace(encoded.submit, prompt_token_ids=packed(token_ids), images=images)
    return msgspec.structs.replace(encoded, submit=submit)


class Arriving:
    """An answer of which more frames come."""

    def __init__(self, encoded: Encoded) -> None:
        self._encoded = encoded
        self._token_ids: bytes | None = None
        self._pixels = [bytearray() for _ in encoded.pixel_bytes]
        self._number = 0  # of the image that comes

    def take(self, frame: memoryview) -> Encoded | None:
        """Take the next frame; the whole answer, if it was the last. Pixels are megabytes, and grow in place."""
        sizes = self._encoded.pixel_bytes
        if self._token_ids is None:
            self._token_ids = bytes(frame)
        else:
            self._pixels[self._number] += frame
            self._number += len(self._pixels[self._number]) == sizes[self._number]
        return joined(self._encoded, self._token_ids, self._pixels) if self._number == len(sizes) else None


def _pieces(pixels: bytes) -> Iterator[bytes]:
    """Pixels in frames that no loop is held up by."""
    return (pixels[start : start + PIECE_BYTES] for start in range(0, len(pixels), PIECE_BYTES))


def packed(token_ids: bytes) -> list[int]:
    """Token ids in their wire form, where a message to the core has a list: who decodes it sees no difference."""
    return cast("list[int]", msgspec.Raw(token_ids))


def pack_prompt(token_ids: list[int]) -> list[int]:
    """Pack the prompt of a message to the core, if it is not yet."""
    return token_ids if isinstance(token_ids, msgspec.Raw) else packed(_encode(token_ids))


def _list_length(data: bytes | bytearray) -> int:
    """Entries that a MessagePack list announces; 0 for anything else."""
    first = data[0] if data else 0
    if 0x90 <= first <= 0x9F:
        return first & 0x0F
    width = {0xDC: 2, 0xDD: 4}.get(first, 0)
    return int.from_bytes(data[1 : 1 + width], "big")
