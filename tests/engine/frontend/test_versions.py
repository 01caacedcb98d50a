"""Clients of version 2 get nothing that version 2 did not have."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from cierzo.engine import messages
from cierzo.engine.expert_statistics import ExpertStatistics, StepBucket
from cierzo.engine.frontend.versions import as_version_2
from cierzo.engine.messages import CoreStats, Hello, ServerMessage
from cierzo.engine.testing.words import marked_prompts

# Fields of the server's messages, and of the maps in them, as commit 98f17af had them. Never to be changed.
VERSION_2 = {
    "Welcome": "version server model limits",
    "Limits": "max_frame_bytes max_streams max_model_len max_samples",
    "Delta": "stream sample token_ids text logprobs",
    "Usage": "prompt_tokens output_tokens cached_tokens",
    "Timings": "queue_s prefill_s decode_s total_s",
    "SampleEnd": "sample finish_reason output_tokens stop message preemptions token_ids text logprobs",
    "Final": "stream samples usage timings seed",
    "Failure": "stream code message field limit value retry retry_after_s",
    "Pong": "stream",
    "Health": "stream state uptime_s",
    "CoreStats": "running waiting free_blocks cached_blocks total_blocks steps prompt_tokens cached_tokens "
    "output_tokens preemptions finished experts",
    "Stats": "stream device connections streams accepted refused finished core_restarts core",
    "ModelInfo": "stream name architecture dtype device vocab_size max_model_len block_tokens num_blocks "
    "eos_token_ids has_tokenizer has_chat_template",
    "Drained": "stream",
    "ExpertStatistics": "layers num_experts top_k expert_tokens decode prefill",
    "StepBucket": "most_tokens steps tokens distinct",
}
STATES = {"loading", "ready", "draining", "failed"}
OF_A_FEATURE = {
    "Accepted",
    "Deltas",
    "Done",
    "Ping",
    "Tokenized",
    "Detokenized",
    "TokenizerInfo",
}  # messages that answer, or belong to, what version 2 cannot say
# Fields that are set for a feature alone, and not sent while they have their default.
FEATURE_FIELDS = {
    "Welcome": {"features"},
    "Limits": {
        *("max_attached_bytes", "stream_credit_bytes", "keepalive_s"),
        *("max_images", "max_image_bytes", "max_image_pixels", "max_image_tokens"),
    },
    "Final": {"cost", "prompt_logprobs"},
    "Health": {"startup", "live", "ready", "notes"},
    "Delta": {"parts", "prompt_logprobs"},
    "SampleEnd": {"parts", "broken_calls", "incomplete"},
    "ModelInfo": {"reasoning_efforts", "marks_thinking", "marks_calls", "vision"},
}
REMOVED = {"CoreStats": set(CoreStats.__struct_fields__) - set(VERSION_2["CoreStats"].split())}
PARTS = ("Limits", "Usage", "Timings", "SampleEnd", "CoreStats", "ExpertStatistics", "StepBucket")


@pytest.mark.parametrize("name", [cls.__name__ for cls in get_args(ServerMessage)] + [*PARTS])
def test_every_field_is_of_version_2_or_left_out(name):
    if name in OF_A_FEATURE:
        assert name not in VERSION_2
        return
    experts = {"ExpertStatistics": ExpertStatistics, "StepBucket": StepBucket}
    struct: Any = experts.get(name) or getattr(messages, name)
    known = set(VERSION_2[name].split())
    new = set(struct.__struct_fields__) - known
    assert new == FEATURE_FIELDS.get(name, set()) | REMOVED.get(name, set())
    assert known <= set(struct.__struct_fields__)
    if new:
        assert struct.__struct_config__.omit_defaults


def _unknown(value, name):
    """Fields of a map, and of those in it, that version 2 does not have."""
    known = set(VERSION_2[name].split()) | {"type"}
    found = [f"{name}.{key}" for key in value if key not in known]
    inner = {"limits": "Limits", "core": "CoreStats", "usage": "Usage", "timings": "Timings"}
    for key, part in inner.items():
        if key in value:
            found += _unknown(value[key], part)
    return found


def test_a_turn_without_news_has_no_field_that_version_2_does_not_know():
    calls = [messages.ToolCall(name="a", arguments="{}", id="b")]
    turn = messages.ChatMessage(role="assistant", content="x", reasoning="y", tool_calls=calls, tool_call_id="z")
    known = {"role", "content", "reasoning", "tool_calls", "tool_call_id"}
    assert set(msgspec.msgpack.decode(msgspec.msgpack.encode(turn))) == known


def test_new_counters_are_taken_out():
    core = CoreStats(**{name: 3 for name in CoreStats.__struct_fields__ if name != "experts"})
    counts = dict.fromkeys(("connections", "streams", "accepted", "refused", "finished", "core_restarts"), 0)
    stats = messages.Stats(stream=1, device="cpu", core=core, **counts)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(as_version_2(stats)))
    assert not _unknown(sent, "Stats")
    assert sent["core"]["finished"] == 3
    assert _unknown(msgspec.msgpack.decode(msgspec.msgpack.encode(stats)), "Stats")


def test_a_stalled_core_is_loading_to_who_does_not_know_the_word():
    for state in ("stalled", *STATES):
        health = as_version_2(messages.Health(stream=1, state=state, uptime_s=1.0))
        assert health.state in STATES
        assert state == "stalled" or health.state == state


def test_a_connection_of_version_2_hears_version_2(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, words=marked_prompts()) as house, peering(house, None) as peer:

            async def hear():
                size = int.from_bytes(await peer.reader.readexactly(4), "big")
                return msgspec.msgpack.decode(await peer.reader.readexactly(size))

            peer.say({"type": "hello", "magic": "cierzo", "version": 2})
            welcome = await hear()
            assert welcome["version"] == 2
            assert not _unknown(welcome, "Welcome")
            house.frontend.core.stats = CoreStats(computed_tokens=5, running=1)
            house.frontend.core.state = "stalled"
            peer.say({"type": "stats", "stream": 1})
            stats = await hear()
            assert stats["core"]["running"] == 1
            assert not _unknown(stats, "Stats")
            peer.say({"type": "health", "stream": 1})
            assert (await hear())["state"] == "loading"
            house.frontend.core.state = "ready"
            peer.say({"type": "generate", "stream": 2, "token_ids": [1], "sampling": {"max_tokens": 1}})
            assert not _unknown(await hear(), "Delta")
            assert not _unknown(await hear(), "Final")
            peer.say({"type": "model", "stream": 3})
            assert not _unknown(await hear(), "ModelInfo")

    run(body())


def test_a_connection_of_version_3_hears_the_new_counters(run, serving, peering):
    async def body():
        async with serving() as house, peering(house, Hello()) as peer:
            house.frontend.core.stats = CoreStats(computed_tokens=5)
            peer.say(messages.GetStats(stream=1))
            assert (await peer.hear()).core.computed_tokens == 5

    run(body())


@pytest.mark.parametrize("features", [[], ["credit"], ["parts"]])
def test_a_model_s_efforts_and_marks_are_told_to_who_has_parts(run, serving, peering, features):
    async def body():
        async with serving(words=marked_prompts()) as house, peering(house, Hello(features=features)) as peer:
            model = msgspec.structs.replace(
                house.frontend.model, reasoning_efforts=["none", "high"], marks_thinking=True, marks_calls=True
            )
            house.frontend.model = model
            peer.say(messages.GetModel(stream=1))
            heard = await peer.hear()
            news = (heard.reasoning_efforts, heard.marks_thinking, heard.marks_calls)
            assert news == ((["none", "high"], True, True) if "parts" in features else ([], False, False))
            assert heard.vocab_size == model.vocab_size

    run(body())
