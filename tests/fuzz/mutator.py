"""Seeded mutation of MessagePack: small damage to messages that are nearly right."""

from __future__ import annotations

import random
from collections.abc import Sequence

# Heads of MessagePack values that announce more than there is, nest, or are never used; lengths of frames.
INTERESTING = (
    b"\xc1",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\x00\x01\x00\x00",
    b"\xdc\xff\xff",
    b"\xc6\x7f\xff\xff\xff",
    b"\xdb\x00\x00\x10\x00",
    b"\x91" * 40,
    b"\x81\xa1a" * 30,
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"\xa4type",
    b"\xa6stream\xff",
    b"\xa2\xc3\x28",
    b"\xc0",
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\x00\x40\x00\x01",
)


def mutated(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """An entry of the corpus with one to four kinds of damage."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 2:
            data[at:at] = rng.choice(INTERESTING)
        elif kind == 3:
            del data[at : at + rng.choice((1, 1, 4, 30))]
        elif kind == 4:
            interesting = rng.choice(INTERESTING)
            data[at : at + len(interesting)] = interesting
        elif kind == 5:
            other = rng.choice(corpus)
            begin = rng.randrange(len(other) + 1)
            data[at:] = other[begin:]
        else:
            data[at:at] = data[at : at + rng.choice((1, 8, 100))]
    return bytes(data)
