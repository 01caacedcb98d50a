"""Routes of the HTTP door. The row of a new endpoint goes into `ROWS`."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router

from cierzo import __version__
from cierzo.engine.errors import NotFound
from cierzo.engine.frontend.tenants import Right
from cierzo.engine.gateway import endpoints, site
from cierzo.engine.gateway.backend import Backends, Caller
from cierzo.engine.gateway.call import Call, Receive, Scope, Send
from cierzo.engine.gateway.endpoints import answering
from cierzo.engine.gateway.errors import NoSuchPath, WrongMethod
from cierzo.engine.gateway.guard import App, Guard
from cierzo.engine.gateway.house import House
from cierzo.engine.gateway.openapi import document
from cierzo.engine.messages import ModelInfo

Handler = Callable[[House, Call], Awaitable[None]]
METRICS_KIND = b"text/plain; version=0.0.4; charset=utf-8"
WORDS_BYTES = 1024 * 1024  # of a body that is read on the event loop
BEARER = "bearer "
PROBES = ("startup", "live", "ready")


class Row(NamedTuple):
    """An endpoint. right: what a key needs for it, where there are keys; is_open: it wants no key at all.
    max_bytes: of a body, where `max_body_bytes` is too many."""

    method: str
    path: str
    handler: Handler
    right: Right | None = None
    is_open: bool = False
    max_bytes: int = sys.maxsize


async def models(house: House, call: Call) -> None:
    """Answer GET /v1/models."""
    found = (await house.rules(call.engine)).model
    data = [_model(house, name, found) for name in house.names]
    await call.reply(msgspec.json.encode({"object": "list", "data": data}))


async def model(house: House, call: Call) -> None:
    """Answer GET /v1/models/NAME."""
    found, name = (await house.rules(call.engine)).model, call.scope["path_params"]["name"]
    if name not in house.names:
        limit = ", ".join(house.names)
        raise NotFound(f"there is no model {name[:100]!r}; served: {limit}", field="model", limit=limit, value=name)
    await call.reply(msgspec.json.encode(_model(house, name, found)))


def _model(house: House, name: str, found: ModelInfo) -> dict[str, Any]:
    """A model as OpenAI's clients expect it, those of vLLM, and Mistral's."""
    return {
        "id": name,
        "object": "model",
        "created": house.began_s,
        "owned_by": "cierzo",
        "max_model_len": found.max_model_len,
        "max_context_length": found.max_model_len,
        "type": "base",
        "capabilities": {
            "completion_chat": found.has_chat_template,
            "function_calling": found.marks_calls,
            "reasoning": found.marks_thinking,
            "vision": found.vision is not None,
        },
    }


async def version(house: House, call: Call) -> None:
    """Answer GET /version."""
    await call.reply(msgspec.json.encode({"version": __version__}))


ROWS = (
    Row("POST", "/v1/chat/completions", answering("chat")),
    Row("POST", "/v1/completions", answering("completions")),
    Row("POST", "/v1/fim/completions", answering("fim")),
    Row("POST", "/v1/responses", endpoints.responses),
    Row("POST", "/tokenize", endpoints.tokenize, max_bytes=WORDS_BYTES),
    Row("POST", "/detokenize", endpoints.detokenize, max_bytes=WORDS_BYTES),
    Row("GET", "/tokenizer_info", endpoints.tokenizer_info, right="stats"),
    Row("GET", "/v1/models", models),
    Row("GET", "/v1/models/{name:path}", model),
    Row("GET", "/version", version, is_open=True),
)


class Endpoint:
    """An ASGI application for one row: lets the caller in, reads the body, and has the request answered."""

    def __init__(self, row: Row, house: House, backends: Backends) -> None:
        self._row = row
        self._house = house
        self._backends = backends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        call: Call = scope["cierzo.call"]
        if not self._row.is_open:
            call.backend = await self._backends.admit(caller_of(call))
            if self._row.right is not None:
                await call.backend.require(self._row.right)
        house = self._house
        try:
            if self._row.method == "POST":
                await call.read(min(house.config.max_body_bytes, self._row.max_bytes), house.arriving)
            await self._row.handler(house, call)
        finally:
            call.forget(house.arriving)


def caller_of(call: Call) -> Caller:
    """Evidence of whose a request is."""
    authorization = call.field(b"authorization")
    is_bearer = authorization[: len(BEARER)].lower() == BEARER
    key = authorization[len(BEARER) :].strip() if is_bearer else authorization
    state = call.scope.get("state", {})
    return Caller(
        key=key,
        certificate=state.get("certificate", ""),
        peer=state.get("peer", ""),
        is_local=state.get("is_local", False),
    )


def make_app(house: House, backends: Backends, hosts: Collection[str] = ()) -> App:
    """The ASGI application. hosts: names under which it may be addressed, without ports; empty: any."""
    config, rows = house.config, [*ROWS, *_rows_of(backends)]
    rows.append(Row("GET", "/openapi.json", _describing(rows, config.lenient), is_open=True))
    routes = [Route(row.path, Endpoint(row, house, backends), methods=[row.method]) for row in rows]
    guard = Guard(_routed(Router(routes, redirect_slashes=False)), hosts)
    if not config.cors_origin:
        return guard
    return CORSMiddleware(
        guard,
        allow_origins=[*config.cors_origin],
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # clients add names of their own, as x-stainless-lang
        expose_headers=["x-request-id", "x-passed-over", "x-should-retry", "retry-after", "retry-after-ms"],
    )


def _rows_of(backends: Backends) -> list[Row]:
    """Endpoints that ask whoever lets callers in, and the files of the page."""

    def health(name: str) -> Handler:
        """Make the handler of a probe."""

        async def probe(house: House, call: Call) -> None:
            """Say how the server is, to whoever asks."""
            found = await backends.health()
            is_well = bool(getattr(found, name))
            told = {name: is_well, "state": found.state, "notes": found.notes}
            await call.reply(msgspec.json.encode(told), 200 if is_well else 503)

        return probe

    async def metrics(house: House, call: Call) -> None:
        """Answer GET /metrics."""
        await call.reply(backends.metrics(), kind=METRICS_KIND)

    async def state(house: House, call: Call) -> None:
        """Answer GET /page/state."""
        await site.state(house, call, backends.frontend)

    return [
        *(Row("GET", path, site.sender(asset), is_open=True) for path, asset in site.assets().items()),
        *(Row("GET", f"/health/{name}", health(name), is_open=True) for name in PROBES),
        Row("GET", "/health", health("ready"), is_open=True),
        Row("GET", "/metrics", metrics, right="stats"),
        Row("GET", "/page/state", state, right="stats"),
    ]


def _describing(rows: Sequence[Row], lenient: bool) -> Handler:
    """Make the handler of the document that describes these rows."""
    told = msgspec.json.encode(document(rows, lenient=lenient))

    async def describe(house: House, call: Call) -> None:
        """Answer GET /openapi.json."""
        await call.reply(told)

    return describe


def _routed(router: Router) -> App:
    """The router, with errors of ours for what it has no route for."""

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # it raises, then, where it would answer
        try:
            await router(scope, receive, send)
        except HTTPException as found:
            method, path = scope["method"], scope["path"][:200]
            if found.status_code != 405:
                raise NoSuchPath(f"nothing is served under {path}", field="path", value=path) from None
            allow = (found.headers or {}).get("Allow", "")
            scope["cierzo.call"].headers.append((b"allow", allow.encode()))
            what = f"{path} does not take {method}"
            raise WrongMethod(what, field="method", limit=allow, value=method) from None

    return routed
