"""Images in bodies: data URLs are handed on; other addresses are noted, to be fetched from hosts that may be."""

from __future__ import annotations

from typing import Any
from urllib.parse import SplitResult, urlsplit

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.bounds import missing, must_be, shown
from cierzo.engine.gateway.reading import Body
from cierzo.engine.text.image_tokens import require_few

MAX_URL_CHARS = 8192
MAX_FETCHED = 16  # of a request: each is a connection
PORTS = {"http": 80, "https": 443}
DATA = "data:image/...;base64,..."


def read_image(read: Body, given: Any, place: str, field: str) -> dict[str, Any]:
    """The part of a turn that an image is. given: its URL, or an object that has it, at `place`; field: the part,
    as the engine names it. Raises InvalidRequest for an address that is not fetched."""
    if isinstance(given, dict):
        if unknown := given.keys() - {"url", "detail"}:
            name = min(unknown)
            raise InvalidRequest(
                f"unknown field {place}.{name}", field=f"{place}.{name}", limit="url, detail", value=name
            )
        if "detail" in given:
            read.sieve.pass_over(f"{place}.detail")
        given, place = given.get("url"), f"{place}.url"
    if given is None:
        raise missing(place)
    if not isinstance(given, str):
        raise must_be(place, "a URL", given)
    read.places[f"{field}.url"] = place
    if given[:5].lower() == "data:":
        return {"type": "image", "url": given}
    address(place, given, read.rules.image_hosts)
    read.fetches.append((place, given))
    require_few([at for at, _ in read.fetches], MAX_FETCHED, "addresses to fetch")
    return {"type": "image"}


def address(place: str, url: str, hosts: tuple[str, ...]) -> SplitResult:
    """The parts of an address that may be fetched: of one of these hosts, by http or https, at the usual port or
    that which the host is listed with. Raises InvalidRequest for any other."""
    limit = f"{DATA}, or http or https of: {', '.join(hosts)}" if hosts else DATA
    refused = InvalidRequest(
        f"{place} is {shown(url)!r}, allowed: {limit}"
        + ("" if hosts else "; no address is fetched, no file opened"),
        field=place,
        limit=limit,
        value=shown(url),
    )
    if len(url) > MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise refused
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "").lower()
    except ValueError:
        raise refused from None
    usual = PORTS.get(parts.scheme)
    if usual is None or parts.username is not None or parts.password is not None or not host:
        raise refused
    names = {host, f"{host}:{usual}"} if port in (None, usual) else {f"{host}:{port}"}
    if names.isdisjoint(each.lower() for each in hosts):
        raise refused
    return parts
