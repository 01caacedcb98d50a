"""Addresses are read, or refused before anybody tries to reach them."""

from __future__ import annotations

from typing import Any

import pytest

from cierzo.engine.errors import ConfigError
from cierzo.engine.frontend.address import TcpAddress, UnixAddress, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7071", TcpAddress("127.0.0.1", 7071)),
        ("host:0", TcpAddress("host", 0)),
        ("host:65535", TcpAddress("host", 65_535)),
        ("[::1]:80", TcpAddress("::1", 80)),
        ("unix:/run/x", UnixAddress("/run/x")),
        ("unix:a:5", UnixAddress("a:5")),
        ("unix:" + "x" * 107, UnixAddress("x" * 107)),
    ],
)
def test_addresses(text: str, address: TcpAddress | UnixAddress) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "foo", ":", ":80", "host:", "host:x", "host:-1", "host:65536", "host:99999", "host:\u0663", "[]:80"),
        *("http://127.0.0.1:7071", "tcp://host:80"),
        *("a..b:80", "x" * 64 + ":80", "caf\udce9:80"),
        *("unix:", "unix", "unix:" + "x" * 108, "unix:" + "é" * 54, "unix:a\0b", "unix:caf\udce9", "unix:\ud800"),
    ],
)
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="address must be HOST:PORT or unix:PATH") as caught:
        parse_address(text)
    assert caught.value.field == "address"
    assert str(caught.value.value).encode("utf-8", "backslashreplace") == text.encode("utf-8", "backslashreplace")
    assert caught.value.limit == "HOST:PORT or unix:PATH (ports up to 65535, paths up to 107 bytes)"


@pytest.mark.parametrize("value", [None, 7071, [], b"unix:x"])
def test_what_is_no_text_is_no_address(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"address must be HOST:PORT or unix:PATH .*, got"):
        parse_address(value)
