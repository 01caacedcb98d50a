"""Messages for clients that speak the version of the protocol before this one, or know fewer features."""

from __future__ import annotations

from functools import partial

import msgspec

from cierzo.engine.messages import CoreStats, Health, Message, ModelInfo, Stats

# Gauges and counters that version 3 added to `CoreStats`. Their defaults are not sent: msgspec knows a float that
# is the default by its identity, so these are the very objects.
_NEW_STATS = {
    name: getattr(CoreStats(), name)
    for name in (
        *("computed_tokens", "recomputed_tokens", "sequence_steps", "kv_block_s"),
        *("waiting_tokens", "prefill_tokens_per_s", "step_s"),
        *("prompt_row_s", "prompt_pair_s", "prefill_share", "max_chunk_tokens"),
    )
}
_without_new = partial(msgspec.structs.replace, **_NEW_STATS)


def without_parts(model: ModelInfo) -> ModelInfo:
    """Take from a model's description what is told with the feature "parts" alone."""
    return msgspec.structs.replace(model, reasoning_efforts=[], marks_thinking=False, marks_calls=False)


def as_version_2(message: Message) -> Message:
    """Take from a message the fields and values that version 2 does not have."""
    if isinstance(message, Stats):
        return msgspec.structs.replace(message, core=_without_new(message.core))
    if isinstance(message, Health) and message.state == "stalled":
        return msgspec.structs.replace(message, state="loading")
    return message
