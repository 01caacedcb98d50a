"""Text that is printed at start."""

from __future__ import annotations

from cierzo.cache.layout import plan_capacity
from cierzo.engine.config import EngineConfig


def describe(config: EngineConfig) -> str:
    """The resolved settings and the capacity plan."""
    threads = "pinned threads" if config.pin_threads else "threads"
    rows = [
        ("model", f"{config.name} ({config.model.architecture}, {config.model.num_layers} layers)"),
        ("profile", config.profile),
        ("runner", f"{config.runner} on {config.device}, {config.dtype}, {config.threads} {threads}"),
        (
            "number formats",
            f"weights {config.weights}, activations {config.activations}, KV cache {config.layout.dtype}",
        ),
        ("max_model_len", f"{config.scheduler.max_model_len:,} tokens"),
        (
            "step",
            f"{config.scheduler.budget_tokens:,} tokens, chunks of {config.scheduler.max_chunk_tokens:,} "
            f"beside others, {config.scheduler.max_running:,} running, {config.scheduler.max_waiting:,} waiting",
        ),
        (
            "step time",
            f"chunks are cut to {1e3 * config.scheduler.max_step_s:,.6g} ms a step, by prediction"
            if config.scheduler.max_step_s
            else "no target: chunks are cut by tokens alone",
        ),
        ("prefix cache", "on" if config.cache.prefix_caching else "off"),
        ("steps", "overlapped" if config.overlap else "one by one"),
    ]
    if config.flight_folder:
        what = "with token ids" if config.record_prompts else "ids and lengths"
        rows.append(("flight record", f"{config.flight_folder} ({what})"))
    if config.model.moe is not None:
        rows.append(("experts", "counted" if config.expert_statistics else "not counted"))
    if config.card is not None:
        rows.append(("simulation", f"{config.card.describe()}; nothing is computed, tokens are made up"))
    lines = [f"{key:<14} {value}" for key, value in rows]
    return "\n".join([*lines, str(plan_capacity(config.layout, config.cache.num_blocks))])
