"""Tenants: whose requests they are, what each may have of the server, and what a connection may ask for."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
from msgspec import Meta

RIGHTS = ("drain", "experts", "stats")  # what belongs to nobody's own requests
DEFAULT = "default"  # the tenant of whoever has no key
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
NO_LIMIT = sys.maxsize


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A service, or a group of them, that is one party where the server is shared.

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
    max_model_len: Annotated[int, Meta(ge=1)] = NO_LIMIT
    min_priority: int = -NO_LIMIT
    max_priority: int = NO_LIMIT


class Access(msgspec.Struct, frozen=True):
    """Who a connection is of, and the RIGHTS that it has."""

    tenant: Tenant = Tenant()
    rights: frozenset[str] = frozenset(RIGHTS)


EVERYBODY = Access()
