"""Everything that crosses a socket, as frozen tagged structs. docs/rpc.md is the same in words.

A frame is a 4-byte big-endian length and one MessagePack map whose "type" names the struct. Two dialects
share it: client <-> front end (the public RPC) and front end <-> core (inside one version of the package,
not public).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cierzo.engine.conversation import (
    ChatMessage,
    Content,
    Grammar,
    GrammarKind,
    ImageChunk,
    Message,
    Part,
    PartKind,
    TextChunk,
    ThinkingChunk,
    Tool,
    ToolCall,
)
from cierzo.engine.core_stats import CoreStats
from cierzo.engine.expert_statistics import ExpertStatistics
from cierzo.engine.prompt_image import PromptImage, VisionInfo
from cierzo.engine.questions import (
    Detokenize,
    Detokenized,
    GetHealth,
    GetModel,
    GetStats,
    GetTokenizer,
    Health,
    ModelInfo,
    Stats,
    Tokenize,
    Tokenized,
    TokenizerInfo,
)
from cierzo.scheduler.params import SamplingParams, ThinkingBudget
from cierzo.scheduler.plan import Finish, FinishReason, TokenDelta, TokenLogprobs

PROTOCOL_VERSION = 3
OLDEST_VERSION = 2  # spoken too; it knows no features
# Named abilities, which hello asks for and welcome grants. What belongs to one that was not granted is an error.
FEATURES = (
    *("accounting", "attach", "batches", "credit", "keepalive"),
    *("grammars", "images", "masks", "parts", "probes", "prompt_logprobs", "resume", "tokenize", "trace"),
)
# The part of "resume" that readers within this process have: `accepted` comes, without an id to resume by.
ACCEPTANCE = "acceptance"
MAGIC = "cierzo"
EndReason = FinishReason | Literal["tool_calls"]

__all__ = [
    "ChatMessage",
    "Content",
    "CoreStats",
    "Detokenize",
    "Detokenized",
    "ExpertStatistics",
    "Finish",
    "FinishReason",
    "GetHealth",
    "GetModel",
    "GetStats",
    "GetTokenizer",
    "Grammar",
    "GrammarKind",
    "Health",
    "ImageChunk",
    "Message",
    "ModelInfo",
    "Part",
    "PartKind",
    "PromptImage",
    "SamplingParams",
    "Stats",
    "TextChunk",
    "ThinkingBudget",
    "ThinkingChunk",
    "TokenDelta",
    "TokenLogprobs",
    "Tokenize",
    "Tokenized",
    "TokenizerInfo",
    "Tool",
    "ToolCall",
    "VisionInfo",
]


# --- client -> front end -----------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """First frame of a connection. `features`: names of FEATURES that the client wants; welcome grants those that
    the server has. `key`: the secret by which the server knows its tenant, left out where there is none."""

    magic: str = MAGIC
    version: int = PROTOCOL_VERSION
    client: str = ""
    features: list[str] = []
    key: str | msgspec.UnsetType = msgspec.UNSET


class Attach(Message, frozen=True, tag="attach", omit_defaults=True):
    """Part of a prompt that is too long for one frame (feature "attach"): bytes that are appended to what was
    attached to `stream` before. The `generate` that follows says by `attached` which field they stand for. `image`
    (feature "images"): they are of the file of this number, from 0, and not of the prompt.
    """

    stream: int
    data: bytes
    image: int | None = None


class Generate(Message, frozen=True, tag="generate", omit_defaults=True):
    """Start a generation. Exactly one of `text`, `messages`, `token_ids`, `attached`.

    `stream` is an id that the client chooses, unique among its open streams of this connection.
    `attached` ("text", "messages" or "token_ids"): the attached bytes are the MessagePack of that field's value.
    `output_token_ids` resumes: tokens already generated for this prompt (needs the seed of the first run).
    `deltas` false asks for the final record alone. `priority`: lower runs first. `deadline_s` counts from arrival.
    `idempotency_key` (feature "resume"): the same key never generates twice; a second `generate` with it joins the
    first one from its first token.

    Of the feature "parts": `tools`, which `messages` may call; `tool_choice` "auto" or "none"; with
    `parallel_tool_calls` false an answer ends after its first call; `suffix`: what comes behind the answer to
    `text` (fill in the middle).

    Of the feature "grammars": `grammar`, which the text of the answer holds; `tool_choice` "required", or the name
    of one of `tools`: the answer is calls, or a call of that one; `Tool.strict`.

    Of the feature "images": `images`, files for the image parts of `messages` without a `url`, or for `token_ids`.

    Of the feature "trace": `caller_id`, the caller's own name of the request, and `traceparent`, the W3C trace
    context that it is part of; the server's logs and records repeat both.
    """

    stream: int
    text: str | None = None
    messages: list[ChatMessage] | None = None
    token_ids: list[int] | None = None
    attached: str | None = None
    sampling: SamplingParams = SamplingParams()
    output_token_ids: list[int] = []
    reasoning_effort: str | None = None
    priority: int = 0
    deadline_s: float | None = None
    deltas: bool = True
    idempotency_key: str | None = None
    tools: list[Tool] = []
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    suffix: str | None = None
    grammar: Grammar | None = None
    images: list[bytes] = []
    caller_id: str = ""
    traceparent: str = ""


class Resume(Message, frozen=True, tag="resume", omit_defaults=True):
    """Go on with a request whose connection was lost, or take it over from another one (feature "resume").

    `request_id` is that of its `accepted`; `received[i]`: tokens of sample i that the client has. The deltas go on
    from there, text included; if the request has ended meanwhile, what is left and its final record come.
    `prompt_received`: entries of the prompt's log-probabilities that the client has.
    """

    stream: int
    request_id: str
    received: list[int]
    prompt_received: int = 0


class CancelRequest(Message, frozen=True, tag="cancel_request"):
    """Cancel the request `request_id` from any connection (feature "resume"). Answered by Done, or not_found."""

    stream: int
    request_id: str


class Credit(Message, frozen=True, tag="credit"):
    """The client has consumed deltas of `stream` that cost so many `bytes` (feature "credit"; `delta_cost`)."""

    stream: int
    bytes: int


class Cancel(Message, frozen=True, tag="cancel"):
    """End stream `stream` now; its final record says "cancelled"."""

    stream: int


class Ping(Message, frozen=True, tag="ping"):
    """Answered by Pong with the same `stream`, by the front end alone."""

    stream: int


class Drain(Message, frozen=True, tag="drain", omit_defaults=True):
    """Refuse new requests, finish those accepted, then answer Drained. `undo`: take requests again; answered by
    Done."""

    stream: int
    undo: bool = False


class Pong(Message, frozen=True, tag="pong"):
    """Answer to Ping, of either side: a server pings a silent client that has the feature "keepalive"."""

    stream: int


ClientMessage = (
    Hello
    | Attach
    | Generate
    | Resume
    | Cancel
    | CancelRequest
    | Credit
    | Ping
    | Pong
    | GetHealth
    | GetStats
    | GetModel
    | Tokenize
    | Detokenize
    | GetTokenizer
    | Drain
)

# --- front end -> client -----------------------------------------------------------------------------------


class Limits(Message, frozen=True, omit_defaults=True):
    """Limits that the front end enforces on this connection. Those with a default are told to clients that have the
    feature that they belong to: attached bytes of a stream; delta cost in bytes that a stream may have outstanding;
    seconds of silence until a ping comes, and as many until the end; images, bytes, pixels of one, tokens of all.
    """

    max_frame_bytes: int
    max_streams: int
    max_model_len: int
    max_samples: int
    max_attached_bytes: int = 0
    stream_credit_bytes: int = 0
    keepalive_s: float = 0.0
    max_images: int = 0
    max_image_bytes: int = 0
    max_image_pixels: int = 0
    max_image_tokens: int = 0


class Welcome(Message, frozen=True, tag="welcome", omit_defaults=True):
    """Answer to Hello: the version that both speak, and the features that are granted."""

    version: int
    server: str
    model: str
    limits: Limits
    features: list[str] = []


class Accepted(Message, frozen=True, tag="accepted", omit_defaults=True):
    """First message of a stream that was accepted (feature "resume"). `request_id`: 128 random bits in hex, which
    whoever knows them may resume and cancel by. `seed` repeats the generation. `queue_position`: requests before it
    that have no token yet. `deadline_s`: what counts, from arrival. `prompt_tokens`: told in one process alone."""

    stream: int
    request_id: str
    seed: int
    queue_position: int
    deadline_s: float
    prompt_tokens: int = 0


class Delta(Message, frozen=True, tag="delta", omit_defaults=True):
    """New output of one sample of a stream. `text` may lag behind `token_ids` (incomplete characters, stops).

    With the feature "parts" `text` has no thoughts and no calls; `parts` are all its pieces in order, text
    included, and empty where there is nothing but text. With the feature "prompt_logprobs" a delta may have entries
    of the prompt's next tokens instead, the second of the prompt first; they are those of all samples.
    """

    stream: int
    sample: int = 0
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    parts: list[Part] = []
    prompt_logprobs: list[TokenLogprobs] = []


class Deltas(Message, frozen=True, tag="deltas"):
    """Deltas of several streams and samples, in the order in which they would be sent alone (feature "batches")."""

    deltas: list[Delta]


class Usage(Message, frozen=True):
    """Token counts; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


class Cost(Message, frozen=True):
    """Work of the core for a request (feature "accounting"), over all its samples and, if it was paused or a core
    died, all its runs that a core reported.

    computed_tokens: rows of steps; recomputed_tokens: of these, tokens that had been computed before, and were lost
    to a preemption, a pause or a core's death. steps: those that had a row of it, counted by sample.
    kv_block_s: blocks held, times seconds; a block that several sequences share counts for each.
    """

    computed_tokens: int = 0
    recomputed_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    kv_block_s: float = 0.0


class Timings(Message, frozen=True):
    """Seconds: waiting for the first step, to the first token, and from there to the end; for the stream."""

    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float


class SampleEnd(Message, frozen=True, omit_defaults=True):
    """How one sample ended. `stop` is the stop string or token id that ended it, if one did.

    With `Generate.deltas` false, `token_ids`, `text`, `logprobs` and `parts` carry the whole output; else they are
    empty. With the feature "parts", one that stopped and has a whole call ends as "tool_calls"; `broken_calls`:
    numbers of the calls whose arguments are no JSON object, or whose name no tool can have. `incomplete` (feature
    "grammars"): it ended before its grammar did.
    """

    sample: int
    finish_reason: EndReason
    output_tokens: int
    stop: str | int | None = None
    message: str = ""
    preemptions: int = 0
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    parts: list[Part] = []
    broken_calls: list[int] = []
    incomplete: bool = False


class Final(Message, frozen=True, tag="final", omit_defaults=True):
    """Last message of a stream that was accepted. `seed` repeats a generation. `prompt_logprobs`: all of them, with
    `Generate.deltas` false."""

    stream: int
    samples: list[SampleEnd]
    usage: Usage
    timings: Timings
    seed: int
    cost: Cost | None = None
    prompt_logprobs: list[TokenLogprobs] = []


class Failure(Message, frozen=True, tag="error", omit_defaults=True):
    """Last message of a stream that was refused or failed; `stream` -1: the connection itself, which closes."""

    stream: int
    code: str
    message: str
    field: str | None = None
    limit: str | None = None
    value: str | None = None
    retry: bool = False
    retry_after_s: float | None = None


class Done(Message, frozen=True, tag="done"):
    """Answer to a message that has no other: it was done."""

    stream: int


class Drained(Message, frozen=True, tag="drained"):
    """Answer to Drain: nothing is running any more."""

    stream: int


Worded = Tokenized | Detokenized
# Carries the stream id of what it answers.
Reply = Pong | Done | Health | Stats | ModelInfo | Worded | TokenizerInfo | Drained
ServerMessage = Welcome | Accepted | Delta | Deltas | Final | Failure | Ping | Reply

# --- front end -> core -------------------------------------------------------------------------------------


class Vocabulary(Message, frozen=True, tag="vocabulary"):
    """The tokens that grammars are about: the first command to each core, behind its settings.

    `tokens`: the bytes of each id of the model, empty where it has no text; `control_ids`: of these, the tokens
    that a grammar names by their ids alone; `eos_token_ids`: those that end an answer.
    """

    tokens: list[bytes]
    control_ids: list[int]
    eos_token_ids: list[int]


class Submit(Message, frozen=True, tag="submit", omit_defaults=True):
    """A validated request. `sampling.seed` is set.

    Prompt and generated tokens travel apart because the form in which a token is computed belongs to it.
    `arrival_s` (None: now) and `deadline_at_s` are readings of the machine's monotonic clock, which both processes
    share. `first_sample`: the samples are numbered from here (a restart resubmits only those that still run).
    `banned_token_ids`: sequences of tokens that no output holds; `thinking`: the budget of its thoughts.
    `tenant`, `weight`: whose it is, and that one's share beside others; `cache_salt`: prompts with different ones
    share no blocks. `num_scored`: entries of the prompt's log-probabilities that an earlier run has delivered.
    `grammar`: what the whole output must be, as llguidance reads it, within the limits of text/grammar_limits.py;
    "": anything. `images`: of the prompt, in its order.
    """

    request_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output_token_ids: list[int] = []
    priority: int = 0
    arrival_s: float | None = None
    deadline_at_s: float | None = None
    first_sample: int = 0
    banned_token_ids: list[list[int]] = []
    thinking: ThinkingBudget | None = None
    tenant: str = ""
    weight: float = 1.0
    cache_salt: bytes = b""
    num_scored: int = 0
    grammar: str = ""
    images: list[PromptImage] = []


class Pixels(Message, frozen=True, tag="pixels"):
    """Part of an image's pixels, ahead of the Submit that names its digest: bytes from `start` on, of `size`."""

    digest: bytes
    size: int
    start: int
    data: bytes


class Abort(Message, frozen=True, tag="abort"):
    """Stop a request (sample None: all its samples), and report it finished with `reason`."""

    request_id: int
    sample: int | None = None
    reason: FinishReason = "cancelled"


class Shutdown(Message, frozen=True, tag="shutdown"):
    """Leave the loop now."""


CoreCommand = Vocabulary | Pixels | Submit | Abort | Shutdown

# --- core -> front end -------------------------------------------------------------------------------------


class Ready(Message, frozen=True, tag="ready"):
    """The model is loaded and the loop runs. `startup` is the text that the front end prints."""

    startup: str


class StepOutput(Message, frozen=True, tag="step", omit_defaults=True):
    """All that one step has for the front end, in one frame."""

    deltas: list[TokenDelta]
    stats: CoreStats | None = None


class CoreError(Message, frozen=True, tag="core_error"):
    """The core cannot go on (checkpoint unreadable, out of memory, ...); it exits after this."""

    code: str
    message: str


CoreEvent = Ready | StepOutput | CoreError
