"""The images of a request: which file belongs to which part, and what no image may be. Decoding is
`text/images.py`, which needs numpy and Pillow and is imported with the first image."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from hashlib import blake2b

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.bounds import shown
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.messages import Generate, ImageChunk, ModelInfo
from cierzo.engine.text.image_tokens import Images, require_few

DIGEST_BYTES = 16
SEERS = ("user", "tool")  # roles whose turns may have images
_DATA_URL = re.compile("data:(?:image/[-+.a-zA-Z0-9]{1,40})?;base64,", re.IGNORECASE)


def parts_of(message: Generate) -> Iterator[tuple[str, str, ImageChunk]]:
    """The parts of a conversation that are images, each behind its field and the role of its turn."""
    for number, turn in enumerate(message.messages or ()):
        if not isinstance(turn.content, str):
            for index, chunk in enumerate(turn.content):
                if isinstance(chunk, ImageChunk):
                    yield f"messages[{number}].content[{index}]", turn.role, chunk


def lacks_files(message: Generate) -> bool:
    """Whether some of its images must have come before it."""
    return len(message.images) < sum(not chunk.url for _, _, chunk in parts_of(message))


def check(message: Generate, config: FrontendConfig, model: ModelInfo, num_attached: int = 0) -> None:
    """Check what a message says of its images, before one of them is looked at. num_attached: files that came
    before it. Raises InvalidRequest."""
    parts, num_files = [*parts_of(message)], num_attached + len(message.images)
    if not parts and not num_files:
        return
    field = parts[0][0] if parts else "images"
    if model.vision is None:
        what = f"{field}: the served model takes text alone, and no images"
        raise InvalidRequest(what, field=field, limit="text", value="an image")
    if num_attached and message.images:
        raise twice(num_attached, len(message.images))
    require_few([at for at, *_ in parts] or [f"images[{each}]" for each in range(num_files)], config.max_images)
    for field, role, chunk in parts:
        if role not in SEERS:
            limit = f"a turn of the role {' or '.join(SEERS)}"
            raise InvalidRequest(f"{field}: an image belongs to {limit}", field=field, limit=limit, value=role)
        if chunk.digest and len(chunk.digest) != DIGEST_BYTES:
            what = f"{field}.digest has {len(chunk.digest)} bytes, allowed: {DIGEST_BYTES}"
            raise InvalidRequest(
                what, field=f"{field}.digest", limit=f"{DIGEST_BYTES} bytes", value=len(chunk.digest)
            )
    if message.text is not None:
        what = "images belong to a prompt of messages, or to token_ids that hold their tokens"
        raise InvalidRequest(what, field="images", limit="with messages or token_ids", value=num_files)
    if message.messages is not None:
        _check_files([field for field, _, chunk in parts if not chunk.url], num_files)


def twice(num_attached: int, num_own: int) -> InvalidRequest:
    """The error for images that came both ways, so that nobody can tell their order."""
    what = f"{num_attached} images are attached to this stream, and generate has {num_own} of its own"
    return InvalidRequest(what, field="images", limit="attached or in generate", value=num_attached + num_own)


def _check_files(fields: list[str], num_files: int) -> None:
    """Each part without a URL has a file of its own."""
    if len(fields) > num_files:
        what = f"{fields[num_files]} is an image without a url, and no file came for it: there are {num_files}"
        limit = f"{len(fields)} files of images"
        raise InvalidRequest(what, field=fields[num_files], limit=limit, value=num_files)
    if len(fields) < num_files:
        what = f"{num_files} files of images came, and messages have {len(fields)} image parts without a url"
        raise InvalidRequest(what, field=f"images[{len(fields)}]", limit=len(fields), value=num_files)


def images_of(message: Generate, config: FrontendConfig, model: ModelInfo) -> Images:
    """The images of a message that `check` has let pass, decoded. Takes up to a second for each. Raises
    InvalidRequest, with the part that is wrong."""
    vision = model.vision
    parts = [*parts_of(message)]
    if vision is None or not (parts or message.images):
        return Images((), vision)
    from cierzo.engine.text.images import ImageLimits, prepare

    files, fields = [*message.images], [f"images[{number}]" for number in range(len(message.images))]
    if message.messages is not None:
        given = iter(message.images)
        fields = [field for field, _, _ in parts]
        files = [
            _from_url(f"{field}.url", chunk.url, config) if chunk.url else next(given) for field, _, chunk in parts
        ]
        for field, (_, _, chunk), file in zip(fields, parts, files, strict=True):
            if chunk.digest and blake2b(file, digest_size=DIGEST_BYTES).digest() != chunk.digest:
                found = blake2b(file, digest_size=DIGEST_BYTES).hexdigest()
                what = f"{field}.digest is not that of the file which came for it, {found}"
                raise InvalidRequest(what, field=f"{field}.digest", limit=found, value=chunk.digest.hex())
    limits = ImageLimits(
        config.max_images, config.max_image_bytes, config.max_image_pixels, config.max_image_tokens
    )
    return Images(prepare(files, fields, vision, limits), vision)


def _from_url(field: str, url: str, config: FrontendConfig) -> bytes:
    """The file that a data URL is. Nothing is ever fetched or opened."""
    head = _DATA_URL.match(url)
    if head is None:
        limit = "data:image/...;base64,..."
        what = f"{field} is {shown(url)!r}, allowed: {limit}: no address is fetched and no file opened"
        raise InvalidRequest(what, field=field, limit=limit, value=shown(url))
    num_bytes = (len(url) - head.end()) * 3 // 4
    if num_bytes > config.max_image_bytes + 2:
        what = f"{field} is of about {num_bytes} bytes, allowed: {config.max_image_bytes} (max_image_bytes)"
        raise InvalidRequest(what, field=field, limit=f"{config.max_image_bytes} bytes", value=num_bytes)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(
            f"{field} is no base64: {error}", field=field, limit="base64", value=shown(url)
        ) from error
