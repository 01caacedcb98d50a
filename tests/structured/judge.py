"""What a schema's answers are held against: jsonschema, by the draft that the schema says it is of."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
from jsonschema import FormatChecker

# llguidance takes these by their form alone: the 29 of February of every year, the 60th second of every minute.
FORMS = FormatChecker(("uuid", "ipv4", "ipv6", "email"))


class CannotJudge(Exception):
    """A schema with a pattern that Python does not read, as with \\p{L}."""


def fault(schema: Any, text: str) -> str:
    """What is wrong with an answer; "" for nothing. Raises CannotJudge."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"no JSON: {error}"
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        error = next(kind(schema, format_checker=FORMS).iter_errors(value), None)
    except re.error as raised:
        raise CannotJudge(str(raised)) from raised
    return "" if error is None else f"{error.json_path}: {error.message[:200]}"
