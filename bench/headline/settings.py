"""How an engine is set for cells: the profile's settings, and room for as many clients as a cell has."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cierzo.bench.headline.cells import Cell, Subject
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.kv_room import AUTO_KV_REQUEST_TOKENS


class Room(msgspec.Struct, frozen=True):
    """An engine's room for a cell. fit: requests of full length that the KV cache holds; clients beyond them wait,
    or preempt each other. most: clients that are worth a try; `why` says what sets it."""

    fit: int
    most: int
    why: str


def engine_settings(model: str, device: str, subject: Subject, cells: Sequence[Cell]) -> dict[str, object]:
    """Options for cells of one profile; what stays open is the profile's. Raises ConfigError where it does not fit.

    max_running is at least the largest concurrency, and large enough for the engine to set aside a KV cache that
    holds that many: it plans for max_running requests of a usual length.
    """
    settings: dict[str, object] = {
        "model": model,
        "device": device,
        "profile": cells[0].profile,
        "weights": subject.weights,
        "kv_dtype": subject.kv_dtype,
        "activations": subject.activations,
        "max_model_len": max(cell.tokens for cell in cells),
    }
    usual_tokens = min(max(cell.tokens for cell in cells), AUTO_KV_REQUEST_TOKENS)
    clients = max(-(-(cell.concurrency or 0) * cell.tokens // usual_tokens) for cell in cells)
    limits = resolved(settings).scheduler
    if clients > limits.max_running:
        settings["max_running"] = min(clients, limits.budget_tokens)
    return settings


def resolved(settings: dict[str, object]) -> EngineConfig:
    """The configuration that the engine makes of settings. Raises ConfigError."""
    return resolve(msgspec.convert(settings, EngineOptions))


def room(config: EngineConfig, cell: Cell) -> Room:
    """The room of an engine that is configured so."""
    blocks, block_tokens = config.cache.num_blocks, config.cache.block_tokens
    fit = blocks // -(-cell.tokens // block_tokens)
    most, why = min((fit, "KV room"), (config.scheduler.max_running, "max_running"))
    return Room(fit, most, why)
