"""The page at /, over HTTP: its files, read once, and the state that it shows.

The files say nothing of the server, so whoever reaches it may have them, also where it has keys, which a browser
could not show for them. The state wants the right "stats".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

import msgspec

from cierzo import __version__
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.gateway.call import Call
from cierzo.engine.gateway.errors import Headers
from cierzo.engine.gateway.house import House
from cierzo.engine.gateway.state import state_of

FOLDER = Path(__file__).with_name("page")
MEDIA_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
}


class Asset(msgspec.Struct, frozen=True):
    """File of the page."""

    body: bytes
    kind: bytes
    tag: bytes

    @property
    def headers(self) -> Headers:
        """Headers of its own. It is asked for by its tag each time: a new page must not meet old scripts."""
        return [(b"cache-control", b"no-cache"), (b"etag", self.tag)]


def assets() -> dict[str, Asset]:
    """Every file by its path at the server; the first page is at "/"."""
    files = sorted(path for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES)
    return {"/" if path.name == "index.html" else f"/page/{path.name}": _asset(path) for path in files}


def sender(asset: Asset) -> Callable[[House, Call], Awaitable[None]]:
    """Make the handler of a file."""

    async def send(house: House, call: Call) -> None:
        call.headers += asset.headers
        if call.field(b"if-none-match") == asset.tag.decode():
            await call.begin(304, asset.kind)
            await call.end()
        else:
            await call.reply(asset.body, kind=asset.kind)

    return send


async def state(house: House, call: Call, frontend: Frontend | None) -> None:
    """Answer GET /page/state. frontend: the front end, where that is in this process."""
    engine = call.engine
    model = (await house.rules(engine)).model
    found = state_of(
        await engine.health(),
        await engine.stats(),
        model,
        version=__version__,
        model_id=house.names[0],
        frontend=frontend,
    )
    call.headers.append((b"cache-control", b"no-store"))
    await call.reply(msgspec.json.encode(found))


def _asset(path: Path) -> Asset:
    body = path.read_bytes()
    return Asset(body, MEDIA_TYPES[path.suffix], b'"%s"' % sha256(body).hexdigest()[:32].encode())
