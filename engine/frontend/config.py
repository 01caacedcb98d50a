"""Limits of the front end. Every one is enforced, told to clients where it concerns them, and tested."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resolved limits of the RPC server; past each one a request is refused at once, with a named reason.

    The descriptions are the command line's help.
    """

    address: Annotated[str, Meta(description='"HOST:PORT" or "unix:PATH"')] = "127.0.0.1:7071"

    # connections
    max_frame_bytes: Annotated[int, Meta(ge=1, description="longest frame of a client, bytes")] = 16 * 1024 * 1024
    max_connections: Annotated[int, Meta(ge=1, description="connections open at a time")] = 1024
    max_streams_per_connection: Annotated[int, Meta(ge=1, description="generations open on one connection")] = 1024
    handshake_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds until a connection that has not said hello is closed")
    ] = 5.0
    high_water_bytes: Annotated[
        int, Meta(ge=1, description="unsent bytes of a connection from which on its deltas are merged")
    ] = 256 * 1024
    max_pending_bytes: Annotated[
        int, Meta(ge=1, description="merged bytes that a connection may leave unread before it is closed")
    ] = 8 * 1024 * 1024

    # requests
    max_open_samples: Annotated[
        int, Meta(ge=1, description="answers open over all connections; a request with n = 4 counts as 4")
    ] = 4096
    max_open_tokens: Annotated[
        int, Meta(ge=1, description="prompt and resumed tokens of all open requests: the memory that they take")
    ] = 8 * 1024 * 1024
    max_samples: Annotated[int, Meta(ge=1, description="largest n")] = 16
    max_stop_strings: Annotated[int, Meta(ge=0, description="stop strings of a request")] = 16
    max_stop_chars: Annotated[int, Meta(ge=0, description="length of a stop string, characters")] = 256
    max_stop_token_ids: Annotated[int, Meta(ge=0, description="stop token ids of a request")] = 64
    max_logprobs: Annotated[int, Meta(ge=0, description="alternatives reported with each token")] = 20
    max_logit_bias: Annotated[int, Meta(ge=0, description="entries of logit_bias")] = 1024
    max_abs_priority: Annotated[int, Meta(ge=0, description="priorities lie within plus or minus this")] = 100
    max_deadline_s: Annotated[float, Meta(gt=0, description="longest deadline, seconds")] = 86_400.0
    retry_after_s: Annotated[float, Meta(gt=0, description="hint given with overloaded and draining, seconds")] = (
        1.0
    )
    thread_encode_chars: Annotated[
        int, Meta(ge=0, description="prompts longer than this are encoded in a thread, off the event loop")
    ] = 16_384

    # core process
    max_core_restarts: Annotated[
        int, Meta(ge=0, description="deaths of the core in the window; one more, and open requests fail")
    ] = 3
    core_restart_window_s: Annotated[
        float, Meta(gt=0, description="window in which deaths of the core are counted, seconds")
    ] = 60.0
    core_start_timeout_s: Annotated[
        float, Meta(gt=0, description="longest wait for a core, weights loaded, seconds")
    ] = 3600.0
