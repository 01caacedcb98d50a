"""TLS between a socket's transport and a `Connection`: a protocol below, a transport above.

The event loops' own TLS says nothing to a peer whose handshake fails, nor to one that speaks no TLS, and keeps
bytes that nobody counts. Here what is written is encrypted at once: the socket's transport is the only place where
bytes wait, and the rules for slow readers are the same with TLS and without.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from typing import Any, cast

from cierzo.engine.errors import ProtocolError
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.frames import Buffer, pack
from cierzo.engine.frontend.listening import LINGER_S, peer_of
from cierzo.engine.frontend.tls import subject_of
from cierzo.engine.log_lines import BY_STRANGERS

log = logging.getLogger(__name__)

HANDSHAKE = 0x16  # how a TLS record with a handshake begins
RECORD_BYTES = 16 * 1024
MAX_OWN_BYTES = 16 * 1024  # that TLS itself may have to say to a peer that does not read
_WRONG = "this port speaks TLS, and the client does not"
_IN_OURS = bytes(pack([failure(-1, ProtocolError(_WRONG, field="tls", limit="a TLS handshake"))]))
_IN_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    % (len(_WRONG) + 1, _WRONG.encode() + b"\n")
)


class TlsLayer(asyncio.Protocol, asyncio.Transport):
    """A connection under TLS. Until the handshake is over, `app` does not know of it.

    Then it has `get_extra_info` "subject", of the client's certificate or "", and "num_written": encrypted bytes
    that were handed to the socket's transport.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        config: FrontendConfig,
        app: asyncio.Protocol,
        shaking: set[TlsLayer],
        has_room: Callable[[], bool],
    ) -> None:
        """shaking: where those are kept whose handshake is not over; has_room: for one more of them."""
        super().__init__()
        self._config = config
        self._app = app
        self._shaking = shaking
        self._has_room = has_room
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._raw: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_up = False  # the handshake is over: `app` is connected
        self._is_ended = False  # nothing that comes counts any more
        self._is_held = False
        self._has_spoken = False
        self._num_written = self._num_own = 0
        self._subject = ""

    # --- asyncio.Protocol, of the socket's transport ------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A peer has connected; it has `handshake_timeout_s` for its handshake."""
        self._raw = cast(asyncio.Transport, transport)
        self._raw.set_write_buffer_limits(high=self._config.high_water_bytes)
        if not self._has_room():
            self.abort()
            return
        self._shaking.add(self)
        timeout_s = self._config.handshake_timeout_s
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._fail, "no handshake came in time")

    def data_received(self, data: bytes) -> None:
        """Take encrypted bytes."""
        if self._is_ended:
            return
        if not self._has_spoken and data[0] != HANDSHAKE:
            self._turn_away(data)
            return
        self._has_spoken = True
        self._incoming.write(data)
        if not self._is_up:
            self._shake_hands()
        if self._is_up:
            self._read()

    def eof_received(self) -> bool:
        """The peer writes nothing more; without a farewell too."""
        if self._is_up and not self._is_ended:
            self._app.eof_received()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone."""
        self._is_ended = True
        self._shaking.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._is_up:
            self._app.connection_lost(exc)
        self._raw = self._timer = None

    def pause_writing(self) -> None:
        """The peer does not read."""
        if self._is_up:
            self._app.pause_writing()

    def resume_writing(self) -> None:
        """The peer reads again."""
        if self._is_up:
            self._app.resume_writing()

    # --- asyncio.Transport, of the connection -------------------------------------------------------------

    def write(self, data: Buffer) -> None:
        """Encrypt, and send."""
        if self._raw is None or self._raw.is_closing():
            return
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._tls.write(rest[:RECORD_BYTES]) :]
        except ssl.SSLError as error:  # the peer has ended it while it was heard, or said what is no TLS
            log.debug("TLS ended: %s", error)
            self.abort()
            return
        self._send()

    def can_write_eof(self) -> bool:
        """Ends are said in TLS's own words, and then in TCP's."""
        return True

    def write_eof(self) -> None:
        """Write nothing more, and hear nothing more."""
        self._is_ended = True
        if self._raw is None or self._raw.is_closing():
            return
        with contextlib.suppress(ssl.SSLError):  # the peer's farewell has not come, and need not
            self._tls.unwrap()
        self._send()
        self._raw.write_eof()

    def close(self) -> None:
        """Send what was written, and end."""
        if self._raw is not None and not self._raw.is_closing():
            if not self._is_ended:
                self.write_eof()
            self._raw.close()

    def abort(self) -> None:
        """End at once."""
        self._is_ended = True
        if self._raw is not None:
            self._raw.abort()

    def is_closing(self) -> bool:
        """Say whether the connection has ended, or is about to."""
        return self._raw is None or self._raw.is_closing()

    def pause_reading(self) -> None:
        """Hand over nothing."""
        self._is_held = True
        if self._raw is not None:
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Hand over again, beginning with what has come before."""
        if self._is_held and self._raw is not None:
            self._is_held = False
            self._raw.resume_reading()
            if self._incoming.pending or self._tls.pending():
                asyncio.get_running_loop().call_soon(self._read)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Give the peer's certificate's "subject", "num_written", or what the socket's transport tells."""
        if name == "subject":
            return self._subject
        if name == "num_written":
            return self._num_written
        return default if self._raw is None else self._raw.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Limit what waits, encrypted, to be sent."""
        if self._raw is not None:
            self._raw.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """Encrypted bytes that wait to be sent."""
        return 0 if self._raw is None else self._raw.get_write_buffer_size()

    # --- inside -------------------------------------------------------------------------------------------

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send()
            return
        except (ssl.SSLError, ssl.CertificateError) as error:
            self._fail(getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error))
            return
        self._send()
        self._shaking.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._subject = subject_of(self._tls.getpeercert() or {})
        self._is_up = True
        self._app.connection_made(self)

    def _read(self) -> None:
        """Hand over what has come, decrypted; at the peer's farewell, end."""
        chunks, error = [], None
        try:
            while not (self._is_held or self._is_ended):
                chunk = self._tls.read(RECORD_BYTES)
                if not chunk:
                    raise ssl.SSLZeroReturnError
                chunks.append(chunk)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as failed:
            error = failed
        is_full = self.get_write_buffer_size() > self._config.high_water_bytes
        self._num_own = self._num_own + self._outgoing.pending if is_full else 0
        if self._num_own > MAX_OWN_BYTES:
            log.warning("%s asks for new TLS keys and reads none: it is closed", self._peer, extra=BY_STRANGERS)
            self.abort()
            return
        self._send()  # what TLS itself has to say
        if chunks and not self._is_ended:
            self._app.data_received(b"".join(chunks))
        if error is not None and not self._is_ended:
            self._app.eof_received()
            self.close()

    def _send(self) -> None:
        if self._outgoing.pending and self._raw is not None and not self._raw.is_closing():
            data = self._outgoing.read()
            self._num_written += len(data)
            self._raw.write(data)

    def _fail(self, why: str) -> None:
        """The handshake has failed: the peer hears so, and has a little time to read it."""
        log.warning("no TLS with %s: %s", self._peer, why, extra=BY_STRANGERS)
        self._give_up()

    def _turn_away(self, data: bytes) -> None:
        """The peer speaks no TLS: it is told in its own words, if it is a client of ours or of HTTP."""
        log.warning("%s came to a TLS port without TLS: it is closed", self._peer, extra=BY_STRANGERS)
        if self._raw is not None:
            self._raw.write(_IN_OURS if data.startswith(b"\0\0") else _IN_HTTP)
        self._give_up()

    def _give_up(self) -> None:
        self._is_ended = True
        self._send()
        if self._raw is None or self._raw.is_closing():
            return
        self._raw.write_eof()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._raw.abort)

    @property
    def _peer(self) -> str:
        return peer_of(self.get_extra_info("peername"))[0]
