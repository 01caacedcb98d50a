"""Files of images, good ones and such as attack their reader."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cierzo.engine.messages import VisionInfo
from cierzo.engine.text.image_tokens import MEAN, STD

IMG, BREAK, END = 10, 12, 13
VISION = VisionInfo(
    patch=14,
    merge=2,
    max_side_px=1540,
    mean=MEAN,
    std=STD,
    image_token_id=IMG,
    break_token_id=BREAK,
    end_token_id=END,
)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Random pixels [height, width, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file of this format."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(width: int = 40, height: int = 30, kind: str = "PNG", seed: int = 0, **options: Any) -> bytes:
    """A file with random pixels."""
    return file_of(Image.fromarray(noise(width, height, seed=seed)), kind, **options)


def animated(kind: str, frames: int = 3) -> bytes:
    """A file of several frames, the first of which is red."""
    colours = ["red", *("blue" if number % 2 else "green" for number in range(1, frames))]
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in colours]
    return file_of(first, kind, save_all=True, append_images=others, duration=100)


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, rows: bytes, *more: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of these rows, uncompressed, and further chunks before them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    )


def bomb(side: int = 12_000) -> bytes:
    """A PNG of a few kilobytes that decodes to `side` times `side` pixels of one bit."""
    row = bytes(1 + (side + 7) // 8)
    return png(side, side, row * side, depth=1)


def gif_beyond_its_screen() -> bytes:
    """A GIF whose header says 1 x 1, and whose first frame says 20,000 x 20,000."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 20_000, 20_000, 0)
    return head + frame + b"\x02\x02\x44\x01\x00;"
