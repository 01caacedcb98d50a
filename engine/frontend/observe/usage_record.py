"""The record of a request and of what it cost: a line of the usage file. docs/operations.md has it in words."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.stream import Stream

SHOWN_CHARS = 128  # of what a refused request says of itself


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A line of the usage file: who sent a request, how it ended, and what it cost.

    time: by the wall clock, of the end, or of when the core had told the cost; all durations are of the monotonic
    one. request_id: as `accepted` told it, or a number of this server; "" if it was refused at once. caller_id,
    traceparent: as the request named itself. peer: where it came from. end: the finish reason of each sample, or
    the code of the error that it ended with. output_tokens: without those that a resumed request brought. queue_s,
    prefill_s, decode_s: until its first step, from there to its first token, and to the end; total_s: their sum.
    computed_tokens to kv_block_s: as in `Cost`.
    """

    time: datetime
    request_id: str = ""
    caller_id: str = ""
    traceparent: str = ""
    tenant: str
    peer: str = ""
    end: list[str]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    kv_block_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0


def record_of(stream: Stream, ends: list[str], num_cached: int) -> UsageRecord:
    """The record of a stream that has ended; `ends` as `ends_of` gives them."""
    timings, cost = stream.timings(), stream.cost
    return UsageRecord(
        time=datetime.now(UTC),
        request_id=stream.name or str(stream.request_id),
        caller_id=stream.caller_id,
        traceparent=stream.traceparent,
        tenant=stream.tenant.name,
        peer=stream.peer,
        end=ends,
        prompt_tokens=stream.num_prompt_tokens,
        cached_tokens=num_cached,
        output_tokens=stream.num_generated,
        computed_tokens=cost.computed_tokens,
        recomputed_tokens=cost.recomputed_tokens,
        steps=cost.steps,
        preemptions=cost.preemptions,
        kv_block_s=cost.kv_block_s,
        queue_s=timings.queue_s,
        prefill_s=timings.prefill_s,
        decode_s=timings.decode_s,
        total_s=timings.total_s,
    )


def ends_of(stream: Stream) -> list[str]:
    """The finish reason of each sample of a stream that has ended, or the code of its error."""
    if stream.error is not None:
        return [stream.error.code]
    if not stream.apart:
        return ["stop" if sample.cut else sample.finish.reason for sample in stream.samples if sample.finish]
    return [sample.outcome(sample.finish)[0] for sample in stream.samples if sample.finish]


def refusal_of(
    error: CierzoError, tenant: str, peer: str, request_id: str, caller_id: str, traceparent: str, total_s: float
) -> UsageRecord:
    """The record of a request that was refused, of which nothing may have been checked."""
    return UsageRecord(
        time=datetime.now(UTC),
        request_id=request_id,
        caller_id=caller_id[:SHOWN_CHARS],
        traceparent=traceparent[:SHOWN_CHARS],
        tenant=tenant,
        peer=peer,
        end=[error.code],
        queue_s=total_s,
        total_s=total_s,
    )
