"""Arguments of the clients, for type checkers: what connections are made with, and what a request may say."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, SupportsFloat, SupportsIndex, TypedDict

import msgspec
from msgspec import Meta

from cierzo.engine.frontend.retries import Reconnect, Retry
from cierzo.engine.messages import FEATURES, ChatMessage, Grammar, SamplingParams, Tool

MAX_CONNECTIONS = 64  # to each address: one carries any number of generations
Seconds = Annotated[float, Meta(gt=0)]
Turn = ChatMessage | Mapping[str, Any]
PathName = str | os.PathLike[str]


class ConnectOptions(TypedDict, total=False):
    """Arguments of `Client.connect` and `SyncClient`, beside the addresses and the timeout."""

    connections: int
    reconnect: bool | Reconnect
    retry: bool | Retry | None
    keepalive_s: float | None
    default_deadline_s: float | None
    features: Iterable[str]
    key: str | None
    tls: bool | PathName | ssl.SSLContext | None
    tls_certificate: PathName | None
    tls_key: PathName | None


class ConnectSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults and bounds of the same, for `settings_of` to hold values against; `dial` looks at those of Any."""

    timeout_s: Seconds
    connections: Annotated[int, Meta(ge=1, le=MAX_CONNECTIONS)] = 1
    reconnect: bool | Reconnect = True
    retry: bool | Retry | None = None
    keepalive_s: Seconds | None = None
    default_deadline_s: Seconds | None = None
    features: Any = FEATURES
    key: Any = None
    tls: Any = None
    tls_certificate: Any = None
    tls_key: Any = None


class GenerateArguments(TypedDict, total=False):
    """Arguments of `generate`, `complete` and `ask`: fields of messages.Generate, and of SamplingParams on top of
    `sampling`. Numbers and lists may be other libraries'."""

    text: str | None
    messages: Turn | Iterable[Turn] | None
    token_ids: Iterable[Any] | None
    sampling: SamplingParams | Mapping[str, Any] | None
    output_token_ids: Iterable[Any] | None
    tools: Iterable[Tool | Mapping[str, Any]] | None
    tool_choice: Any
    parallel_tool_calls: bool
    suffix: str | None
    grammar: Grammar | Mapping[str, Any] | None
    images: bytes | Iterable[bytes]
    reasoning_effort: str | None
    priority: SupportsIndex
    deadline_s: SupportsFloat | None
    deltas: bool
    idempotency_key: str | None
    caller_id: str
    traceparent: str

    max_tokens: SupportsIndex
    min_tokens: SupportsIndex
    temperature: SupportsFloat
    top_k: SupportsIndex
    top_p: SupportsFloat
    min_p: SupportsFloat
    repetition_penalty: SupportsFloat
    presence_penalty: SupportsFloat
    frequency_penalty: SupportsFloat
    logit_bias: Mapping[Any, SupportsFloat]
    seed: SupportsIndex | None
    n: SupportsIndex
    stop: str | Iterable[str]
    stop_token_ids: SupportsIndex | Iterable[Any]
    ignore_eos: bool
    logprobs: SupportsIndex | None
    prompt_logprobs: SupportsIndex | None
    allowed_token_ids: SupportsIndex | Iterable[Any]
    bad_words: str | Iterable[str]
    max_thinking_tokens: SupportsIndex | None


class TokenizeArguments(TypedDict, total=False):
    """Arguments of `tokenize`: fields of messages.Tokenize."""

    text: str | None
    messages: Turn | Iterable[Turn] | None
    tools: Iterable[Tool | Mapping[str, Any]] | None
    reasoning_effort: str | None
    special_tokens: bool
    control_tokens: bool
