"""The server's side of TLS: a context of the files that the settings name, when they expire, and new ones in place.

Every connection is made with the context of the moment (tls_layer.py). `cryptography` is imported where TLS is on.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from cierzo.engine.errors import ConfigError
from cierzo.engine.frontend.config import FrontendConfig

log = logging.getLogger(__name__)

TOLD_AHEAD = timedelta(days=21)
TELL_EVERY_S = 86_400.0
Now = Callable[[], datetime]


def utc_now() -> datetime:
    """Read the clock on the wall."""
    return datetime.now(UTC)


class Tls:
    """The context of a server's connections. `reload` it, `close` it. Raises ConfigError for files that it cannot
    serve with."""

    def __init__(self, config: FrontendConfig, now: Now = utc_now) -> None:
        self._config = config
        self._now = now
        self.context, self.expires_at = _load(config, now())
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Say in the log, at once and then daily, that a certificate soon expires, or has expired."""
        if (note := self.note()) is not None:
            log.warning("%s", note)
        self._timer = asyncio.get_running_loop().call_later(TELL_EVERY_S, self.start)

    def close(self) -> None:
        """Say nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def reload(self) -> bool:
        """Read the files again, for the connections to come; whether they are in force. If anything is wrong with
        them, the log says so and the ones before stay."""
        try:
            self.context, self.expires_at = _load(self._config, self._now())
        except ConfigError as error:
            log.error("the certificate stays the one before: %s", error.message)
            return False
        log.info("the certificate was read again; it expires on %s", _day(self.expires_at))
        return True

    def expires_s(self) -> float:
        """Unix time at which the first of the server's certificates expires."""
        return self.expires_at.timestamp()

    def note(self) -> str | None:
        """A sentence on what an operator has to do soon, if there is something."""
        left = self.expires_at - self._now()
        if left >= TOLD_AHEAD:
            return None
        if left < timedelta(0):
            return f"the TLS certificate has expired on {_day(self.expires_at)}: clients refuse it"
        days = left // timedelta(days=1)
        when = "today" if days == 0 else "in 1 day" if days == 1 else f"in {days} days"
        return f"the TLS certificate expires {when}, on {_day(self.expires_at)}"


def subject_of(certificate: Any) -> str:
    """The common name of a certificate that `getpeercert` gives, else its first DNS name or URI, or ""."""
    fields = dict(pair for part in certificate.get("subject", ()) for pair in part)
    names = dict(reversed(certificate.get("subjectAltName", ())))
    return str(fields.get("commonName") or names.get("DNS") or names.get("URI") or "")


def _load(config: FrontendConfig, now: datetime) -> tuple[ssl.SSLContext, datetime]:
    """A context of the files, and when the first certificate of the chain expires. Raises ConfigError."""
    if not config.tls_certificate:
        named = "tls_key" if config.tls_key else "tls_client_ca"
        raise ConfigError(
            f"{named} is of no use without tls_certificate",
            field="tls_certificate",
            limit="a file",
            value=config.tls_certificate,
        )
    expires_at = _expiry("tls_certificate", config.tls_certificate, now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # nothing is resumed: each connection lasts, and shows its certificate anew
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    context.num_tickets = 0
    _use_key(context, config)
    if config.tls_client_ca:
        _expiry("tls_client_ca", config.tls_client_ca, now)
        try:
            context.load_verify_locations(cadata=_read("tls_client_ca", config.tls_client_ca).decode())
        except ValueError as error:  # an SSLError too
            raise _wrong("tls_client_ca", config.tls_client_ca, str(error), "certificates in PEM") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context, expires_at


def _use_key(context: ssl.SSLContext, config: FrontendConfig) -> None:
    """Have a context show the chain, and sign with its key. Raises ConfigError."""
    field, path = ("tls_key", config.tls_key) if config.tls_key else ("tls_certificate", config.tls_certificate)
    written = _read(field, path)
    if b"PRIVATE KEY-----" not in written:
        raise _wrong(field, path, "it holds no private key", "a private key in PEM")
    if b"ENCRYPTED" in written:
        raise _wrong(field, path, "the key is encrypted, and nobody is there to give its password", "a plain key")
    try:
        context.load_cert_chain(config.tls_certificate, path)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _wrong(
                field, path, "it is the key of another certificate", f"the key of {config.tls_certificate}"
            ) from error
        raise _wrong(field, path, error.reason or str(error), "a private key in PEM") from error


def _expiry(field: str, path: str, now: datetime) -> datetime:
    """When the first of the certificates in a file expires. Raises ConfigError for one that does not count now."""
    from cryptography import x509  # takes time and memory

    try:
        found = x509.load_pem_x509_certificates(_read(field, path))
    except ValueError as error:
        raise _wrong(field, path, "it holds no certificates in PEM", "certificates in PEM") from error
    for certificate in found:
        since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        limit = "a certificate that is valid now"
        if until <= now:
            raise _wrong(field, path, f"the certificate has expired on {_day(until)}", limit)
        if since > now:
            raise _wrong(field, path, f"the certificate is not valid before {_day(since)}", limit)
    return min(certificate.not_valid_after_utc for certificate in found)


def _read(field: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise _wrong(field, path, why, "a file that can be read") from error


def _wrong(field: str, path: str, why: str, limit: str) -> ConfigError:
    return ConfigError(f"{field}: {path}: {why}", field=field, limit=limit, value=path)


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
