"""Connections of clients, made: to an address, with or without TLS, up to the server's welcome."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Iterable

from cierzo.engine.errors import ConfigError, ConnectionLost, InvalidRequest, VersionMismatch, refusal
from cierzo.engine.frontend.address import Address, TcpAddress
from cierzo.engine.frontend.client_link import ClientLink, tls_failure
from cierzo.engine.frontend.client_options import PathName
from cierzo.engine.messages import FEATURES, OLDEST_VERSION, PROTOCOL_VERSION


class Dial:
    """A way to connect; `key` is a secret, which nothing shows, and `tls` None is plain text."""

    def __init__(
        self,
        *,
        timeout_s: float,
        keepalive_s: float | None,
        features: tuple[str, ...],
        key: str | None,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._timeout_s = timeout_s
        self._keepalive_s = keepalive_s
        self._features = features
        self._key = key
        self._tls = tls

    async def connect(self, where: Address, is_known: bool) -> ClientLink:
        """A connection that was welcomed, by a server of this version or the one before. `is_known`: it has
        welcomed us before.

        Raises ConnectionLost where no server answers, ProtocolError where something else does, ConfigError where
        one side's TLS does not suit the other, or the refusal.
        """
        until_s = asyncio.get_running_loop().time() + self._timeout_s
        try:
            return await self._welcomed(where, PROTOCOL_VERSION, self._features, until_s, is_known)
        except VersionMismatch as error:
            if error.limit != str(OLDEST_VERSION):
                raise
        return await self._welcomed(where, OLDEST_VERSION, (), until_s, is_known)

    async def _welcomed(
        self, where: Address, version: int, features: tuple[str, ...], until_s: float, is_known: bool
    ) -> ClientLink:
        loop = asyncio.get_running_loop()
        tls = self._tls if isinstance(where, TcpAddress) else None
        link = ClientLink(
            loop,
            str(where),
            version=version,
            features=features,
            keepalive_s=self._keepalive_s,
            key=self._key,
            speaks_tls=tls is not None,
            is_known=is_known,
        )

        def protocol() -> ClientLink:
            return link

        try:
            async with asyncio.timeout_at(until_s):
                if isinstance(where, TcpAddress):
                    await loop.create_connection(protocol, where.host, where.port, ssl=tls)
                else:
                    await loop.create_unix_connection(protocol, where.path)
                await link.welcomed
                return link
        except BaseException as error:
            link.close()
            if isinstance(error, ssl.SSLError):
                raise tls_failure(str(where), error) from error
            if isinstance(error, OSError):  # a TimeoutError too
                raise ConnectionLost(self._unanswered(where, link, error)) from error
            raise

    def _unanswered(self, where: Address, link: ClientLink, error: Exception) -> str:
        """The reason why there is no connection, in words: a TimeoutError of asyncio has none."""
        if link.is_connected:
            told = f"within {self._timeout_s:g} s{link.question}"
            return f"{where} takes connections, but did not say welcome {told}"
        if link.speaks_tls and isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError):
            return f"{where} has closed the connection within TLS's handshake: does it speak TLS?"
        return f"no server answers at {where}: {str(error) or f'not connected within {self._timeout_s:g} s'}"


def known_features(features: Iterable[str]) -> tuple[str, ...]:
    """The features, if each is one that there is. Raises InvalidRequest."""
    for feature in (features := tuple(features)):
        if feature not in FEATURES:
            limit = ", ".join(FEATURES)
            raise InvalidRequest(
                f"there is no feature {feature!r}, only {limit}", field="features", limit=limit, value=feature
            )
    return features


def tls_context(
    tls: bool | PathName | ssl.SSLContext | None, certificate: PathName | None, key: PathName | None
) -> ssl.SSLContext | None:
    """Settle how TLS is spoken: by the authorities that the system trusts (True), those of a file, or as a context
    says; not at all by False and None. certificate, key: files by which the client proves who it is.

    Raises ConfigError, for files that are none, too.
    """
    if isinstance(tls, ssl.SSLContext):
        context = tls
    elif tls is False or tls is None:
        if certificate is not None or key is not None:
            raise refusal("tls_certificate", "given together with tls= (--tls-ca)", str(certificate or key))
        return None
    elif tls is not True and not (isinstance(tls, str | os.PathLike) and os.fspath(tls)):
        kinds = "True, a file of certificates in PEM, an ssl.SSLContext, or False or None for plain text"
        raise refusal("tls", kinds, tls)
    else:
        try:
            context = ssl.create_default_context(cafile=None if tls is True else tls)
        except OSError as error:  # an SSLError, too
            raise ConfigError(
                f"tls: {tls} is no file of certificates in PEM: {error}", field="tls", value=tls
            ) from error
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, TypeError) as error:
            what = f"tls_certificate, tls_key: {certificate} and {key} are no certificate and its private key"
            if key is None:
                what = f"tls_certificate: {certificate} has not both a certificate and its private key"
                what = f"{what}, which can be given in a file of its own as tls_key"
            raise ConfigError(f"{what}: {error}", field="tls_certificate", value=certificate) from error
    elif key is not None:
        raise refusal("tls_key", "given together with tls_certificate", str(key))
    return context


def secret(key: str | None) -> str | None:
    """The key, if it is one that can be sent. Raises ConfigError, which does not repeat it."""
    if key is None or (isinstance(key, str) and key.isascii() and key.isprintable() and key.strip() == key != ""):
        return key
    limit = "printable ASCII without spaces at its ends, or None"
    raise ConfigError(f"key must be {limit}", field="key", limit=limit)
