"""Profiles: what the settings that a user leaves open are chosen for. No torch.

`balanced` is what an engine starts with unasked; `throughput` and `latency` are for one aim each. A setting that is
given counts, whatever the profile says; the resolved result is printed at start. Every value has its reason in
docs/architecture.md, section 9. There is no drafter yet: no profile drafts.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

ProfileName = Literal["balanced", "throughput", "latency"]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A value for each setting that profiles choose; "auto" leaves it to what the device and the dtype suggest."""

    budget_tokens: int
    max_chunk_tokens: int
    max_running: int
    graph_sequences: int
    max_step_ms: float = 0.0
    weights: str = "auto"
    kv_dtype: str = "auto"
    overlap: str = "auto"


class Given(Protocol):
    """The settings that a user gave or left open; `EngineOptions` has them, and every field of `Profile`."""

    @property
    def profile(self) -> ProfileName:
        """The profile's name."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype of activations; "auto" is bfloat16."""
        ...


PROFILES = {
    ("balanced", "cuda"): Profile(
        budget_tokens=4096, max_chunk_tokens=2048, max_running=256, graph_sequences=256, max_step_ms=250.0
    ),
    ("balanced", "cpu"): Profile(
        budget_tokens=1024, max_chunk_tokens=512, max_running=256, graph_sequences=256, max_step_ms=5500.0
    ),
    ("throughput", "cuda"): Profile(
        budget_tokens=8192,
        max_chunk_tokens=4096,
        max_running=2048,
        graph_sequences=512,
        max_step_ms=1000.0,
        weights="nvfp4",
        kv_dtype="fp8",
        overlap="on",
    ),
    ("throughput", "cpu"): Profile(
        budget_tokens=2048, max_chunk_tokens=1024, max_running=64, graph_sequences=0, weights="int8", overlap="off"
    ),
    ("latency", "cuda"): Profile(
        budget_tokens=2048,
        max_chunk_tokens=1024,
        max_running=32,
        graph_sequences=32,
        max_step_ms=150.0,
        weights="nvfp4",
        kv_dtype="fp8",
        overlap="on",
    ),
    ("latency", "cpu"): Profile(
        budget_tokens=512,
        max_chunk_tokens=256,
        max_running=4,
        graph_sequences=0,
        max_step_ms=1000.0,
        weights="int8",
        overlap="off",
    ),
}


def choose(given: Given, kind: str) -> Profile:
    """Complete the given settings by the profile's choice for a "cuda" or "cpu" device.

    Where dtype is float32, which is asked for to be exact, weights and cache are not rounded unasked.
    """
    profile = PROFILES[given.profile, kind]
    if given.dtype == "float32":
        profile = msgspec.structs.replace(profile, weights="auto", kv_dtype="auto")
    set_by_hand: dict[str, Any] = {
        name: value
        for name in Profile.__struct_fields__
        if (value := getattr(given, name)) is not None and value != "auto"
    }
    return msgspec.structs.replace(profile, **set_by_hand)
