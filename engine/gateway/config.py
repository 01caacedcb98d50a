"""Settings of the HTTP door. Every limit is enforced, and told by name in the error past it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cierzo.engine.errors import ConfigError, refusal
from cierzo.engine.frontend.address import parse_address

Reasoning = Literal["reasoning_content", "thinking"]


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where HTTP is served, to whom, and within which limits. The descriptions are the command line's help."""

    http: Annotated[str, Meta(description='"HOST:PORT" or "unix:PATH" of the HTTP door; none: there is none')] = ""
    http_host: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="name by which HTTP clients may call this machine, beside its own address and loopback"),
    ] = ()
    cors_origin: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="origin (https://name) whose web pages may call; none: no other site's"),
    ] = ()
    served_model_name: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="name that requests may call the model by, beside its own; the first is told"),
    ] = ()
    reasoning_format: Annotated[
        Reasoning, Meta(description="how thoughts are told: a field of their own, or Mistral's thinking chunks")
    ] = "reasoning_content"
    lenient: Annotated[
        bool, Meta(description="pass over request fields that are not known, and name them in a header")
    ] = False
    allow_image_hosts: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?$")], ...],
        Meta(description="host (name, or name:port) that images are fetched from for clients; none: nowhere"),
    ] = ()
    max_fetched_bytes: Annotated[int, Meta(ge=1, description="bytes of an image that is fetched")] = (
        20 * 1024 * 1024
    )
    max_body_bytes: Annotated[int, Meta(ge=1024, description="longest body of an HTTP request, bytes")] = (
        16 * 1024 * 1024
    )
    max_arriving_bytes: Annotated[
        int, Meta(ge=1, description="bytes of all long bodies that have come and were not read yet")
    ] = 256 * 1024 * 1024
    max_body_depth: Annotated[int, Meta(ge=4, le=512, description="levels of nesting in such a body")] = 64
    max_prompts: Annotated[int, Meta(ge=1, description="prompts in one request for completions")] = 128
    max_whole_bytes: Annotated[int, Meta(ge=1, description="bytes of an HTTP answer that is no stream")] = (
        64 * 1024 * 1024
    )
    max_joined_bytes: Annotated[
        int, Meta(ge=1, description="bytes of all HTTP answers that are put together before they are sent")
    ] = 256 * 1024 * 1024
    request_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds that an HTTP request may take to arrive")
    ] = 30.0
    idle_s: Annotated[
        float, Meta(gt=0, description="seconds until an HTTP connection without a request is closed")
    ] = 60.0
    comment_s: Annotated[
        float, Meta(ge=0, description="seconds of silence after which a stream has a comment; 0: never")
    ] = 0.0


NO_HTTP = HttpConfig()
PACKAGES = ("starlette", "uvicorn", "httptools")


def check_http(config: HttpConfig) -> None:
    """Raise ConfigError for an address that is none, and where the packages for HTTP are missing."""
    if not config.http:
        return
    try:
        parse_address(config.http)
    except ConfigError as error:
        raise refusal("http", error.limit, config.http) from None
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        lacking = ", ".join(missing)
        raise refusal("http", "left out", config.http, f"{lacking} is not installed: pip install 'cierzo[gateway]'")
