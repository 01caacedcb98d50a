"""docs/rpc.md names every message, field, code and limit there is, and its examples are what is sent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from cierzo.engine import messages
from cierzo.engine.errors import BY_CODE
from cierzo.engine.expert_statistics import ExpertStatistics, StepBucket
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.messages import ClientMessage, SamplingParams, ServerMessage

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "rpc.md").read_text(encoding="utf-8")
PARTS = (
    messages.Limits,
    messages.Usage,
    messages.Timings,
    messages.Cost,
    messages.SampleEnd,
    messages.CoreStats,
    ExpertStatistics,
    StepBucket,
)
STRUCTS = [*get_args(ClientMessage), *get_args(ServerMessage), *PARTS, messages.ChatMessage, messages.ToolCall]


@pytest.mark.parametrize("struct", [*STRUCTS, SamplingParams], ids=lambda struct: struct.__name__)
def test_every_field_is_described(struct):
    missing = [name for name in struct.__struct_fields__ if f"`{name}`" not in TEXT]
    tag = struct.__struct_config__.tag
    assert not missing
    assert tag is None or f"`{tag}`" in TEXT


def test_every_code_and_limit_is_described():
    limits = set(FrontendConfig.__struct_fields__)
    internal = {"address", "retry_after_s", "inline_chars", "core_start_timeout_s"}
    assert not [name for name in (set(BY_CODE) | limits) - internal if f"`{name}`" not in TEXT]


def test_examples_are_what_is_sent():
    pairs = re.findall(r"```\n((?:[0-9a-f]{2}[ \n])+)```\n```json\n(.*?)```", TEXT, re.DOTALL)
    assert len(pairs) == 3
    for frame, text in pairs:
        data = bytes.fromhex(frame)
        assert int.from_bytes(data[:4], "big") == len(data) - 4
        assert msgspec.msgpack.decode(data[4:]) == json.loads(text)
        msgspec.msgpack.decode(data[4:], type=ClientMessage | ServerMessage)
