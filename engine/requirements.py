"""Memory that a checkpoint needs to be served: on which cards it fits in which number format, and whether on this
machine's CPU. Each answer is what `resolve` decides for those settings: there is no second count. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cierzo.engine.config import KV_BYTE_FORMAT, EngineOptions, resolve
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.errors import ConfigError, size
from cierzo.engine.host import available_memory_bytes
from cierzo.engine.kv_room import SERVED_CONTEXT_TOKENS, longest_request
from cierzo.engine.model.config import ModelConfig
from cierzo.kernels.formats.number_formats import formats_on, plain_format

COUNTS = (1, 2, 4, 8)  # of equal cards
PLAIN = "bfloat16"  # the cache's dtype, unless it is given
GB = 10**9
SEVERAL = "several cards: planned, as by `cierzo plan`; one process computes on one card today"


class Fit(msgspec.Struct, frozen=True):
    """A card, or several, on which a model fits with requests of so many tokens."""

    device: str
    max_model_len: int


class CardNeed(msgspec.Struct, frozen=True):
    """Memory that the weights take on GPUs in a number format, and the fewest cards of each kind that have it."""

    weights: str
    weight_bytes: int
    fits: tuple[Fit, ...]


class HostNeed(msgspec.Struct, frozen=True):
    """Memory of this machine that the weights take in a number format, and the KV cache that goes with them."""

    weights: str
    weight_bytes: int
    kv_bytes: int
    fits: bool


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that a model needs. request_tokens: the longest request that is served unasked; request_bytes: its
    cache, by number format."""

    request_tokens: int
    request_bytes: dict[str, int]
    cards: tuple[CardNeed, ...]
    host: tuple[HostNeed, ...]
    free_bytes: int

    def rows(self) -> Iterator[tuple[str, str]]:
        """Labels and what `cierzo info` prints beside them."""
        each = (f"{size(held, up=True)} in {format}" for format, held in self.request_bytes.items())
        yield "longest request", f"{self.request_tokens:,} tokens; the KV cache of one takes {', '.join(each)}"
        sizes = ", ".join(f"{name} {sheet.memory_bytes // GB} GB" for name, sheet in DATA_SHEETS.items())
        yield "on GPUs", f"weights, and the fewest cards that have room for them and one such request ({sizes})"
        for need in self.cards:
            fits = ", ".join(self._fit(fit) for fit in need.fits) or "none"
            yield f"  {need.weights}", f"{size(need.weight_bytes, up=True)}: {fits}"
        if any(fit.device not in DATA_SHEETS for need in self.cards for fit in need.fits):
            yield "", SEVERAL
        what = "weights, and the KV cache of all requests together unless --kv-cache-gib says otherwise"
        yield "on this CPU", f"{what} ({size(self.free_bytes)} of memory are free)"
        for host in self.host:
            weights, cache = (size(held, up=True) for held in (host.weight_bytes, host.kv_bytes))
            fits = "fits" if host.fits else "does not fit"
            yield f"  {host.weights}", f"{weights} of weights, {cache} of cache: {fits}"

    def _fit(self, fit: Fit) -> str:
        less = "" if fit.max_model_len >= self.request_tokens else f" (up to {fit.max_model_len:,} tokens)"
        return fit.device + less


def needs_of(folder: Path, model: ModelConfig) -> Needs:
    """Needs of the model in a folder whose config can be read."""
    longest = longest_request(model.max_position_embeddings or SERVED_CONTEXT_TOKENS, None)
    return Needs(
        request_tokens=longest,
        request_bytes={
            name: longest * model.cache_layout(1, dtype).bytes_per_token
            for name, dtype in ((plain_format(PLAIN), PLAIN), (KV_BYTE_FORMAT["cuda"],) * 2)
        },
        cards=tuple(_card_need(folder, model, weights, longest) for weights in formats_on("cuda")),
        host=tuple(_host_need(folder, model, weights, longest) for weights in formats_on("cpu")),
        free_bytes=available_memory_bytes(),
    )


def _card_need(folder: Path, model: ModelConfig, weights: Any, longest: int) -> CardNeed:
    fits: list[Fit] = []
    for card in DATA_SHEETS:
        for count in COUNTS:
            fit = _fit(folder, card if count == 1 else f"{count}x{card}", weights, longest, model.vision is None)
            fits += [] if fit is None else [fit]
            if fit is not None and fit.max_model_len >= longest:
                break
    return CardNeed(weights, weight_bytes(model, NumberFormats(weights=weights)), tuple(fits))


def _fit(folder: Path, device: str, weights: Any, longest: int, text_only: bool) -> Fit | None:
    """The longest request that a device has room for beside the weights; None where not even they fit."""
    for tokens in (longest, None):
        try:
            options = EngineOptions(
                model=str(folder),
                device=f"simulated:{device}",
                weights=weights,
                max_model_len=tokens,
                text_only=text_only,
            )
            return Fit(device, resolve(options).scheduler.max_model_len)
        except ConfigError:
            continue
    return None


def _host_need(folder: Path, model: ModelConfig, weights: Any, longest: int) -> HostNeed:
    taken = weight_bytes(model, NumberFormats(weights=weights, on_gpu=False))
    options = EngineOptions(model=str(folder), device="cpu", weights=weights, text_only=model.vision is None)
    if model.max_position_embeddings is None:
        options = msgspec.structs.replace(options, max_model_len=longest)
    try:
        config = resolve(options)
    except ConfigError:  # not even the cache has room
        return HostNeed(weights, taken, 0, False)
    kv_bytes = config.cache.num_blocks * config.layout.bytes_per_block
    return HostNeed(weights, taken, kv_bytes, taken + kv_bytes <= available_memory_bytes())
