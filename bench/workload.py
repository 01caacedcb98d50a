"""Workloads: how many requests an engine gets, of which lengths, and when; prompts of a load. No torch.

On the command line `2048/256@64` is a closed loop of 64 clients, each of which sends its next request when the last
one is answered: 2,048 tokens in, 256 out. `2048/256@3.5/s` is 3.5 such requests a second, whether or not earlier
ones are answered. `1152:1024/64@16` says that the first 1,024 of 1,152 tokens are the same in all prompts. A file
is a trace: one request a line.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from cierzo.engine.errors import ConfigError, refusal
from cierzo.engine.settings import require

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(ge=1e-6, le=1e9)]  # beyond, sums of times lose a step's seconds
T = TypeVar("T")


class TracedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A line of a trace. The first `shared_tokens` of the `input_tokens` are the same in all requests.
    `image_tokens`: of each of the images that follow those, its tokens (28 x 28 pixels make one)."""

    arrival_s: Annotated[float, Meta(ge=0, le=1e9)]
    input_tokens: Count
    output_tokens: Count
    shared_tokens: Whole = 0
    image_tokens: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError where nothing of the input is the request's own, or less than its images."""
        if self.shared_tokens >= self.input_tokens:
            raise ValueError(f"shared_tokens {self.shared_tokens} must be below input_tokens {self.input_tokens}")
        if (images := sum(self.image_tokens)) > (most := self.input_tokens - self.shared_tokens):
            raise ValueError(
                f"image_tokens have a sum of {images}, allowed: {most}, the request's own input_tokens"
            )


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A closed loop of `concurrency` clients, or an open loop of `rate` requests a second that arrive as a Poisson
    process (both of fixed lengths), or a `trace`, in order of arrival.

    requests: of a loop; None leaves their number to the forecast.
    """

    concurrency: Annotated[Count | None, Meta(description="closed loop of N clients (default: 8)")] = None
    rate: Annotated[Rate | None, Meta(description="open loop, requests per second (Poisson)")] = None
    trace: tuple[TracedRequest, ...] = ()
    requests: Annotated[Count | None, Meta(description="requests in all")] = None
    input_tokens: Annotated[Count, Meta(description="length of a random prompt, tokens")] = 32
    shared_tokens: Annotated[Whole, Meta(description="how much of the random prompts is the same in all")] = 0
    output_tokens: Annotated[Count, Meta(description="length of an answer, tokens")] = 16
    seed: Annotated[int, Meta(description="of prompts and arrival times")] = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for fields that contradict each other."""
        kinds = (self.concurrency is not None) + (self.rate is not None) + bool(self.trace)
        if kinds != 1:
            raise refusal("workload", "one of concurrency, rate and trace", kinds, "a workload is one thing")
        if not self.trace and self.shared_tokens >= self.input_tokens >= 1:
            raise refusal("shared_tokens", f"0 to {self.input_tokens - 1}", self.shared_tokens)

    @property
    def longest_tokens(self) -> int:
        """Input and output tokens of the longest request."""
        if self.trace:
            return max(request.input_tokens + request.output_tokens for request in self.trace)
        return self.input_tokens + self.output_tokens

    def __str__(self) -> str:
        """The workload as the command line spells it; a trace, in words."""
        if self.trace:
            return f"trace of {len(self.trace):,} requests in {self.trace[-1].arrival_s:,.0f} s"
        shared = f":{self.shared_tokens}" if self.shared_tokens else ""
        load = f"{self.concurrency}" if self.rate is None else f"{self.rate:g}/s"
        return f"{self.input_tokens}{shared}/{self.output_tokens}@{load}"


_SPELLING = re.compile(
    r"(?P<input_tokens>\d+)(?::(?P<shared_tokens>\d+))?/(?P<output_tokens>\d+)"
    r"@(?:(?P<concurrency>\d+)|(?P<rate>\d+(?:\.\d+)?)/s)"
)


def parse_workload(text: str) -> Workload:
    """Read a workload: spelled as above, or a file that holds a trace. Raises ConfigError."""
    match = _SPELLING.fullmatch(text)
    if match is not None:
        words = {name: word for name, word in match.groupdict().items() if word is not None}
        given: dict[str, Any] = {name: (float if name == "rate" else int)(word) for name, word in words.items()}
        return require(Workload(**given))
    path = Path(text)
    if not path.is_file():
        raise refusal("workload", "IN/OUT@CLIENTS, IN/OUT@RATE/s, IN:SHARED/OUT@..., or a trace's file", text)
    return Workload(trace=read_trace(path))


def read_trace(path: Path) -> tuple[TracedRequest, ...]:
    """Read JSON objects, one a line, in order of arrival. Raises ConfigError that names the first bad line."""
    latest_s = 0.0

    def decode(line: bytes) -> TracedRequest:
        nonlocal latest_s
        request = msgspec.json.decode(line, type=TracedRequest)
        if request.arrival_s < latest_s:
            raise ValueError(f"arrival_s {request.arrival_s:g} comes after {latest_s:g}: lines go by arrival")
        latest_s = request.arrival_s
        return request

    return tuple(read_lines(path, decode, "workload"))


def read_lines(path: Path, decode: Callable[[bytes], T], field: str) -> list[T]:
    """Decode all lines of a file but blank ones. Raises ConfigError of `field` that names the first bad line."""
    found: list[T] = []
    where = str(path)
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            where = f"{path}, line {number}"
            if line.strip():
                found.append(decode(line))
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{field} {where}: {error}", field=field, value=where) from error
    if not found:
        raise ConfigError(f"{field} {path} has no lines", field=field, limit="at least one line", value=path)
    return found


def poisson_arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Arrival times in seconds from the start, ascending: independent arrivals, `rate` per second on average."""
    random_gaps = random.Random(f"arrivals {seed}")
    return list(accumulate(random_gaps.expovariate(rate) for _ in range(num_requests)))


def random_prompt(index: int, num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids of request `index`, uniform over the vocabulary: no two prompts share a beginning worth caching."""
    return random.Random(f"prompt {seed} {index}").choices(range(vocab_size), k=num_tokens)
