"""Typed access to a checkpoint's JSON: every complaint names file, field, value and what would do."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from cierzo.engine.checkpoint_file import require_file
from cierzo.engine.errors import CheckpointError

_log = logging.getLogger(__name__)

_REQUIRED: Any = object()


@contextmanager
def naming_unreadable(folder: Path) -> Iterator[None]:
    """Turn an OSError inside (no permission, a path too long) into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        path = Path(error.filename or folder)
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", field=path.name) from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError when there is none."""
    try:
        require_file(file)
        content = msgspec.json.decode(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} is no checkpoint: it has no {file.name}", field=file.name) from None
    except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", field=file.name) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object", field=file.name)
    return content


class Fields:
    """A JSON object. A field without a `default` must be there."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "", file: str = "config.json") -> None:
        self._values = dict(values)
        self._prefix = prefix
        self._file = file
        self._inherited: dict[str, str] = {}  # field -> what it is called in the file
        self._read: set[str] = set()
        self._sections: dict[str, Fields] = {}

    def error(self, name: str, value: object, expected: str) -> CheckpointError:
        """`name` is not what this engine can run."""
        field = self._field(name)
        return CheckpointError(
            f"{self._file}: {field} is {value!r}, must be {expected}", field=field, limit=expected, value=value
        )

    def inherit(self, outer: Fields, *names: str) -> None:
        """Take `names` from the enclosing object where it has them: they describe the whole model."""
        for name in names:
            if outer._values.get(name) is not None:
                self._values[name] = outer._values[name]
                self._inherited[name] = outer._field(name)

    def fill_in(self, defaults: Mapping[str, Any]) -> None:
        """Give each field that is missing its value in `defaults`. An object that is null counts as missing."""
        for name, value in defaults.items():
            if name not in self._values or (isinstance(value, dict) and self._values[name] is None):
                self._values[name] = value

    def unread(self) -> list[str]:
        """The fields that nobody has asked for so far, in the file's order."""
        return [name for name in self._values if name not in self._read]

    def refuse_unread(self, harmless: Container[str]) -> None:
        """Raise CheckpointError for a field, in this object or a section that was read, that nobody has asked for:
        whoever wrote it may mean other arithmetic. A null says nothing. harmless: names with those of their
        sections, "moe.expert_parallel"."""
        for name in self.unread():
            if self._field(name) not in harmless and self._values[name] is not None:
                raise self.error(name, self._values[name], "left out: it is unknown, and may change the arithmetic")
        for section in self._sections.values():
            section.refuse_unread(harmless)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The raw value; null counts as a value."""
        self._read.add(name)
        if name in self._values:
            return self._values[name]
        if default is _REQUIRED:
            field = self._field(name)
            raise CheckpointError(f"{self._file}: {field} is missing", field=field)
        return default

    def section(self, name: str) -> Fields:
        """A nested object."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return self._sections.setdefault(name, Fields(value, f"{self._prefix}{name}.", self._file))

    def optional_section(self, name: str) -> Fields:
        """A nested object; an empty one where it is null or missing."""
        return self.section(name) if self.has(name) else Fields({}, f"{self._prefix}{name}.", self._file)

    def integer(self, name: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        """An integer of at least `minimum`."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(name, value, f"an integer of at least {minimum}")
        return value

    def optional_integer(self, name: str, default: Any = _REQUIRED, minimum: int = 1) -> int | None:
        """An integer, or null."""
        return None if self.get(name, default) is None else self.integer(name, default, minimum)

    def even(self, name: str) -> int:
        """A positive even integer."""
        value = self.integer(name)
        if value % 2:
            raise self.error(name, value, "an even number")
        return value

    def number(self, name: str, default: Any = _REQUIRED, minimum: float = -math.inf) -> float:
        """A finite number of at least `minimum`."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, value, "a number")
        if not math.isfinite(value) or value < minimum:
            raise self.error(name, value, f"a finite number of at least {minimum}")
        return float(value)

    def boolean(self, name: str, default: Any = _REQUIRED) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def string(self, name: str, default: Any = _REQUIRED) -> str:
        """A text."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.error(name, value, "a string")
        return value

    def only(self, name: str, supported: Sequence[Any], default: Any = _REQUIRED) -> None:
        """The field must have one of the `supported` values: others change the arithmetic."""
        value = self.get(name, default)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in supported):
            raise self.error(name, value, " or ".join(_json(one) for one in supported) + " (others unsupported)")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """A token id, a list of them, or nothing. An id beyond the vocabulary is left out, and the log says so: no
        step can choose it, so that nothing is lost, but as an index into the logits it would do harm."""
        value = self.get(name, None)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in listed):
            raise self.error(name, value, "a token id or a list of token ids")
        for token_id in listed:
            if token_id >= vocab_size:
                what = f"{self._file}: {self._field(name)}"
                _log.info("%s holds %d, which a vocabulary of %d lacks: it is left out", what, token_id, vocab_size)
        return tuple(token_id for token_id in listed if token_id < vocab_size)

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """A token id, or null; also None where it lies beyond the vocabulary."""
        if self.optional_integer(name, default=None, minimum=0) is None:
            return None
        return next(iter(self.token_ids(name, vocab_size)), None)

    def _field(self, name: str) -> str:
        return self._inherited.get(name, self._prefix + name)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
