"""Images as clients send them, made into the pixels that a vision tower takes.

A file's header is checked before anything is decoded: a few kilobytes can hold more pixels than a machine has
memory. Pillow decodes, and knows four formats here and no others. Resizing is numpy's, in the arithmetic of
opencv's INTER_CUBIC (a = -0.75, no antialiasing), by which Mistral's models were trained; Pillow's own bicubic is
another one.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from hashlib import blake2b

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import VisionInfo
from cierzo.engine.text.image_tokens import Grid, Prepared, grid_of, require_few, unit_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_STILL = {"PNG", "WEBP"}  # formats of which one with several frames is refused; of a GIF the first one is taken
_DEEP = ("I;16", "I;16B", "I;16L", "I")  # Pillow's modes of 16-bit grey
_ORIENTATION = 0x0112  # of EXIF
_TURNED = (5, 6, 7, 8)  # its values that swap width and height
_CUBIC_A = -0.75
_BLOCK_ROWS = 64  # of output that are resized at a time: what that takes besides is a few megabytes
# Of a JPEG, in each of which all its pixels may be gone through again; the usual progressive one has ten.
MAX_JPEG_SCANS = 64
_SCAN = b"\xff\xda"  # of a JPEG; within a scan's data a zero follows 0xff
DIGEST_BYTES = 16
MAX_REASON_CHARS = 200


class ImageLimits(msgspec.Struct, frozen=True):
    """Limits on the images of a request: their number, of each the bytes of its file and the pixels that it
    decodes to, and the tokens of all."""

    max_images: int
    max_image_bytes: int
    max_image_pixels: int
    max_image_tokens: int


def prepare(
    files: Sequence[bytes], fields: Sequence[str], vision: VisionInfo, limits: ImageLimits
) -> list[Prepared]:
    """Decode, turn and resize the images of one request. `fields`: what each is called in errors.

    All headers are checked before the first image is decoded. Raises InvalidRequest, with the image's field, the
    limit and the value.
    """
    require_few(fields, limits.max_images)
    opened = [_opened(file, field, limits) for file, field in zip(files, fields, strict=True)]
    fewest = 0
    for image, field in zip(opened, fields, strict=True):
        fewest += _fewest_tokens(image, vision)
        _check_tokens(fewest, field, limits)
    prepared: list[Prepared] = []
    for image, field in zip(opened, fields, strict=True):
        with image:
            rgb = _decoded(image, field, limits)
        grid = grid_of(rgb.shape[1], rgb.shape[0], vision)
        _check_tokens(grid.num_tokens + sum(other.grid.num_tokens for other in prepared), field, limits)
        prepared.append(_prepared(rgb, grid, vision))
    return prepared


def _check_tokens(num_tokens: int, field: str, limits: ImageLimits) -> None:
    """Raise InvalidRequest where the images up to this one have too many tokens."""
    if num_tokens > limits.max_image_tokens:
        most = limits.max_image_tokens
        what = f"{field}: the images have {num_tokens} tokens or more, allowed: {most} (max_image_tokens)"
        raise InvalidRequest(what, field=field, limit=f"{most} tokens", value=num_tokens)


def resized(image: NDArray[np.uint8] | NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """`image` [H, W, C] at another size, as float32 of the same range, as opencv's INTER_CUBIC makes it."""
    rows, by_row = _taps(image.shape[0], height)
    columns, by_column = _taps(image.shape[1], width)
    out = np.empty((height, width, image.shape[2]), np.float32)
    for start in range(0, height, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        needed, near = np.unique(rows[block], return_inverse=True)
        near = near.reshape(-1, 4)
        # Along the rows first, as opencv does: of a row with millions of pixels `width` are made, and no more.
        lines = _weighted(by_column[:, :, None], image[needed], columns, axis=1)
        out[block] = _weighted(by_row[block, :, None, None], lines, near, axis=0)
    return out


def _weighted(
    weights: NDArray[np.float32], pixels: NDArray[np.uint8] | NDArray[np.float32], near: NDArray[np.intp], axis: int
) -> NDArray[np.float32]:
    """The sum of four neighbours along an axis. near: [n, 4], their places; weights: [n, 4, ...]."""
    total: NDArray[np.float32] = weights[:, 0] * pixels.take(near[:, 0], axis)
    for tap in range(1, 4):
        total += weights[:, tap] * pixels.take(near[:, tap], axis)
    return total


def _taps(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Neighbours on a line of `old` pixels, and their weights, of each of `new` places: [new, 4] of both. Beyond an
    end the last pixel is repeated."""
    at = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(at)
    x = (at - first).astype(np.float32)
    y, a = np.float32(1) - x, np.float32(_CUBIC_A)
    weights = np.empty((new, 4), np.float32)
    weights[:, 0] = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a
    weights[:, 1] = ((a + 2) * x - (a + 3)) * x * x + 1
    weights[:, 2] = ((a + 2) * y - (a + 3)) * y * y + 1
    weights[:, 3] = 1 - weights[:, 0] - weights[:, 1] - weights[:, 2]
    places = first.astype(np.intp)[:, None] + np.arange(-1, 3)
    return places.clip(0, old - 1), weights


def _prepared(rgb: NDArray[np.uint8], grid: Grid, vision: VisionInfo) -> Prepared:
    unit = unit_of(vision)
    pixels = resized(rgb, grid.columns * unit, grid.rows * unit)
    pixels /= np.float32(255)
    pixels -= np.asarray(vision.mean, np.float32)
    pixels /= np.asarray(vision.std, np.float32)
    packed = pixels.astype("<f4", copy=False).tobytes()
    shape = np.asarray([grid.rows, grid.columns], "<u4").tobytes()
    digest = blake2b(packed, digest_size=DIGEST_BYTES)
    digest.update(shape)
    return Prepared(grid, digest.digest(), packed)


# --- files -------------------------------------------------------------------------------------------------


def _opened(file: bytes, field: str, limits: ImageLimits) -> Image.Image:
    """The image with its header read, and nothing decoded."""
    if len(file) > limits.max_image_bytes:
        what = f"{field} has {len(file)} bytes, allowed: {limits.max_image_bytes} (max_image_bytes)"
        raise InvalidRequest(what, field=field, limit=f"{limits.max_image_bytes} bytes", value=len(file))
    if (size := _webp_size(file)) is not None:  # its decoder makes room for all of them with the header
        _check_pixels(*size, field, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the next line is stricter
            image = Image.open(io.BytesIO(file), formats=FORMATS)
    except Image.DecompressionBombError as error:
        num_pixels = re.search(r"\d+", str(error))  # Pillow says them before we can ask
        raise _too_large(field, limits, int(num_pixels[0]) if num_pixels else 0) from error
    except UnidentifiedImageError as error:
        raise _no_image(field, "it is of another format, or cut" if file else "it is empty") from error
    except Exception as error:  # what a decoder of other people's files may raise
        raise _broken(field, "file", error) from error
    _check_pixels(*image.size, field, limits)
    if image.format == "JPEG" and (scans := file.count(_SCAN)) > MAX_JPEG_SCANS:
        what = f"{field} is a JPEG of {scans} scans, allowed: {MAX_JPEG_SCANS}"
        raise InvalidRequest(what, field=field, limit=f"{MAX_JPEG_SCANS} scans", value=scans)
    frames = getattr(image, "n_frames", 1) if image.format in _STILL else 1
    if frames != 1:
        what = f"{field} is an animated {image.format} of {frames} frames"
        raise InvalidRequest(what, field=field, limit="1 frame; of a GIF the first is taken", value=frames)
    return image


def _check_pixels(width: int, height: int, field: str, limits: ImageLimits) -> None:
    if width * height > limits.max_image_pixels:
        raise _too_large(field, limits, width * height, f" ({width} x {height})")


def _too_large(field: str, limits: ImageLimits, num_pixels: int, sides: str = "") -> InvalidRequest:
    most = limits.max_image_pixels
    what = f"{field} has {num_pixels} pixels{sides}, allowed: {most} (max_image_pixels)"
    return InvalidRequest(what, field=field, limit=f"{most} pixels", value=num_pixels)


def _no_image(field: str, said: str) -> InvalidRequest:
    known = ", ".join(FORMATS)
    what = f"{field} is no whole image of {known}: {said}"
    return InvalidRequest(what, field=field, limit=known, value=said)


def _broken(field: str, kind: str, error: Exception) -> InvalidRequest:
    return _no_image(field, f"a {kind} that is cut or broken ({type(error).__name__}: {error})"[:MAX_REASON_CHARS])


def _webp_size(file: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP's header tells; None for other files."""
    if file[:4] != b"RIFF" or file[8:12] != b"WEBP" or len(file) < 30:
        return None
    match file[12:16]:
        case b"VP8X":
            return int.from_bytes(file[24:27], "little") + 1, int.from_bytes(file[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(file[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(file[26:28], "little") & 0x3FFF, int.from_bytes(file[28:30], "little") & 0x3FFF


def _fewest_tokens(image: Image.Image, vision: VisionInfo) -> int:
    """Tokens that an image has at least, whichever way up it is: that may be known only once it is decoded."""
    width, height = image.size
    return min(grid_of(width, height, vision).num_tokens, grid_of(height, width, vision).num_tokens)


def _decoded(image: Image.Image, field: str, limits: ImageLimits) -> NDArray[np.uint8]:
    """The pixels [H, W, 3] of an opened image: turned as its EXIF says, over white where it is transparent."""
    size = image.size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image.load()
            if image.size != size:  # a frame of a GIF may be larger than its header says
                _check_pixels(*image.size, field, limits)
            return np.asarray(_turned(_rgb(image), _orientation(image)))
    except InvalidRequest:
        raise
    except Exception as error:  # what a decoder of other people's files may raise
        raise _broken(field, image.format or "file", error) from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where it is broken."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    if orientation not in range(2, 9):
        return image
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    image.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(image)


def _rgb(image: Image.Image) -> Image.Image:
    """The image in three channels of 8 bits."""
    if image.mode in _DEEP:
        deep = np.asarray(image)
        alpha = deep != image.info["transparency"] if "transparency" in image.info else None
        grey = Image.fromarray((deep >> 8).clip(0, 255).astype(np.uint8))
        if alpha is None:
            return grey.convert("RGB")
        grey.putalpha(Image.fromarray(alpha.astype(np.uint8) * np.uint8(255)))
        image = grey
    if image.mode in ("RGB", "L", "CMYK", "YCbCr", "1") and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "WHITE")
    white.paste(image, (0, 0), image)
    return white.convert("RGB")
