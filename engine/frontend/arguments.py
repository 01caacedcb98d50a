"""A caller's arguments, made into the `Generate` message that asks for them: the same for `Client` and `LLM`.

Numbers, arrays and tensors of other libraries are taken for the values that they hold, any iterable for a list.
A value that no message can carry is refused here, where the caller stands, and not where messages are packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from os import PathLike
from typing import Any, cast

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend import foreign
from cierzo.engine.frontend.absent import absent
from cierzo.engine.frontend.bounds import shown, too_deep
from cierzo.engine.frontend.client_options import GenerateArguments, TokenizeArguments
from cierzo.engine.frontend.wire_checks import mistyped
from cierzo.engine.messages import ChatMessage, Detokenize, Generate, SamplingParams, Tokenize
from cierzo.engine.text.unicode import refuse_surrogates

LOWEST_INT, HIGHEST_INT = -(2**63), 2**64 - 1  # MessagePack has no others
_BYTES = bytes | bytearray | memoryview
_AS_THEY_ARE = {type(None), bool, float}
_DEFAULTS = msgspec.structs.asdict(SamplingParams())
_TUPLES = {"stop", "stop_token_ids", "bad_words", "allowed_token_ids"}  # one alone is taken too
_FIELDS = dict.fromkeys(name for name in Generate.__struct_fields__ if name not in ("stream", "attached"))
_OF_TOKENIZE = Tokenize.__struct_fields__[1:]  # behind the stream


def whole_answer(arguments: GenerateArguments) -> GenerateArguments:
    """The arguments of `generate` for an answer that comes at once. Raises InvalidRequest if they want deltas."""
    if arguments.get("deltas"):
        what = "an answer that comes at once has no deltas; generate gives some"
        raise InvalidRequest(what, field="deltas", limit="false, or left out", value=arguments["deltas"])
    return {**arguments, "deltas": False}


def generate_message(**arguments: Any) -> Generate:
    """The message that asks for `arguments`: fields of Generate, and fields of SamplingParams on top of `sampling`.

    The message's stream id is 0, for the sender to replace. Raises InvalidRequest, with field and value, for an
    unknown name, a value of a wrong type, and a value that no message can carry. `validate` checks limits.
    """
    message: dict[str, Any] = {"type": "generate", "stream": 0}
    params: dict[str, Any] = {}
    name = "sampling"
    try:
        for name, value in arguments.items():
            if name not in _FIELDS:
                params[name] = value
            elif value is not None and name != "sampling":
                message[name] = _value(name, value)
        sampling = _sampling_fields(arguments.get("sampling"), params, also_known=_FIELDS)
        message["sampling"] = {
            name: _plain(value, f"sampling.{name}")
            for name, value in sampling.items()
            if value is not _DEFAULTS[name]
        }
        return msgspec.convert(message, Generate)
    except msgspec.ValidationError as error:
        raise mistyped(str(error), message) from error
    except RecursionError as error:
        raise too_deep(name) from error


def tokenize_arguments(arguments: Mapping[str, Any]) -> TokenizeArguments:
    """The arguments of `tokenize` among these, of which others may be those of `generate`."""
    return cast(TokenizeArguments, {name: arguments[name] for name in _OF_TOKENIZE if name in arguments})


def tokenize_message(*, special_tokens: Any = True, control_tokens: Any = False, **arguments: Any) -> Tokenize:
    """The message that asks for the tokens of a prompt; as `generate_message`."""
    for name in arguments:
        if name not in _OF_TOKENIZE:
            raise _unknown(name, arguments[name], _OF_TOKENIZE)
    prompt = generate_message(**arguments)
    return Tokenize(
        stream=0,
        text=prompt.text,
        messages=prompt.messages,
        tools=prompt.tools,
        reasoning_effort=prompt.reasoning_effort,
        special_tokens=_flag("special_tokens", special_tokens),
        control_tokens=_flag("control_tokens", control_tokens),
    )


def detokenize_message(token_ids: Any, control_tokens: Any = False, *, pieces: bool = False) -> Detokenize:
    """The message that asks for the text of tokens; as `generate_message`."""
    tokens = [] if token_ids is None else generate_message(token_ids=token_ids).token_ids
    control_tokens = _flag("control_tokens", control_tokens)
    return Detokenize(stream=0, token_ids=tokens or [], control_tokens=control_tokens, pieces=pieces)


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise InvalidRequest(f"{name}: expected bool, got {_kind(value)}", field=name, limit="bool", value=shown(value))


def sampling_params(base: Any, params: Mapping[str, Any]) -> SamplingParams:
    """`base` (SamplingParams, a mapping of its fields, or None) with the fields in `params` on top.

    Values are not checked. Raises InvalidRequest for another kind of `base`, and for a name that is no field, with
    the nearest one that is.
    """
    return SamplingParams(**_sampling_fields(base, params))


def _sampling_fields(base: Any, params: Mapping[str, Any], also_known: Iterable[str] = ()) -> dict[str, Any]:
    """As `sampling_params`, the fields alone; the nearest name may also be one of `also_known`."""
    if isinstance(base, SamplingParams):
        base = msgspec.structs.asdict(base)
    elif base is None:
        base = {}
    elif not isinstance(base, Mapping):
        kinds = "SamplingParams, or a mapping of its fields"
        raise InvalidRequest(
            f"sampling must be {kinds}, got {_kind(base)}", field="sampling", limit=kinds, value=_kind(base)
        )
    given = {**base, **params}
    for name in given:
        if name not in _DEFAULTS:
            raise _unknown(name, given[name], (*also_known, *_DEFAULTS))
    for name in _TUPLES.intersection(given):
        given[name] = getattr(SamplingParams(**{name: given[name]}), name)
    return given


def _unknown(name: object, value: object, known: Iterable[str]) -> InvalidRequest:
    if reason := absent(str(name)):
        return InvalidRequest(reason, field=str(name), limit="left out", value=shown(value))
    import difflib  # seldom needed, and a client is to start fast

    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
    what = f"unknown argument {name!r}; {hint}"
    return InvalidRequest(what, field=str(name), limit=", ".join(known), value=shown(value))


def _value(name: str, value: Any) -> Any:
    """The plain value of a field of Generate; of messages and tools also as other interfaces write them, and one
    message or image alone as a list."""
    if name == "images":
        several = isinstance(value, Iterable) and not isinstance(value, str | _BYTES | set | Mapping)
        files = [(f"images[{number}]", each) for number, each in enumerate(value)] if several else [(name, value)]
        return [_file(each, field) for field, each in files]
    alone = name == "messages" and isinstance(value, Mapping | ChatMessage)
    plain = _plain([value] if alone else value, name)
    if name == "tool_choice":
        return foreign.tool_choice(plain)
    if name == "grammar":
        return foreign.grammar(plain)
    if name not in ("messages", "tools") or not isinstance(plain, list):
        return plain
    flat = foreign.turn if name == "messages" else foreign.tool
    return [flat(each, f"{name}[{number}]") for number, each in enumerate(plain)]


def _file(value: Any, field: str) -> bytes:
    """The bytes of a file. No path is opened: whose it would be, nobody knows."""
    if isinstance(value, _BYTES):
        return bytes(value)
    limit = "the bytes of a file"
    what = f"{field}: expected {limit}, got {_kind(value)}"
    if isinstance(value, str | PathLike):
        what += "; no path or URL is opened: read it, as by Path(...).read_bytes()"
    elif hasattr(value, "save"):
        what += "; save it as a PNG into a BytesIO, whose getvalue() are such bytes"
    raise InvalidRequest(what, field=field, limit=limit, value=shown(value))


def _plain(value: Any, field: str) -> Any:
    """`value` in types that MessagePack has; whether they are the right ones is for `msgspec.convert` to say."""
    kind = type(value)
    if kind in _AS_THEY_ARE or (kind is int and LOWEST_INT <= value <= HIGHEST_INT):
        return value
    if isinstance(value, str):
        return _text(value, field)
    if isinstance(value, int):
        return _integer(value, field)
    if isinstance(value, float):
        return float(value)
    if not isinstance(value, list):
        if isinstance(value, _BYTES):  # iterable, but never meant as a list of integers
            return bytes(value)
        if isinstance(value, msgspec.Struct):
            tag = value.__struct_config__.tag
            value = ({} if tag is None else {"type": tag}) | msgspec.structs.asdict(value)
        if isinstance(value, Mapping):
            return dict(_entry(key, item, field) for key, item in value.items())
        if isinstance(value, set | frozenset):
            message = f"{field} is a set, which has no order"
            raise InvalidRequest(message, field=field, limit="a list", value=_kind(value))
        inner = held(value, field)
        return _plain(list(value) if inner is value else inner, field)
    if value and set(map(type, value)) == {int}:  # a long prompt: quickly
        _integer(min(value), field)
        _integer(max(value), field)
        return value
    return [_plain(item, f"{field}[{number}]") for number, item in enumerate(value)]


def held(value: Any, field: str) -> Any:
    """The value of an array, tensor or number of another library; other iterables as they are.

    Raises InvalidRequest for what is neither a number nor iterable.
    """
    try:
        if hasattr(value, "tolist") and type(inner := value.tolist()) is not type(value):  # numpy, torch, array
            return inner
        if isinstance(value, Iterable):
            return value
        return index(value) if hasattr(value, "__index__") else float(value)
    except RecursionError:
        raise
    except Exception as error:  # raised by other people's code: a tensor without storage, say
        raise InvalidRequest(
            f"{field} is an object of type {_kind(value)}, which no message can carry",
            field=field,
            limit="text, numbers, lists and mappings",
            value=_kind(value),
        ) from error


def _entry(key: Any, value: Any, field: str) -> tuple[Any, Any]:
    place = f"{field}.{key}" if isinstance(key, str) else f"{field}[{shown(key)}]"
    plain = _plain(key, place)
    if isinstance(plain, list | dict):
        raise InvalidRequest(f"{place} has a key of type {_kind(key)}", field=place, value=_kind(key))
    return plain, _plain(value, place)


def _text(value: str, field: str) -> str:
    if not value.isascii():
        refuse_surrogates(field, value)
    return str.__str__(value)  # also of a subclass, such as an enumeration's member


def _integer(value: int, field: str) -> int:
    if LOWEST_INT <= value <= HIGHEST_INT:
        return int(value)
    limit, told = "-2^63 to 2^64 - 1", shown(value)
    raise InvalidRequest(f"{field} is {told}, allowed: {limit}", field=field, limit=limit, value=told)


def _kind(value: Any) -> str:
    return type(value).__name__
