"""Files of the page at /, as they are sent: read once, with the headers that keep them from doing harm.

They say nothing of the server, so whoever reaches it may have them, also where it has keys: what the page shows
comes from `/page/state`, which asks for the right "stats".
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import msgspec

FOLDER = Path(__file__).with_name("page")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
# Nothing from elsewhere is loaded, asked or framed, and nothing inline is run.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Asset(msgspec.Struct, frozen=True):
    """File of the page. `headers`: all that its answer needs but the length."""

    body: bytes
    headers: dict[str, str]


def assets() -> dict[str, Asset]:
    """Every file by its path at the server; the first page is at "/"."""
    files = sorted(path for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES)
    return {"/" if path.name == "index.html" else f"/page/{path.name}": _asset(path) for path in files}


def _asset(path: Path) -> Asset:
    body = path.read_bytes()
    headers = {
        "content-type": MEDIA_TYPES[path.suffix],
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",  # asked again each time, by its tag: a new version must not meet old scripts
        "etag": f'"{sha256(body).hexdigest()[:32]}"',
    }
    return Asset(body, headers)
