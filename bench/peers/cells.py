"""The cells in which engines are measured, and the arithmetic from raw times to a figure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Cell(msgspec.Struct, frozen=True, omit_defaults=True):
    """A column of the table. `kind` says how it is measured; sizes that a kind does not use are 0.

    decode: `batch` requests of `prompt_tokens`, `new_tokens` each, greedy, without end token; tokens per second of
    the time in which all of them decode. prefill: one prompt of `prompt_tokens` to its first token. served: a
    closed loop of `batch` clients over the server's own protocol, `requests` of `prompt_tokens` (of which
    `shared_tokens` begin every prompt) and `new_tokens`. agreement: `batch` sequences of `prompt_tokens`. load,
    memory: by-products.
    """

    name: str
    kind: str
    unit: str
    batch: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    requests: int = 0
    shared_tokens: int = 0

    def __str__(self) -> str:
        sizes = [(name, size) for name, size in msgspec.structs.asdict(self).items() if isinstance(size, int)]
        told = ", ".join(f"{name.removesuffix('_tokens')} {size}" for name, size in sizes if size)
        return f"{self.name} ({told})" if told else self.name


class Subject(msgspec.Struct, frozen=True):
    """An engine on a checkpoint, both by name."""

    checkpoint: str
    engine: str

    def __str__(self) -> str:
        return f"{self.checkpoint} {self.engine}"


LOAD, SERVED_LOAD = Cell("load", "load", "s"), Cell("load-served", "load", "s")
MEMORY, SERVED_MEMORY = Cell("memory", "memory", "GB"), Cell("memory-served", "memory", "GB")
BY_PRODUCTS = (LOAD, SERVED_LOAD, MEMORY, SERVED_MEMORY)
AGREEMENT = Cell("agreement", "agreement", "%", batch=4, prompt_tokens=64)


def cells(*, quick: bool) -> tuple[Cell, ...]:
    """The columns in order, without by-products; `quick` has the same ones with fewer tokens, requests, clients."""
    new_tokens, requests, clients, chats = (32, 16, 16, 8) if quick else (64, 96, 32, 32)
    return (
        AGREEMENT,
        *(Cell(f"decode-{batch}", "decode", "tok/s", batch, 128, new_tokens) for batch in (1, 8, 32)),
        *(Cell(f"prefill-{tokens}", "prefill", "tok/s", prompt_tokens=tokens) for tokens in (512, 2048, 8192)),
        Cell("served", "served", "req/s", clients, 512, 64, requests),
        Cell("chat", "served", "req/s", chats, 1152, 64, chats * requests // clients, 1024),
    )


def decode_rate(times_s: Sequence[Sequence[float]]) -> float:
    """Tokens per second of all requests together, from each one's token times.

    Counted from the moment at which every request has its first token, so that no prefill is in it, to that of the
    first request's last token, so that all of them decode all the time. Raises ValueError where no such time is.
    """
    start = max(times[0] for times in times_s)
    end = min(times[-1] for times in times_s)
    tokens = sum(start < time <= end for times in times_s for time in times)
    if tokens == 0:
        raise ValueError(f"no step in which all {len(times_s)} requests decode: raise the number of new tokens")
    return tokens / (end - start)
