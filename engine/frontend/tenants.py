"""Tenants: whose requests they are, what each may have of the server, and what a connection may ask for."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Right = Literal["drain", "experts", "stats"]  # to what belongs to nobody's own requests
RIGHTS: tuple[Right, ...] = ("drain", "experts", "stats")
DEFAULT = "default"  # the tenant of whoever has no key
NAME_LIMIT = "1 to 64 letters, digits, dots, underscores and hyphens, the first of them a letter or digit"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
Name = Annotated[str, Meta(pattern=NAME)]
NO_LIMIT = sys.maxsize


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"name": "tenant"}):
    """A service, or several that count as one where the server is shared; a line of the key file, which names it by
    "tenant".

    weight: its share of the model's work beside those of others. cache_group: tenants of the same group share the
    prefix cache; "": nobody shares with it. The limits are of all its connections together: requests that are open,
    prompt and resumed tokens of these, tokens of prompts and answers in a minute, prompt and output tokens of one
    answer. Priorities of its requests lie from min_priority to max_priority.
    """

    name: Name = DEFAULT
    weight: Annotated[float, Meta(ge=0.001, le=1000)] = 1.0
    cache_group: Annotated[str, Meta(max_length=64)] = ""
    max_requests: Annotated[int, Meta(ge=1)] = NO_LIMIT
    max_open_tokens: Annotated[int, Meta(ge=1)] = NO_LIMIT
    max_tokens_per_minute: Annotated[int, Meta(ge=1)] = NO_LIMIT
    max_model_len: Annotated[int, Meta(ge=2)] = NO_LIMIT
    min_priority: int = -NO_LIMIT
    max_priority: int = NO_LIMIT

    @property
    def cache_salt(self) -> bytes:
        """The salt of its blocks in the prefix cache: tenants with the same one share them. Empty for the default
        tenant alone, so that a server without keys has one cache."""
        if self.cache_group:
            return b"group:" + self.cache_group.encode()
        return b"" if self.name == DEFAULT else b"tenant:" + self.name.encode()


class Access(msgspec.Struct, frozen=True):
    """Who a connection is of, and the rights that it has."""

    tenant: Tenant = Tenant()
    rights: frozenset[Right] = frozenset(RIGHTS)


EVERYBODY = Access()  # of a server without a key file


class Visitor(msgspec.Struct, frozen=True):
    """Evidence that a connection shows of itself: the digest of its key, the name in its certificate ("" for none),
    and whether it comes from this machine."""

    key_digest: bytes = b""
    certificate: str = ""
    is_local: bool = False
