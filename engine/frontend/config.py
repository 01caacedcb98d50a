"""Limits of the front end. Every one is enforced, told to clients where it concerns them, and tested."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resolved limits of the RPC server; past each one a request is refused at once, with a named reason.

    The descriptions are the command line's help.
    """

    address: Annotated[str, Meta(description='"HOST:PORT" or "unix:PATH"')] = "127.0.0.1:7071"

    # who may come
    keys: Annotated[str, Meta(description="file of tenants and digests of keys; none: everybody may come")] = ""
    tls_certificate: Annotated[str, Meta(description="file of the certificate chain (PEM); none: no TLS")] = ""
    tls_key: Annotated[str, Meta(description="file of the certificate's private key (PEM)")] = ""
    tls_client_ca: Annotated[
        str, Meta(description="file of authorities (PEM): clients must show a certificate of theirs")
    ] = ""
    insecure: Annotated[
        bool, Meta(description="listen beyond this machine without keys, or without TLS, all the same")
    ] = False

    # what is told
    usage_file: Annotated[str, Meta(description="file that a line is added to for each request and its cost")] = ""
    max_usage_bytes: Annotated[
        int, Meta(ge=4096, description="size of that file from which on a new one is begun; four old ones are kept")
    ] = 256 * 1024 * 1024
    metrics: Annotated[str, Meta(description='"HOST:PORT" or "unix:PATH" of metrics and probes, over HTTP')] = ""
    log_format: Annotated[Literal["text", "json"], Meta(description="how a line of the log is written")] = "text"

    # connections
    max_frame_bytes: Annotated[int, Meta(ge=1024, description="longest frame of a client, bytes")] = 4 * 1024 * 1024
    max_attached_bytes: Annotated[
        int, Meta(ge=0, description="attached bytes of one prompt that is too long for a frame")
    ] = 64 * 1024 * 1024
    max_unencoded_bytes: Annotated[
        int, Meta(ge=1, description="bytes of all prompts that are attached or wait to be encoded")
    ] = 256 * 1024 * 1024
    max_connections: Annotated[int, Meta(ge=1, description="connections open at a time")] = 1024
    max_streams_per_connection: Annotated[int, Meta(ge=1, description="generations open on one connection")] = 1024
    max_cancels_per_s: Annotated[
        int,
        Meta(ge=1, description="generations that a connection may open and cancel a second, over ten"),
    ] = 200
    handshake_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds until a connection that has not said hello is closed")
    ] = 5.0
    keepalive_s: Annotated[
        float, Meta(gt=0, description="seconds of silence after which a client is pinged; as many later it is gone")
    ] = 20.0
    high_water_bytes: Annotated[
        int, Meta(ge=1, description="unsent bytes of a connection from which on its deltas are merged")
    ] = 16 * 1024
    stream_credit_bytes: Annotated[
        int, Meta(ge=1024, description="cost of the deltas that a stream may have sent and its client not consumed")
    ] = 256 * 1024
    max_pending_bytes: Annotated[
        int, Meta(ge=1, description="heap of a stream's output that waits to be sent; past it the stream is paused")
    ] = 256 * 1024
    slow_reader_s: Annotated[
        float,
        Meta(gt=0, description="seconds in which its reader takes nothing of what waits, until a stream is ended"),
    ] = 10.0
    max_answer_bytes: Annotated[
        int, Meta(ge=1, description="heap of an answer that is kept whole, for deltas=false and for resuming")
    ] = 64 * 1024 * 1024
    max_kept_bytes: Annotated[
        int, Meta(ge=0, description="heap of all answers: open ones, and those that have ended and are kept")
    ] = 512 * 1024 * 1024
    orphan_s: Annotated[
        float, Meta(ge=0, description="seconds that a request goes on, or is kept, without its connection")
    ] = 60.0
    idempotency_s: Annotated[
        float, Meta(gt=0, description="seconds for which idempotency keys and their answers are kept")
    ] = 600.0
    max_idempotency_keys: Annotated[int, Meta(ge=0, description="idempotency keys kept at a time")] = 65_536

    # requests
    max_open_samples: Annotated[
        int, Meta(ge=1, description="answers open over all connections; a request with n = 4 counts as 4")
    ] = 4096
    max_open_tokens: Annotated[
        int, Meta(ge=1, description="prompt and resumed tokens of all open requests: the memory that they take")
    ] = 8 * 1024 * 1024
    max_turns: Annotated[int, Meta(ge=1, description="turns of a chat, and tool calls in it")] = 4096
    max_samples: Annotated[int, Meta(ge=1, description="largest n")] = 16
    max_images: Annotated[int, Meta(ge=0, description="images of a request")] = 16
    max_image_bytes: Annotated[int, Meta(ge=1, description="bytes of an image's file")] = 20 * 1024 * 1024
    max_image_pixels: Annotated[
        int,
        Meta(ge=1, le=178_000_000, description="pixels of an image, by its header, checked before it is decoded"),
    ] = 50_000_000  # Pillow takes none beyond the bound
    max_image_tokens: Annotated[int, Meta(ge=1, description="tokens of all images of a request")] = 16_384
    max_stop_strings: Annotated[int, Meta(ge=0, description="stop strings of a request")] = 16
    max_stop_chars: Annotated[int, Meta(ge=0, description="length of a stop string, characters")] = 256
    max_stop_token_ids: Annotated[int, Meta(ge=0, description="stop token ids of a request")] = 64
    max_logprobs: Annotated[int, Meta(ge=0, description="alternatives reported with each token")] = 20
    max_logit_bias: Annotated[int, Meta(ge=0, description="entries of logit_bias")] = 1024
    max_allowed_token_ids: Annotated[int, Meta(ge=0, description="entries of allowed_token_ids")] = 4096
    max_bad_words: Annotated[int, Meta(ge=0, description="bad words of a request")] = 256
    max_bad_word_chars: Annotated[int, Meta(ge=0, description="length of a bad word, characters")] = 256
    max_abs_priority: Annotated[int, Meta(ge=0, description="priorities lie within plus or minus this")] = 100
    max_deadline_s: Annotated[float, Meta(gt=0, description="longest deadline, seconds")] = 86_400.0
    default_deadline_s: Annotated[
        float, Meta(gt=0, description="deadline of a request that names none, seconds")
    ] = 3600.0
    retry_after_s: Annotated[float, Meta(gt=0, description="hint given with overloaded and draining, seconds")] = (
        1.0
    )
    inline_chars: Annotated[
        int, Meta(ge=0, description="prompts longer than this are encoded by a process of their own")
    ] = 2048
    encoders: Annotated[
        int, Meta(ge=1, le=64, description="processes that encode long prompts, beside one for those up to 256 KiB")
    ] = 1
    max_grammar_s: Annotated[
        float, Meta(gt=0, le=60, description="seconds in which a grammar must be compiled, to its first mask")
    ] = 2.0
    max_known_grammars: Annotated[
        int, Meta(ge=0, description="grammars that are known to compile, or not, and are not tried again")
    ] = 4096

    # the end
    lame_duck_s: Annotated[
        float,
        Meta(ge=0, description="seconds from SIGTERM, and a health that says draining, to the end of admission"),
    ] = 0.0
    drain_s: Annotated[
        float, Meta(ge=0, description="seconds that open requests have to finish after admission has ended")
    ] = 25.0

    # core process
    max_core_restarts: Annotated[
        int,
        Meta(ge=0, description="deaths of cores without a committed step in the window; one more, and all ends"),
    ] = 3
    max_core_restarts_per_hour: Annotated[
        int, Meta(ge=0, description="deaths of cores in an hour; one more, and all ends")
    ] = 100
    core_stall_s: Annotated[
        float, Meta(gt=0, description="seconds without a sign of life after which the core counts as stalled")
    ] = 1.5
    core_hang_s: Annotated[
        float, Meta(gt=0, description="seconds without a sign of life after which the core is killed and replaced")
    ] = 10.0
    core_restart_window_s: Annotated[
        float, Meta(gt=0, description="window in which deaths of the core are counted, seconds")
    ] = 60.0
    core_start_timeout_s: Annotated[
        float, Meta(gt=0, description="longest wait for a core, weights loaded, seconds")
    ] = 3600.0
