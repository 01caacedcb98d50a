"""The key file: tenants, and the digests of the keys and the names in certificates that open the server to them.

A line is a JSON object, or empty, or begins with "#" (docs/operations.md has an example):

    {"tenant": "search", "weight": 2, "max_requests": 100}
    {"key": "sha256:<64 hex digits>", "of": "search", "rights": ["stats"]}
    {"certificate": "search.internal", "of": "search"}

The server knows digests alone: who reads the file can open nothing with it.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from hashlib import sha256
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from cierzo.engine.errors import ConfigError, Unauthorized
from cierzo.engine.frontend.tenants import (
    DEFAULT,
    EVERYBODY,
    NAME_LIMIT,
    RIGHTS,
    Access,
    Name,
    Right,
    Tenant,
    Visitor,
)

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 4 << 20
MAX_TENANTS, MAX_KEYS = 256, 1024  # every key is compared with whatever a connection brings
SECRET_BYTES = 32
KEY_PREFIX = "cierzo-"  # by which scanners for leaked secrets can know one
DIGEST_PREFIX = "sha256:"
DIGEST_LIMIT = "sha256: and 64 hex digits"
T = TypeVar("T")


class KeyLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key: its digest, the tenant that it is of, and its rights."""

    key: Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
    of: Name
    rights: tuple[Right, ...] = ()


class CertificateLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate of a client: the name in it, the tenant that it is of, and its rights."""

    certificate: Annotated[str, Meta(min_length=1, max_length=253)]
    of: Name
    rights: tuple[Right, ...] = ()


Line = Tenant | KeyLine | CertificateLine
_KINDS: dict[str, type[Line]] = {"tenant": Tenant, "key": KeyLine, "certificate": CertificateLine}


class KeyFile(msgspec.Struct, frozen=True):
    """Contents of a key file: tenants by name, access by the digest of a key and by a certificate's name."""

    tenants: dict[str, Tenant]
    keys: dict[bytes, Access]
    certificates: dict[str, Access]


def new_key() -> str:
    """A key that nobody can guess."""
    return KEY_PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def digest_of(key: str) -> bytes:
    """The digest by which a key is known. Keys are as random as their digests: no slow hash is needed."""
    return sha256(key.encode("utf-8", "surrogatepass")).digest()


def key_line(key: str, tenant: str, rights: tuple[Right, ...] = ()) -> str:
    """The line of a key file that lets a key in."""
    line = KeyLine(DIGEST_PREFIX + digest_of(key).hex(), tenant, rights)
    return msgspec.json.encode(line).decode()


def read_key_file(path: str) -> KeyFile:
    """Read a key file. Raises ConfigError, with the line that is wrong; never with a key that it might hold."""
    tenants: dict[str, Tenant] = {}
    opened: dict[str, dict[Any, tuple[int, KeyLine | CertificateLine]]] = {"key": {}, "certificate": {}}
    for number, line in _lines(path):
        if isinstance(line, Tenant):
            _put(tenants, line.name, line, path, number, "this tenant")
            if line.min_priority > line.max_priority:
                raise _wrong(path, number, "min_priority is above max_priority", f"at most {line.max_priority}")
        elif isinstance(line, KeyLine):
            digest = bytes.fromhex(line.key.removeprefix(DIGEST_PREFIX))
            if digest == digest_of(""):
                raise _wrong(path, number, "the digest is that of no key at all", "the digest of a key")
            _put(opened["key"], digest, (number, line), path, number, "this key")
        else:
            name = line.certificate
            _put(opened["certificate"], name, (number, line), path, number, "this certificate")
    for limit, most, count in (
        ("tenants", MAX_TENANTS, len(tenants)),
        ("keys", MAX_KEYS, len(opened["key"])),
        ("certificates", MAX_KEYS, len(opened["certificate"])),
    ):
        if count > most:
            text = f"keys: {path} has {count} {limit}, allowed: {most}"
            raise ConfigError(text, field="keys", limit=most, value=count)
    access: dict[str, dict[Any, Access]] = {"key": {}, "certificate": {}}
    for kind, found in opened.items():
        for name, (number, line) in found.items():
            if line.of not in tenants:
                known = ", ".join(sorted(tenants)[:10]) or "none"
                raise _wrong(path, number, "there is no line of the tenant that it is of", f"one of: {known}")
            access[kind][name] = Access(tenants[line.of], frozenset(line.rights))
    return KeyFile(tenants, access["key"], access["certificate"])


class Door:
    """Says who a connection is of. Owns the key file that is in force; `reload` reads it anew."""

    def __init__(self, path: str) -> None:
        """path: the key file; "" for none: everybody may come, and do everything. Raises ConfigError."""
        self._path = path
        self._file = _in_force(path) if path else None

    @property
    def tenants(self) -> dict[str, Tenant]:
        """The tenants that there are, by name."""
        return {DEFAULT: EVERYBODY.tenant} if self._file is None else self._file.tenants

    def access(self, visitor: Visitor) -> Access:
        """Who a connection is of, and its rights. Raises Unauthorized, in the same words whatever is wrong.

        A key decides; without one that is known, a certificate; without either, a connection of this machine is of
        the tenant "default", if the file has it, without rights.
        """
        file = self._file
        if file is None:
            return EVERYBODY
        found: Access | None = None
        for digest, access in file.keys.items():  # all of them: the time says nothing
            if hmac.compare_digest(digest, visitor.key_digest):
                found = access
        if found is None and visitor.key_digest == digest_of(""):
            found = file.certificates.get(visitor.certificate) if visitor.certificate else None
            if found is None and visitor.is_local and DEFAULT in file.tenants:
                found = Access(file.tenants[DEFAULT], frozenset())
        if found is None:
            raise Unauthorized("this server wants a key that it knows", field="key", limit="one that is known")
        return found

    def again(self, visitor: Visitor, access: Access) -> Access:
        """The access of somebody who has come, now that keys may have changed. Raises Unauthorized if it is
        nobody's now, or another tenant's."""
        found = self.access(visitor)
        if found.tenant.name != access.tenant.name:
            raise Unauthorized("this key is of another tenant now", field="key", limit="a new connection")
        return found

    def reload(self) -> bool:
        """Read the file anew; False, and a line in the log, if it is wrong: what was in force stays so."""
        if not self._path:
            return True
        try:
            self._file = _in_force(self._path)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error.message)
            return False
        log.info("%d tenants and %d keys are in force", len(self._file.tenants), len(self._file.keys))
        return True


def _in_force(path: str) -> KeyFile:
    """A key file that lets somebody in: one that does not is about to be written. Raises ConfigError."""
    file = read_key_file(path)
    if not file.keys and not file.certificates and DEFAULT not in file.tenants:
        text = f"keys: {path} has no line of a key or a certificate, and no tenant {DEFAULT}: nobody could come"
        raise ConfigError(text, field="keys", limit="at least one key", value=path)
    return file


def _lines(path: str) -> Iterator[tuple[int, Line]]:
    """The lines of a key file that say something, by number."""
    for number, text in enumerate(_text(path).split("\n"), 1):
        if text.strip() and not text.lstrip().startswith("#"):
            yield number, _line(path, number, text)


def _line(path: str, number: int, text: str) -> Line:
    try:
        fields = msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise _wrong(path, number, "this is no JSON object", "a JSON object") from None
    kinds = [kind for kind in _KINDS if isinstance(fields, dict) and kind in fields]
    if len(kinds) != 1:
        raise _wrong(path, number, "a line has one of tenant, key, certificate", "one of tenant, key, certificate")
    try:
        return msgspec.convert(fields, _KINDS[kinds[0]])
    except msgspec.ValidationError as error:
        raise _wrong(path, number, *_told(kinds[0], str(error))) from None


def _told(kind: str, error: str) -> tuple[str, str]:
    """Find words for what is wrong with a line, and what is allowed. Nothing that stands in it is told: it may
    be a key in the wrong place."""
    reason, _, where = error.replace("`", "").partition(" - at $.")
    if where == "key":
        return f"key is no digest: {DIGEST_LIMIT}, as cierzo make-key writes it", DIGEST_LIMIT
    if where in ("tenant", "of"):
        return f"{where} is no name of a tenant: {NAME_LIMIT}", NAME_LIMIT
    if kind == "tenant" and where:
        return f"{where}: {reason[:1].lower()}{reason[1:]}", reason
    fields = ", ".join(field.encode_name for field in msgspec.structs.fields(_KINDS[kind]))
    rights = "" if kind == "tenant" else f"; rights are {', '.join(RIGHTS)}"
    return f"it may have {fields}{rights}", fields


def _put(into: dict[Any, T], name: Any, value: T, path: str, number: int, what: str) -> None:
    if name in into:
        raise _wrong(path, number, f"{what} is there twice", "once")
    into[name] = value


def _text(path: str) -> str:
    """The text of the file, if nobody else can read or write it. Its mode is looked at once it is open, so that
    it cannot be exchanged in between."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"keys: {path} is no file", field="keys", limit="a file", value=path)
            if status.st_mode & 0o077:
                shown = f"{stat.S_IMODE(status.st_mode):04o}"
                text = f"keys: others may read or change {path} (mode {shown}): chmod 600 {path}"
                raise ConfigError(text, field="keys", limit="0600", value=shown)
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        text = f"keys: {path}: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(text, field="keys", limit="a file that can be read", value=path) from error
    if len(data) > MAX_FILE_BYTES:
        text = f"keys: {path} has more than {MAX_FILE_BYTES} bytes"
        raise ConfigError(text, field="keys", limit=MAX_FILE_BYTES, value=f"more than {MAX_FILE_BYTES}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise _wrong(path, number, "this is no UTF-8", "UTF-8") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe without waiting for whoever writes into it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _wrong(path: str, number: int, what: str, limit: str) -> ConfigError:
    return ConfigError(
        f"keys: {path}, line {number}: {what}", field=f"keys, line {number}", limit=limit, value=path
    )
