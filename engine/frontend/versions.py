"""Messages for clients that speak the version of the protocol before this one."""

from __future__ import annotations

from functools import partial

import msgspec

from cierzo.engine.messages import Health, Message, Stats

# Gauges and counters that version 3 added to `CoreStats`; a value that is the default is not sent.
_NEW_STATS = {
    "computed_tokens": 0,
    "recomputed_tokens": 0,
    "sequence_steps": 0,
    "kv_block_s": 0.0,
    "waiting_tokens": 0,
    "prefill_tokens_per_s": 0.0,
    "step_s": 0.0,
}
_without_new = partial(msgspec.structs.replace, **_NEW_STATS)


def as_version_2(message: Message) -> Message:
    """Take from a message the fields and values that version 2 does not have."""
    if isinstance(message, Stats):
        return msgspec.structs.replace(message, core=_without_new(message.core))
    if isinstance(message, Health) and message.state == "stalled":
        return msgspec.structs.replace(message, state="loading")
    return message
