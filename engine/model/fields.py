"""Typed access to a checkpoint's JSON: every complaint names file, field, value and what would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from cierzo.engine.errors import CheckpointError

_REQUIRED: Any = object()


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError when there is none."""
    try:
        content = msgspec.json.decode(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} is no checkpoint: it has no {file.name}", field=file.name) from None
    except (OSError, UnicodeDecodeError, RecursionError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", field=file.name) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object", field=file.name)
    return content


class Fields:
    """One JSON object. A field without a `default` must be there."""

    def __init__(self, values: dict[str, Any], prefix: str = "", file: str = "config.json") -> None:
        self._values = dict(values)
        self._prefix = prefix
        self._file = file

    def error(self, name: str, value: object, expected: str) -> CheckpointError:
        """`name` is not what this engine can run."""
        field = self._prefix + name
        return CheckpointError(
            f"{self._file}: {field} is {value!r}, must be {expected}", field=field, limit=expected, value=value
        )

    def inherit(self, outer: Fields, *names: str) -> None:
        """Take `names` from the enclosing object where it has them: they describe the whole model."""
        for name in names:
            if outer._values.get(name) is not None:
                self._values[name] = outer._values[name]

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The raw value; null counts as a value."""
        if name in self._values:
            return self._values[name]
        if default is _REQUIRED:
            field = self._prefix + name
            raise CheckpointError(f"{self._file}: {field} is missing", field=field)
        return default

    def section(self, name: str) -> Fields:
        """A nested object."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return Fields(value, f"{self._prefix}{name}.", self._file)

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

    def ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.get(name, None)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in listed):
            raise self.error(name, value, "a token id or a list of token ids")
        return tuple(listed)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
