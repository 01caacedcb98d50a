"""Random connections of a client that sends images: files, parts, digests and numbers that nearly fit."""

from __future__ import annotations

import base64
import random
from hashlib import blake2b
from typing import Any

import msgspec
from simulation.images import vision
from support.image_files import animated, picture

from cierzo.engine.text.image_tokens import grid_of, tokens_of

VOCAB = 128
SIZES = ((1, 1), (3, 1), (1, 4), (2, 3))
GOOD = [(size, picture(*size, kind, seed=seed)) for size in SIZES for kind in ("PNG", "GIF") for seed in (0, 1)]
BAD = [b"", b"GIF89a", picture(8, 8, "BMP"), animated("WEBP"), GOOD[0][1][:40], picture(90, 90)]
HELLO = {"type": "hello", "magic": "cierzo", "version": 3, "features": ["attach", "images", "parts", "resume"]}


def connection(rng: random.Random) -> bytes:
    """All frames of a connection: a hello, and requests with images of which most fit."""
    messages: list[dict[str, Any]] = [HELLO]
    for stream in range(1, rng.choice((2, 3, 5))):
        messages += _request(rng, stream)
    bodies = [msgspec.msgpack.encode(message) for message in messages]
    return b"".join(len(body).to_bytes(4, "big") + body for body in bodies)


def _request(rng: random.Random, stream: int) -> list[dict[str, Any]]:
    drawn = [rng.choice(GOOD) for _ in range(rng.choice((1, 1, 2, 3)))]
    files = [rng.choice(BAD) if rng.random() < 0.1 else file for _, file in drawn]
    generate: dict[str, Any] = {"type": "generate", "stream": stream, "sampling": {"max_tokens": rng.randint(1, 9)}}
    if rng.random() < 0.3:
        parts = [_part(rng, file) for file in files]
        role = rng.choice(("user", "user", "tool", "system"))
        generate["messages"] = [{"role": role, "content": [*parts, {"type": "text", "text": "a"}]}]
        files = [file for file, part in zip(files, parts, strict=True) if not part.get("url")]
    else:
        generate["token_ids"] = _tokens(rng, [size for size, _ in drawn])
    if rng.random() < 0.1:
        files = [*files, b"one more"] if rng.random() < 0.5 else files[1:]
    ahead: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        ahead = [piece for number, file in enumerate(files) for piece in _pieces(rng, stream, number, file)]
        if rng.random() < 0.15:
            rng.shuffle(ahead)
    if not ahead or rng.random() < 0.05:
        generate["images"] = files
    behind = [{"type": "cancel", "stream": stream}] if rng.random() < 0.2 else []
    sent = [*ahead, generate, *behind]
    if rng.random() < 0.05:
        del sent[rng.randrange(len(sent))]
    return sent


def _part(rng: random.Random, file: bytes) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "image"}
    if rng.random() < 0.3:
        part["digest"] = rng.choice((blake2b(file, digest_size=16).digest(), bytes(16), b"short"))
    if rng.random() < 0.4:
        data = base64.b64encode(file).decode()
        part["url"] = rng.choice((f"data:image/png;base64,{data}", f"data:;base64,{data}", "file:///etc/passwd"))
    return part


def _tokens(rng: random.Random, sizes: list[tuple[int, int]]) -> list[int]:
    """Prompts with the images' tokens, now and then in another order, at another place, or not whole."""
    token_ids: list[int] = []
    for size in sizes:
        token_ids += [rng.randrange(2, VOCAB - 3) for _ in range(rng.choice((0, 1, 7)))]
        token_ids += tokens_of(grid_of(*size, vision(VOCAB)), vision(VOCAB))
    if rng.random() < 0.1:
        place = rng.randrange(len(token_ids))
        token_ids[place] = rng.choice((5, VOCAB - 3, VOCAB - 2, VOCAB - 1))
    return token_ids


def _pieces(rng: random.Random, stream: int, number: int, file: bytes) -> list[dict[str, Any]]:
    cut = rng.randrange(len(file) + 1)
    parts = (file[:cut], file[cut:]) if rng.random() < 0.5 else (file,)
    number += rng.choice((-1, 1, 9)) if rng.random() < 0.03 else 0
    return [{"type": "attach", "stream": stream, "data": part, "image": number} for part in parts]
