"""JSON schemas at random: all that llguidance says it can do, within each other. A seed makes one again."""

from __future__ import annotations

from random import Random
from typing import Any

Schema = dict[str, Any]
NAMES = ("a", "b", "name", "größe", "x y", 'quo"te', "back\\slash", "id", "", "tab\t", "日本", "items")
TEXTS = ("", "red", "green", "blue", "ja", "nein", 'a "b"', "\\", "\n", "ñ", "😀", "null", "1")
PATTERNS = (
    *("^[a-c]+$", "^[0-9]{2,4}$", "^a|b$", "[xyz]", "^(foo|bar)(-[a-z]{1,3})?$", "^\\d\\d:\\d\\d$", "^.{2,3}$"),
    *("^\\w+@\\w+\\.de$", "ü", "^[^a-z]*$", "^$", "a.c", "^\\s?x", '^"+$', "^\\\\$", "^[\\u00e0-\\u00ff]{1,2}$"),
)
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration")


class Schemas:
    """Makes schemas. depth: of schemas within each other."""

    def __init__(self, seed: int, depth: int = 3) -> None:
        self._random = Random(seed)
        self._depth = depth
        self._names: list[str] = []

    def schema(self) -> Schema:
        """A schema that stands for itself, with definitions that refer to each other, and to themselves."""
        names = self._random.sample(["tree", "leaf", "pair"], self._random.randrange(3))
        self._names = names
        found = self._any(self._depth)
        if names:
            found = {**found, "$defs": {name: self._defined(name) for name in names}}
        return found

    def _defined(self, name: str) -> Schema:
        if name == "tree":  # within itself, and yet of any depth
            inner = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
            return {
                "type": "object",
                "properties": {"v": self._any(0), "children": inner},
                "required": ["v"],
                "additionalProperties": False,
            }
        return self._any(1)

    def _any(self, depth: int) -> Schema:
        makers = [self._string, self._integer, self._number, self._enum, self._const, self._plain]
        if self._names:
            makers.append(self._ref)
        if depth > 0:
            makers += [self._object, self._object, self._array, self._tuple, self._union, self._both]
            return self._random.choice(makers)(depth) | self._told()
        return self._random.choice(makers)(depth)

    def _told(self) -> Schema:
        """What says nothing of values."""
        told = {"title": "T", "description": "D", "default": None, "examples": [1], "$comment": "c", "x-ours": {}}
        return dict(self._random.sample([*told.items()], self._random.choice([0, 0, 0, 1, 2])))

    def _plain(self, depth: int) -> Schema:
        kinds = ["string", "integer", "number", "boolean", "null"]
        kinds += ["array", "object"] if depth > 1 else []
        if self._random.random() < 0.3:
            return {"type": self._random.sample(kinds, 2)}
        return {"type": self._random.choice(kinds)}

    def _string(self, depth: int) -> Schema:
        match self._random.randrange(4):
            case 0:
                return {"type": "string", "pattern": self._random.choice(PATTERNS)}
            case 1:
                return {"type": "string", "format": self._random.choice(FORMATS)}
            case 2:
                low = self._random.randrange(4)
                return {"type": "string", "minLength": low, "maxLength": low + self._random.randrange(5)}
            case _:
                return {
                    "type": "string",
                    self._random.choice(["minLength", "maxLength"]): self._random.randrange(6),
                }

    def _bounds(self, values: list[float]) -> Schema:
        low, high = sorted(self._random.sample(values, 2))
        kind = self._random.choice(["minimum", "exclusiveMinimum", ""])
        found = {kind: low} if kind else {}
        kind = self._random.choice(["maximum", "exclusiveMaximum", ""])
        return found | ({kind: high} if kind else {})

    def _integer(self, depth: int) -> Schema:
        if self._random.random() < 0.3:
            return {"type": "integer", "multipleOf": self._random.choice([2, 3, 7, 10]), "minimum": 0}
        return {"type": "integer"} | self._bounds([-1000, -17, -2, 0, 3, 9, 10, 99, 2**31])

    def _number(self, depth: int) -> Schema:
        return {"type": "number"} | self._bounds([-1000.5, -1, -0.25, 0, 0.125, 1, 9.75, 100, 1e6])

    def _enum(self, depth: int) -> Schema:
        values = [*TEXTS, *range(-2, 3), 1.5, 1e10, True, False, None, [1, "a"], {"a": [None], "b": {}}, []]
        return {"enum": self._random.sample(values, self._random.randint(1, 6))}

    def _const(self, depth: int) -> Schema:
        return {"const": self._random.choice([*TEXTS, 0, -1.25, True, None, [], {}, [[1], {"b": 1, "a": 2}]])}

    def _ref(self, depth: int) -> Schema:
        return {"$ref": f"#/$defs/{self._random.choice(self._names)}"}

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(NAMES, self._random.randrange(5))
        found: Schema = {"type": "object", "properties": {name: self._any(depth - 1) for name in names}}
        if required := [name for name in names if self._random.random() < 0.5]:
            self._random.shuffle(required)
            found["required"] = required
        match self._random.randrange(5):
            case 0 | 1:
                found["additionalProperties"] = False
            case 2:
                found["additionalProperties"] = self._any(0)
            case 3:
                found |= {"patternProperties": {"^p[0-9]$": self._any(0)}, "additionalProperties": False}
        if self._random.random() < 0.1:
            found[self._random.choice(["minProperties", "maxProperties"])] = self._random.randint(1, 3)
        if self._random.random() < 0.1 and found.get("additionalProperties", True) is not False:
            found["required"] = [*found.get("required", []), "unlisted"]
        return found

    def _array(self, depth: int) -> Schema:
        found: Schema = {"type": "array", "items": self._any(depth - 1)}
        low = self._random.randrange(3)
        found |= {"minItems": low} if self._random.random() < 0.5 else {}
        return found | ({"maxItems": low + self._random.randrange(3)} if self._random.random() < 0.5 else {})

    def _tuple(self, depth: int) -> Schema:
        found: Schema = {"type": "array", "prefixItems": [self._any(depth - 1) for _ in range(2)]}
        found |= {"items": self._random.choice([False, True, self._any(0)])} if self._random.random() < 0.7 else {}
        return found | ({"minItems": self._random.randrange(3)} if self._random.random() < 0.5 else {})

    def _union(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth - 1) for _ in range(self._random.randint(1, 3))]}

    def _both(self, depth: int) -> Schema:
        """What holds several schemas at once."""
        match self._random.randrange(3):
            case 0:
                return {"allOf": [self._object(1), {"type": "object", "required": ["a"]}]}
            case 1:
                return {"type": "integer", "minimum": -5, "allOf": [{"maximum": 5}, {"minimum": -3}]}
            case _:
                return {"type": "string", "minLength": 1, "allOf": [{"maxLength": 4}]}
