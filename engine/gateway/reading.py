"""Rules, results and steps that reading a body has in common for all endpoints."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from cierzo.engine.errors import CierzoError, InvalidRequest, NotFound
from cierzo.engine.frontend.bounds import missing, must_be, shown
from cierzo.engine.gateway.fields import Sieve, Table, at
from cierzo.engine.gateway.json_body import read_object
from cierzo.engine.messages import ModelInfo

Endpoint = Literal["chat", "completions", "fim", "responses"]
_is_token_id = re.compile("0|[1-9][0-9]{0,18}").fullmatch  # as JSON writes an integer: each id in one way
_in_a_function = re.compile(
    r"((?:messages\[\d+\]\.tool_calls|tools)\[\d+\])\.(name|arguments|description|parameters|strict)"
)


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and names that a body is held against.

    names: of the served model, beside `model.name`. lenient: unknown fields are passed over, and named.
    image_hosts: that images may be fetched from.
    """

    model: ModelInfo
    names: tuple[str, ...] = ()
    lenient: bool = False
    max_depth: int = 64
    max_turns: int = 4096
    max_prompts: int = 128
    image_hosts: tuple[str, ...] = ()


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request: what its body asks of the engine, and of the answer.

    arguments: keywords of `Client.generate`; `deltas` among them follows `stream`. model: its name, as the body has
    it. given: what the body says and is served, by its own names, for answers that repeat it.
    continuous_usage: the usage in each event. echo: the prompt comes before the answer. drops_output: the answer's
    own token, of which the engine makes at least one, is not wanted. as_token_ids: token_id:17 stands for the text
    of a token. passed_over: names of fields that were not looked at, fit for a header.
    places: fields as the engine names them -> as the body does, for `in_body`. fetches: of images that have to be
    fetched before the engine is asked, the places in the body, and the addresses.
    """

    endpoint: Endpoint
    arguments: dict[str, Any]
    model: str
    given: dict[str, Any]
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    drops_output: bool = False
    as_token_ids: bool = False
    passed_over: tuple[str, ...] = ()
    places: dict[str, str] = {}
    fetches: tuple[tuple[str, str], ...] = ()

    @property
    def logprobs(self) -> int | None:
        """Alternatives beside each token of the answer; None: no log-probabilities."""
        return self.arguments.get("logprobs")

    @property
    def prompt_logprobs(self) -> int | None:
        """Alternatives beside each token of the prompt; None: no log-probabilities."""
        return self.arguments.get("prompt_logprobs")


class Body:
    """A body of one endpoint, held against its table: what it gives, to be made into `Asked`.

    given: the fields that are served. arguments, places, fetches: as of `Asked`, as far as names alone tell.
    """

    def __init__(self, endpoint: Endpoint, body: bytes, rows: Table, rules: Rules) -> None:
        self.endpoint = endpoint
        self.rules = rules
        self.sieve = Sieve(rules.lenient)
        self.given = self.sieve.served(read_object(body, rules.max_depth), rows)
        self.model = self._model()
        self.places: dict[str, str] = {}
        self.fetches: list[tuple[str, str]] = []
        self.arguments = self._arguments(rows)

    def need(self, name: str) -> Any:
        """A field that must be there. Raises InvalidRequest if it is not."""
        if name not in self.given:
            raise missing(name)
        return self.given[name]

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A field that is true or false. Raises InvalidRequest for anything else."""
        value = self.given.get(name, default)
        if not isinstance(value, bool):
            raise must_be(name, "true or false", value)
        return value

    def integer(self, name: str) -> int | None:
        """A field that is an integer. Raises InvalidRequest for anything else."""
        value = self.given.get(name)
        if value is not None and type(value) is not int:
            raise must_be(name, "an integer", value)
        return value

    def asked(self, **what: Any) -> Asked:
        """All of it. Raises InvalidRequest for options of a stream where none is asked for."""
        stream, options = self.flag("stream"), self.given.get("stream_options", {})
        if options and not stream:
            raise must_be("stream_options", "left out, unless stream is true", options)
        for name, value in options.items():
            if not isinstance(value, bool):
                raise must_be(f"stream_options.{name}", "true or false", value)
        return Asked(
            endpoint=self.endpoint,
            arguments={**self.arguments, "deltas": stream},
            model=self.model,
            given=self.given,
            stream=stream,
            include_usage=options.get("include_usage", False),
            continuous_usage=options.get("continuous_usage_stats", False),
            as_token_ids=self.flag("return_tokens_as_token_ids"),
            passed_over=self.sieve.passed_over,
            places=self.places,
            fetches=tuple(self.fetches),
            **what,
        )

    def _model(self) -> str:
        """The name by which the served model is asked for. Raises NotFound for another one."""
        names = (*self.rules.names, self.rules.model.name)
        name = self.given.get("model", names[0])
        if name in names:
            return name
        if not isinstance(name, str):
            raise must_be("model", "a name", name)
        limit = ", ".join(names)
        raise NotFound(
            f"there is no model {shown(name)!r}; served: {limit}", field="model", limit=limit, value=shown(name)
        )

    def _arguments(self, rows: Table) -> dict[str, Any]:
        """The fields that are arguments as they are. Raises InvalidRequest where two disagree about one."""
        found: dict[str, Any] = {}
        for name, value in self.given.items():
            argument = rows[name].argument
            if not argument:
                continue
            if argument in found and found[argument] != value:
                other = next(one for one in self.given if rows[one].argument == argument)
                what = f"{name} and {other} say different things"
                raise InvalidRequest(what, field=name, limit=f"as {other}, or left out", value=shown(value))
            if argument == "logit_bias":
                value = _biases(value)
            elif (argument, value) == ("top_k", -1):
                value = 0
            found[argument] = value
            if name != argument:
                self.places[f"sampling.{argument}"] = self.places[argument] = name
        return found


def _biases(value: Any) -> Any:
    """The biases by token id, which JSON can write as text alone."""
    if not isinstance(value, dict):
        return value
    for name in value:
        if not _is_token_id(name):
            limit = "token ids as names"
            what = f"logit_bias has the name {shown(name)!r}, allowed: {limit}"
            raise InvalidRequest(what, field="logit_bias", limit=limit, value=shown(name))
    return {int(name): bias for name, bias in value.items()}


def in_body(error: CierzoError, asked: Asked) -> CierzoError:
    """The error with the field as the body names it: max_completion_tokens, where the engine says
    sampling.max_tokens."""
    field = error.field
    if field is None or (place := _place(field, asked)) == field:
        return error
    told = copy.copy(error)
    told.field = place
    told.message = re.sub(rf"(?<![\w.]){re.escape(field)}(?!\w)", lambda _: place, error.message)
    told.args = (told.message,)
    return told


def _place(field: str, asked: Asked) -> str:
    for head in _heads(field):
        if head in asked.places:
            return asked.places[head] + field[len(head) :]
    if asked.endpoint == "chat":
        return _in_a_function.sub(r"\1.function.\2", field, count=1).removeprefix("sampling.")
    return field.removeprefix("sampling.")


def _heads(field: str) -> Iterator[str]:
    """The field itself, then what it is within, step by step."""
    yield field
    yield from (field[: found.start()] for found in reversed([*re.finditer(r"[.\[]", field)]))


def text(place: str, values: Mapping[str, Any], name: str) -> str:
    """A text of an object at `place`. Raises InvalidRequest for anything else, or if it is missing."""
    field = at(place, name)
    if name not in values:
        raise missing(field)
    if not isinstance(values[name], str):
        raise must_be(field, "a text", values[name])
    return values[name]


def sequence(value: Any, place: str) -> list[Any]:
    """A list. Raises InvalidRequest for anything else."""
    if not isinstance(value, list):
        raise must_be(place, "a list", value)
    return value


def entries(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The entries of a list, each behind its place. Raises InvalidRequest for what is no list."""
    for number, entry in enumerate(sequence(value, place)):
        yield f"{place}[{number}]", entry
