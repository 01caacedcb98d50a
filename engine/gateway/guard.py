"""The way in: names of requests, hosts, errors that nobody else has told, and headers that every answer has."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from email.utils import formatdate
from ipaddress import ip_address

from cierzo import __version__
from cierzo.engine.errors import CierzoError, InvalidRequest
from cierzo.engine.frontend.validate import TRACEPARENT
from cierzo.engine.gateway.call import JSON, Call, Gone, Receive, Scope, Send
from cierzo.engine.gateway.errors import Headers, WrongHost, encoded, headers_of, stopped

log = logging.getLogger(__name__)

CSP = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
CSP += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
ALWAYS: Headers = [
    (b"server", f"cierzo/{__version__}".encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", CSP.encode()),
]
ONCE = {b"host", b"authorization", b"content-length", b"content-type", b"content-encoding", b"x-request-id"}
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application around another, which finds its `Call` under "cierzo.call" of the scope.

    hosts: names under which this server may be addressed, without ports; empty: any.
    """

    def __init__(self, app: App, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        self._date = b""
        self._date_s = -1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            return  # a lifespan: there is nothing to prepare
        fields = dict(scope["headers"])
        request_id = fields.get(b"x-request-id", b"")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex.encode()
        call = Call(scope, receive, send, fields, request_id.decode())
        call.headers = [*ALWAYS, (b"date", self._now()), (b"x-request-id", request_id)]
        if TRACEPARENT.fullmatch(call.field(b"traceparent")):
            call.headers.append((b"traceparent", fields[b"traceparent"]))
        scope["cierzo.call"] = call
        try:
            self._check(scope, fields)
            await self._app(scope, receive, send)
        except CierzoError as error:
            await _refuse(call, error)
        except Gone:
            pass
        except asyncio.CancelledError:  # the server ends, with the task that this is
            if not call.has_begun:
                await _refuse(call, stopped())
        except Exception as error:
            log.exception("the request %s failed", call.request_id)
            await _refuse(call, CierzoError(f"internal error: {type(error).__name__}"))
        finally:
            del scope["cierzo.call"]  # they know each other, and the cycle collector comes rarely
            if call.backend is not None:
                call.backend.close()

    def _check(self, scope: Scope, fields: dict[bytes, bytes]) -> None:
        """Raise the CierzoError for a head that may not come in."""
        if len(fields) != len(scope["headers"]):
            names = [name for name, _ in scope["headers"]]
            for name in ONCE.intersection(names):
                if names.count(name) > 1:
                    told = name.decode()
                    raise InvalidRequest(
                        f"the header {told} is there twice", field=told, limit="once", value="twice"
                    )
        if self._hosts:
            host = fields.get(b"host", b"").decode("latin-1")
            if hostname(host) not in self._hosts:
                what = f"this server is not called {host!r}: name it by http_host" if host else "no host is named"
                raise WrongHost(what, field="host", limit=", ".join(sorted(self._hosts)), value=host)

    def _now(self) -> bytes:
        """The date, as HTTP writes it."""
        now = int(time.time())
        if now != self._date_s:
            self._date_s, self._date = now, formatdate(now, usegmt=True).encode()
        return self._date


def hostname(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return (host.partition(":")[0] if host.count(":") == 1 else host).lower()


def allowed_hosts(bound: str, more: Collection[str]) -> Collection[str]:
    """Names under which a server that listens on the host `bound` may be addressed. Empty, which is any, where
    other machines reach it by whatever name, and none was given."""
    try:
        is_loopback = ip_address(bound).is_loopback
    except ValueError:
        is_loopback = bound == "localhost"
    if not is_loopback and not more:
        return ()
    return {*LOOPBACK, bound, *more}


async def _refuse(call: Call, error: CierzoError) -> None:
    """Tell an error; of an answer that has begun nothing can be told: its end is missing."""
    if call.has_begun:
        raise error
    call.headers += headers_of(error)
    await call.reply(encoded(error), error.http_status, JSON)
