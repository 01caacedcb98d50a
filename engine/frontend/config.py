"""Limits of the front end. Every one is enforced, told to clients where it concerns them, and tested."""

from __future__ import annotations

import msgspec


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resolved limits of the RPC server; past each one a request is refused at once, with a named reason.

    Connections:
    - `address`: "HOST:PORT" (TCP) or "unix:PATH". Nothing but the loopback interface unless told otherwise.
    - `max_frame_bytes`: longest frame body accepted. 256k token ids take at most 5 bytes each.
    - `max_connections`: open at one time; the next one gets "overloaded" and is closed.
    - `max_streams_per_connection`: open generations of one connection.
    - `handshake_timeout_s`: a connection that has not said Hello by then is closed.
    - `high_water_bytes`: unsent bytes of a connection above which its deltas are merged instead of written.
    - `max_pending_bytes`: merged output that one connection may leave unread before it is closed.

    Requests:
    - `max_open_samples`: answers being generated over all connections (a request with n = 4 counts as 4).
    - `max_open_tokens`: prompt and resumed tokens of all open requests together: bounds the memory they take.
    - `max_samples`: largest `n`.
    - `max_stop_strings`, `max_stop_chars`: number and length of stop strings, `max_stop_token_ids` of stop tokens.
    - `max_logprobs`: most alternatives reported per token.
    - `max_logit_bias`: entries of `logit_bias`.
    - `max_abs_priority`: priorities lie within plus or minus this.
    - `max_deadline_s`: longest deadline.
    - `retry_after_s`: the hint given with "overloaded" and "draining".
    - `thread_encode_chars`: prompts longer than this are rendered and encoded in a thread, off the loop.

    Core process:
    - `max_core_restarts` within `core_restart_window_s`: one more death, and open requests fail.
    - `core_start_timeout_s`: longest wait for a core to say Ready (it loads the weights in this time).
    """

    address: str = "127.0.0.1:7071"
    max_frame_bytes: int = 16 * 1024 * 1024
    max_connections: int = 1024
    max_streams_per_connection: int = 1024
    handshake_timeout_s: float = 5.0
    high_water_bytes: int = 256 * 1024
    max_pending_bytes: int = 8 * 1024 * 1024

    max_open_samples: int = 4096
    max_open_tokens: int = 8 * 1024 * 1024
    max_samples: int = 16
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 64
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_abs_priority: int = 100
    max_deadline_s: float = 86_400.0
    retry_after_s: float = 1.0
    thread_encode_chars: int = 16_384

    max_core_restarts: int = 3
    core_restart_window_s: float = 60.0
    core_start_timeout_s: float = 3600.0
