"""Raw in, validated out: what a client asked becomes a `Submit`, or an InvalidRequest with field, limit and value.

Past this file nothing checks a request again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend import image_parts
from cierzo.engine.frontend.bounds import count as _count
from cierzo.engine.frontend.bounds import one_of, shown
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.conversation import conversation
from cierzo.engine.frontend.wire_checks import ATTACHABLE
from cierzo.engine.messages import Generate, ModelInfo, PromptImage, SamplingParams, Submit
from cierzo.engine.text.image_tokens import unpaired

MAX_SEED = 2**63 - 1
SEED_BITS = 53  # of seeds drawn for clients: they survive those whose numbers are doubles
MAX_BIAS = 100.0
MAX_ID_BYTES = 9  # of a token id in MessagePack; the longest head of a list or text has 5

MAX_CALLER_ID_CHARS = 128
TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, section 3.2


def fields(
    message: Generate,
    config: FrontendConfig,
    model: ModelInfo,
    special_ids: Mapping[str, int] = {},
    *,
    efforts: Sequence[str] | None = None,
    num_attached: int = 0,
) -> None:
    """Check everything but the prompt's tokens: cheap, and before a long text is encoded. Raises InvalidRequest.

    special_ids: the tokenizer's special tokens, by how they are spelled. efforts: what `reasoning_effort` may say;
    None: only its chat can tell. num_attached: files of images that came before the message.
    """
    _prompts_given(message)
    conversation(message, config, efforts)
    image_parts.check(message, config, model, num_attached)
    _sampling(message.sampling, config, model)
    if message.sampling.stop:
        _stop_strings(message.sampling.stop, config, model, special_ids)
    if message.priority:
        _within("priority", message.priority, -config.max_abs_priority, config.max_abs_priority)
    if message.deadline_s is not None:
        _within("deadline_s", message.deadline_s, 0, config.max_deadline_s, above=True)
    if message.output_token_ids:
        _count("output_token_ids", message.output_token_ids, model.max_model_len)
        _resume(message, model)
    if message.caller_id or message.traceparent:
        _names(message)


def request(
    message: Generate,
    prompt_token_ids: list[int],
    request_id: int,
    seed: int | None,
    model: ModelInfo,
    special_ids: Mapping[str, int] = {},
    *,
    image_token_ids: Collection[int] = (),
    images: Sequence[PromptImage] = (),
) -> Submit:
    """The `Submit` of a message that passed `fields`, without its times.

    `max_tokens` is cut to what is left of `max_model_len`; stop strings that are special tokens of the model are
    stop tokens to the core, which finds no text in them.

    Raises InvalidRequest if the prompt is empty, too long, has ids outside the vocabulary, or, sent as ids, one
    that stands for an image, where none came with it.
    """
    source = "token_ids" if message.token_ids is not None else "text" if message.text is not None else "messages"
    if not prompt_token_ids:
        raise InvalidRequest("the prompt is empty", field=source, limit="at least 1 token", value=0)
    room = model.max_model_len - len(prompt_token_ids)
    if room <= len(message.output_token_ids):
        raise InvalidRequest(
            f"{len(prompt_token_ids)} prompt and {len(message.output_token_ids)} output tokens leave no room "
            f"for another one in a context of {model.max_model_len}",
            field=source,
            limit=model.max_model_len - len(message.output_token_ids) - 1,
            value=len(prompt_token_ids),
        )
    token_ids(source, prompt_token_ids, model.vocab_size)
    if message.token_ids is not None and not images:
        _no_images(prompt_token_ids, image_token_ids)
    params = message.sampling
    if params.max_tokens > room or params.seed != seed:
        params = msgspec.structs.replace(params, seed=seed, max_tokens=min(params.max_tokens, room))
    if params.stop or params.stop_token_ids:
        stop_ids = (*params.stop_token_ids, *(special_ids[word] for word in params.stop if word in special_ids))
        known = tuple(token_id for token_id in dict.fromkeys(stop_ids) if token_id < model.vocab_size)
        params = msgspec.structs.replace(params, stop_token_ids=known)
    return Submit(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        sampling=params,
        output_token_ids=message.output_token_ids,
        priority=message.priority,
        images=[*images],
    )


def _names(message: Generate) -> None:
    """Check the names that a request gives itself: a line of a log can hold them."""
    caller_id, traceparent = message.caller_id, message.traceparent
    if len(caller_id) > MAX_CALLER_ID_CHARS or not caller_id.isprintable():
        limit = f"{MAX_CALLER_ID_CHARS} characters, all of them printable"
        told = shown(caller_id.encode("unicode_escape").decode())
        raise InvalidRequest(f"caller_id must be at most {limit}", field="caller_id", limit=limit, value=told)
    if traceparent and not TRACEPARENT.fullmatch(traceparent):
        limit = "as in 00-<32 hex digits>-<16 hex digits>-<2 hex digits>"
        told = shown(traceparent.encode("unicode_escape").decode())
        raise InvalidRequest(f"traceparent must be {limit}", field="traceparent", limit=limit, value=told)


def attached(message: Generate, num_bytes: int | None, max_model_len: int, text_bytes: int | None) -> None:
    """Check what a message says of the bytes attached before it, if any were: cheap, and before they are decoded.

    text_bytes: the longest text whose tokens can fit; None if that cannot be told.
    """
    kind = message.attached
    if kind is None:
        if num_bytes is not None:
            raise InvalidRequest(
                "bytes are attached to this stream, and attached does not say what they are",
                field="attached",
                limit=", ".join(ATTACHABLE),
            )
        return
    one_of("attached", kind, ATTACHABLE)
    if num_bytes is None:
        raise InvalidRequest("nothing is attached to this stream", field="attached", value=kind)
    _prompts_given(message)
    most = {"text": text_bytes, "token_ids": MAX_ID_BYTES * max_model_len}.get(kind)
    if most is not None and num_bytes > most + 5:
        raise InvalidRequest(
            f"{num_bytes} bytes of {kind} cannot fit a context of {max_model_len} tokens",
            field=kind,
            limit=f"{most} bytes",
            value=num_bytes,
        )


def _prompts_given(message: Generate) -> None:
    prompts = (message.text, message.messages, message.token_ids, message.attached)
    if prompts.count(None) != len(prompts) - 1:
        given = [name for name in (*ATTACHABLE, "attached") if getattr(message, name) is not None]
        raise InvalidRequest(
            "exactly one of text, messages, token_ids and attached is needed",
            field=given[1] if given else "text",
            limit="exactly one of text, messages, token_ids, attached",
            value=", ".join(given) or "none",
        )


def _sampling(params: SamplingParams, config: FrontendConfig, model: ModelInfo) -> None:
    _within("sampling.max_tokens", params.max_tokens, 1, math.inf)
    if params.min_tokens:
        _within("sampling.min_tokens", params.min_tokens, 0, params.max_tokens)
    if params.temperature:
        _within("sampling.temperature", params.temperature, 0.001, 100, or_zero=True)
    if params.top_k:
        _within("sampling.top_k", params.top_k, 0, model.vocab_size)
    if params.top_p != 1:
        _within("sampling.top_p", params.top_p, 0, 1, above=True)
    if params.min_p:
        _within("sampling.min_p", params.min_p, 0, 1)
    if params.repetition_penalty != 1:
        _within("sampling.repetition_penalty", params.repetition_penalty, 0.01, 100)
    if params.presence_penalty:
        _within("sampling.presence_penalty", params.presence_penalty, -2, 2)
    if params.frequency_penalty:
        _within("sampling.frequency_penalty", params.frequency_penalty, -2, 2)
    if params.n != 1:
        _within("sampling.n", params.n, 1, config.max_samples)
    if params.seed is not None:
        _within("sampling.seed", params.seed, 0, MAX_SEED)
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None:
            _within(f"sampling.{name}", count, 0, min(config.max_logprobs, model.vocab_size))
    if params.logit_bias:
        _count("sampling.logit_bias", params.logit_bias, config.max_logit_bias)
        token_ids("sampling.logit_bias", params.logit_bias, model.vocab_size)
        for token_id, bias in params.logit_bias.items():
            _within(f"sampling.logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS)
    if params.stop_token_ids:
        _count("sampling.stop_token_ids", params.stop_token_ids, config.max_stop_token_ids)
        token_ids("sampling.stop_token_ids", params.stop_token_ids, model.vocab_size)
    _masks(params, config, model)


def _masks(params: SamplingParams, config: FrontendConfig, model: ModelInfo) -> None:
    """Check what a token may be, as far as no tokenizer is needed; text/masks.py has the rest."""
    if params.allowed_token_ids:
        _count("sampling.allowed_token_ids", params.allowed_token_ids, config.max_allowed_token_ids)
        token_ids("sampling.allowed_token_ids", params.allowed_token_ids, model.vocab_size)
    if params.bad_words:
        _count("sampling.bad_words", params.bad_words, config.max_bad_words)
        for index, word in enumerate(params.bad_words):
            field = f"sampling.bad_words[{index}]"
            _within(field, len(word), 1, config.max_bad_word_chars, unit=" characters")
    if params.max_thinking_tokens is not None:
        _within("sampling.max_thinking_tokens", params.max_thinking_tokens, 0, math.inf)


def _stop_strings(
    stop: tuple[str, ...], config: FrontendConfig, model: ModelInfo, special_ids: Mapping[str, int]
) -> None:
    if stop and not model.has_tokenizer:
        what = "stop strings need a tokenizer; the served checkpoint has none"
        raise InvalidRequest(what, field="sampling.stop", limit="left out", value=", ".join(stop))
    _count("sampling.stop", stop, config.max_stop_strings)
    for index, string in enumerate(stop):
        field = f"sampling.stop[{index}]"
        _within(field, len(string), 1, config.max_stop_chars, unit=" characters")
        inside = () if string in special_ids else (token for token in special_ids if token in string)
        if (token := next(iter(inside), None)) is not None:
            raise InvalidRequest(
                f"{field} can never be found: it holds the special token {token}, which has no text. "
                f"{token} alone is a stop string, and its id a stop token",
                field=field,
                limit="a special token alone, or text without one",
                value=string,
            )


def _resume(message: Generate, model: ModelInfo) -> None:
    """A resumed generation is one sample, repeatable, and not over yet."""
    params, done = message.sampling, message.output_token_ids
    token_ids("output_token_ids", done, model.vocab_size)
    if params.n != 1:
        raise InvalidRequest("output_token_ids resume one sample", field="sampling.n", limit=1, value=params.n)
    if params.seed is None and params.temperature != 0:
        what = "a sampled generation resumes with its seed only"
        raise InvalidRequest(what, field="sampling.seed", limit=f"0 to {MAX_SEED}", value="null")
    if len(done) >= params.max_tokens:
        raise InvalidRequest(
            "the generation has already ended: max_tokens is reached",
            field="output_token_ids",
            limit=params.max_tokens - 1,
            value=len(done),
        )
    ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *model.eos_token_ids)
    if done[-1] in ends and len(done) >= params.min_tokens:
        raise InvalidRequest(
            "the generation has already ended: its last token stops it", field="output_token_ids", value=done[-1]
        )


def _within(
    field: str, value: float, low: float, high: float, *, above: bool = False, or_zero: bool = False, unit: str = ""
) -> None:
    """`value` must lie in low..high (or above `low`, if `above`; or be 0, if `or_zero`); NaN lies nowhere, and
    infinity is never meant."""
    if (low < value if above else low <= value) and value <= high and not math.isinf(value):
        return
    if or_zero and value == 0:
        return
    limit = f"{'more than ' if above else ''}{low} to {high}{unit}" if high != math.inf else f"at least {low}{unit}"
    limit = f"0, or {limit}" if or_zero else limit
    raise InvalidRequest(f"{field} is {value}{unit}, allowed: {limit}", field=field, limit=limit, value=value)


def token_ids(field: str, token_ids: Sequence[int] | dict[int, float], vocab_size: int) -> None:
    """Raise InvalidRequest for an id, of one or more, that the vocabulary does not have."""
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequest(
            f"{field} holds token id {wrong}, outside the vocabulary of {vocab_size}",
            field=field,
            limit=f"0 to {vocab_size - 1}",
            value=wrong,
        )


def _no_images(token_ids: list[int], image_token_ids: Collection[int]) -> None:
    for token_id in image_token_ids:
        if token_id in token_ids:
            raise unpaired(token_ids.index(token_id), token_id)
