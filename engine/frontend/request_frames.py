"""A client's request as frames, within the limits that the server's welcome tells."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cierzo.engine.errors import FrameTooLarge, InvalidRequest
from cierzo.engine.frontend.frames import LENGTH_BYTES, pack
from cierzo.engine.frontend.wire_checks import ATTACHABLE, features
from cierzo.engine.messages import Attach, Generate, Limits, Message, Welcome

ATTACH_BYTES = 64  # of an attach frame beside its data, rounded up
_encode = msgspec.msgpack.Encoder().encode


def require(welcome: Welcome, feature: str, what: str) -> None:
    """Raise InvalidRequest if the server has not granted `feature`, which `what` needs."""
    if feature not in welcome.features:
        raise InvalidRequest(
            f"{what} needs the feature {feature}, which the server has not granted", field="features", limit=feature
        )


def check_request(message: Generate, welcome: Welcome) -> None:
    """Raise InvalidRequest for what the server is known to refuse."""
    limits = welcome.limits
    if message.idempotency_key is not None:
        require(welcome, "resume", "idempotency_key")
    features(message, welcome.features)
    if message.sampling.n > limits.max_samples:
        _refuse("sampling.n", message.sampling.n, "max_samples", limits.max_samples)
    if len(message.images) > limits.max_images:
        _refuse("images", len(message.images), "max_images", limits.max_images)
    for number, file in enumerate(message.images):
        if len(file) > limits.max_image_bytes:
            most = limits.max_image_bytes
            what = f"images[{number}] has {len(file)} bytes, allowed: {most} (max_image_bytes)"
            raise InvalidRequest(what, field=f"images[{number}]", limit=f"{most} bytes", value=len(file))
    if message.token_ids is not None:
        num_tokens = len(message.token_ids) + len(message.output_token_ids)
        if num_tokens >= limits.max_model_len:
            _refuse("token_ids", num_tokens, "max_model_len", limits.max_model_len)


def _refuse(field: str, value: int, name: str, limit: int) -> None:
    amount = f"{value} tokens, and one more must fit" if field == "token_ids" else value
    raise InvalidRequest(
        f"{field}: {amount}; the server's {name} is {limit}", field=field, limit=limit, value=value
    )


def frame_of(message: Message, limits: Limits) -> bytearray:
    """The frame of a message. Raises FrameTooLarge for one that the server would not read."""
    frame = pack([message])
    if (size := len(frame) - LENGTH_BYTES) > limits.max_frame_bytes:
        raise _too_large(f"the request is {size} bytes long", "max_frame_bytes", limits.max_frame_bytes, size)
    return frame


def request_frames(message: Generate, welcome: Welcome) -> bytearray:
    """The frames of a request: one, or, if it is too long for that, attached parts before it: its images, and, if
    it is still too long, its prompt.

    Raises FrameTooLarge for one that cannot be sent.
    """
    limits = welcome.limits
    attached: list[tuple[int | None, bytes]] = []
    try:
        return frame_of(message, limits)
    except FrameTooLarge:
        if "attach" not in welcome.features:
            raise
    if message.images:
        attached += enumerate(message.images)
        message = msgspec.structs.replace(message, images=[])
    try:
        last = frame_of(message, limits)
    except FrameTooLarge:
        field = next((name for name in ATTACHABLE if getattr(message, name) is not None), None)
        if field is None:
            raise
        attached.append((None, _encode(getattr(message, field))))
        last = frame_of(msgspec.structs.replace(message, **{field: None}, attached=field), limits)
    num_bytes = sum(len(data) for _, data in attached)
    if num_bytes > (limit := limits.max_attached_bytes):
        what = "images and prompt are" if attached[0][0] is not None else f"{field} is"
        raise _too_large(f"{what} {num_bytes} bytes long", "max_attached_bytes", limit, num_bytes)
    return pack(_parts(message.stream, attached, limits.max_frame_bytes - ATTACH_BYTES)) + last


def _parts(stream: int, attached: list[tuple[int | None, bytes]], step: int) -> Iterator[Attach]:
    """Messages that attach these, in pieces of at most `step` bytes: images by their number, a prompt without."""
    for image, data in attached:
        for at in range(0, max(len(data), 1), step):
            yield Attach(stream=stream, data=data[at : at + step], image=image)


def _too_large(what: str, name: str, limit: int, size: int) -> FrameTooLarge:
    return FrameTooLarge(f"{what}, the server's {name} {limit}", field=name, limit=limit, value=size)
