"""Houses with an HTTP door: in the server, and as a gateway before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop
from browser import Browser, browser
from http_house import HttpHouse
from page_server import PageServer, page_server


@pytest.fixture(params=[False, True], ids=["embedded", "gateway"])
def either(request: pytest.FixtureRequest) -> Iterator[Callable[..., HttpHouse]]:
    """Open a house of either kind; the arguments are those of HttpHouse."""
    with contextlib.ExitStack() as stack:
        yield lambda *answers, **options: stack.enter_context(HttpHouse(*answers, remote=request.param, **options))


@pytest.fixture
def opening() -> Iterator[Callable[..., HttpHouse]]:
    """Open a house with its door in the server; the arguments are those of HttpHouse."""
    with contextlib.ExitStack() as stack:
        yield lambda *answers, **options: stack.enter_context(HttpHouse(*answers, **options))


@pytest.fixture
def house(opening: Callable[..., HttpHouse]) -> HttpHouse:
    return opening("Hello there.")


@pytest.fixture
def run() -> Callable[..., None]:
    """Run a test's coroutine."""

    async def limited(body: Coroutine[Any, Any, None], limit_s: float) -> None:
        async with asyncio.timeout(limit_s):
            await body

    return lambda body, limit_s=20.0: uvloop.run(limited(body, limit_s))


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    """A browser's window."""
    with browser() as opened:
        yield opened


@pytest.fixture
def page(window: Browser) -> Iterator[PageServer]:
    """A server whose page is open, and of which the browser has nothing to complain in the end."""
    with page_server() as server:
        window.open(server.url)
        window.shows("#state", "ready")
        yield server
        assert not window.complaints()
