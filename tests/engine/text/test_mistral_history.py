"""The prompt of a turn begins with the tokens of the turn before it: what was computed for those is used again.

A pitfall is a fault that other engines had with these models, by its number in the list that was gathered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from mistral_speakers import Speaker, speaker
from tekken_folders import VERSIONS

from cierzo.engine.frontend.answer import Answer
from cierzo.engine.messages import ChatMessage, Generate, SampleEnd, TextChunk, ThinkingChunk, Tool, ToolCall
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.syntax import syntax_of

BLOCK_TOKENS = 16
TURNS = 10
TOOLS = [Tool(name="look_up", description="Find a page by its words", parameters={"type": "object"})]
SYSTEM = ChatMessage(role="system", content="Answer with what the pages say, and name them.")
# Each is JSON, and none as Python writes it.
GENERATED = [
    '{"words":["%d"]}',
    '{"words": ["%d"],  "n":1}',
    '{\n  "words": ["\\u00e9%d"]\n}',
    '{ "n" : 1e3, "k":%d}',
]


def _call(number: int) -> ChatMessage:
    arguments = GENERATED[number % len(GENERATED)] % number
    call = ToolCall(name="look_up", arguments=arguments, id=f"call{number:05}")
    return ChatMessage(role="assistant", tool_calls=[call])


def _generated(ours: Speaker, call: ToolCall) -> list[int]:
    """The text that a model of this version writes to make a call, to the end of its turn."""
    ids, piece = ours.vocabulary.special_ids, ours.vocabulary.encode_piece
    number = ours.theirs.version.version_num
    if number < 11:
        listed = f'[{{"name": "{call.name}", "arguments": {call.arguments}, "id": "{call.id}"}}]'
        return [ids["[TOOL_CALLS]"], *piece(listed), ids["</s>"]]
    call_id = [ids["[CALL_ID]"], *piece(call.id)] if number == 11 else []
    return [
        *(ids["[TOOL_CALLS]"], *piece(call.name), *call_id),
        *(ids["[ARGS]"], *piece(call.arguments), ids["</s>"]),
    ]


def _turns(ours: Speaker) -> Iterator[tuple[list[int], list[int]]]:
    """Each turn's prompt, and what is generated for it. Up to v11 the tools move with the user's turns, so there
    the user speaks once."""
    speaks_again = ours.theirs.version.version_num >= 13
    turns = [SYSTEM]
    for number in range(TURNS):
        if number == 0 or speaks_again:
            turns.append(
                ChatMessage(role="user", content=f"Question {number}: what is it about the number {number}?")
            )
        call = _call(number)
        yield ours.encode(*turns, tools=TOOLS), _generated(ours, call.tool_calls[0])
        turns += [
            call,
            ChatMessage(role="tool", content="A page of words " * 8, tool_call_id=call.tool_calls[0].id),
        ]


@pytest.mark.parametrize("version", VERSIONS)
def test_blocks_of_earlier_turns_are_used_again(version: str) -> None:
    full = used = 0
    known: list[int] = []
    for prompt, generated in _turns(speaker(version)):
        same = next(i for i, (a, b) in enumerate(zip([*known, None], prompt, strict=False)) if a != b)
        full, used = full + len(known) // BLOCK_TOKENS, used + same // BLOCK_TOKENS
        known = prompt + generated
    assert full > 200
    assert used == full  # 95 % are promised: a model may write one text with other tokens


def test_pitfall_31_mistral_commons_own_history_would_lose_them() -> None:
    """Arguments that are written anew are other tokens."""
    ours, turn = speaker("v15"), _call(1)
    turns = [
        ChatMessage(role="user", content="x"),
        turn,
        ChatMessage(role="tool", tool_call_id=turn.tool_calls[0].id),
    ]
    assert turn.tool_calls[0].arguments in ours.spell(ours.encode(*turns))
    assert turn.tool_calls[0].arguments not in ours.spell(ours.encode_theirs(*turns))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("arguments", ['{"x":1}', ' {"x":  1}\n', '{"x": 1.0e2, "x": 2}', '{"\\u00e9": "\\/"}'])
def test_arguments_come_as_they_were_generated(version: str, arguments: str) -> None:
    calls = [
        ToolCall(name="f", arguments=arguments, id="aaaaaaaaa"),
        ToolCall(name="g", arguments=" ", id="bbbbbbbbb"),
    ]
    results = [ChatMessage(role="tool", content="1", tool_call_id=call.id) for call in calls]
    turns = [ChatMessage(role="user", content="x"), ChatMessage(role="assistant", tool_calls=calls), *results]
    spelled = speaker(version).spell(speaker(version).encode(*turns))
    written = {
        "v3": f'[TOOL_CALLS][{{"name": "f", "arguments": {arguments}, "id": "aaaaaaaaa"}}, '
        '{"name": "g", "arguments": {}, "id": "bbbbbbbbb"}]</s>',
        "v11": f"[TOOL_CALLS]f[CALL_ID]aaaaaaaaa[ARGS]{arguments}[TOOL_CALLS]g[CALL_ID]bbbbbbbbb[ARGS]{{}}</s>",
        "v13": f"[TOOL_CALLS]f[ARGS]{arguments}[TOOL_CALLS]g[ARGS]{{}}</s>",
    }
    assert written[{"v7": "v3", "v15": "v13"}.get(version, version)] in spelled


def test_pitfall_30_a_change_of_effort_or_tools_keeps_the_system_prompt_alone() -> None:
    """Both stand behind the system prompt and before the first turn of the user."""
    ours, user = speaker("v15"), ChatMessage(role="user", content="x")
    head = [1, *_marked(ours, "SYSTEM_PROMPT", SYSTEM.content)]
    tail = [3, *ours.vocabulary.encode_piece("x"), 4]
    for tools, effort in ((TOOLS, "none"), (TOOLS, "high"), ([], "high")):
        ids = ours.encode(SYSTEM, user, tools=tools, reasoning_effort=effort)
        settings = _marked(ours, "MODEL_SETTINGS", f'{{"reasoning_effort": "{effort}"}}')
        assert ids[: len(head)] == head
        assert ids[-len(settings + tail) :] == settings + tail
        assert ids == ours.encode(SYSTEM, user, tools=tools, reasoning_effort=effort, tool_choice="none")
        assert (ids[len(head)] == ours.vocabulary.special_ids["[AVAILABLE_TOOLS]"]) == bool(tools)


def test_pitfall_31_a_thought_stays_in_the_history() -> None:
    """A thought that is dropped, or a text that is trimmed, is not what was generated."""
    ours = speaker("v15")
    ids, piece = ours.vocabulary.special_ids, ours.vocabulary.encode_piece
    first = ours.encode(ChatMessage(role="user", content="x"), reasoning_effort="high")
    generated = [ids["[THINK]"], *piece(" so "), ids["[/THINK]"], *piece(" yes "), ids["</s>"]]
    answer = ChatMessage(role="assistant", reasoning=" so ", content=[TextChunk(text=" yes ")])
    turns = [ChatMessage(role="user", content="x"), answer, ChatMessage(role="user", content="y")]
    assert ours.encode(*turns, reasoning_effort="high")[: len(first + generated)] == first + generated


def _marked(ours: Speaker, name: str, text: object) -> list[int]:
    ids = ours.vocabulary.special_ids
    return [ids[f"[{name}]"], *ours.vocabulary.encode_piece(str(text)), ids[f"[/{name}]"]]


# --- whatever was generated is taken back ------------------------------------------------------------------

USER = ChatMessage(role="user", content="x")
CALLS = {
    "v3": '[TOOL_CALLS][{"name": "f", "arguments": {"x":1}, "id": "Ab1cd2Ef3"}]',
    "v11": '[TOOL_CALLS]f[CALL_ID]aaaaaaaaa[ARGS]{"x":1}',
    "v13": '[TOOL_CALLS]f[ARGS]{"x":1}',
}
CALLS |= {"v7": CALLS["v3"], "v15": CALLS["v13"]}
BEGINNINGS = {"v3": '[TOOL_CALLS][{"name": "f", "arguments": {"x', "v7": '[TOOL_CALLS][{"name": "f"'}


def _ids(ours: Speaker, spelled: str) -> list[int]:
    """Tokens of an answer as it is spelled with its markers."""
    ids = ours.vocabulary.special_ids
    pieces = re.split("(" + "|".join(map(re.escape, ids)) + ")", spelled)
    found = [[ids[piece]] if piece in ids else ours.vocabulary.encode_piece(piece) for piece in pieces if piece]
    return [token_id for each in found for token_id in each]


def _turn(ours: Speaker, version: str, token_ids: list[int]) -> ChatMessage:
    """The turn that a client gets for these tokens."""
    syntax = syntax_of(ours.vocabulary, None, version)
    assert syntax is not None
    reader = PartsReader(ours.vocabulary, syntax)
    answer = Answer()
    for token_id in token_ids:
        text = reader.push([token_id])
        answer.take(reader.parts, text, 1)
    text = reader.flush()
    answer.end(
        SampleEnd(
            sample=0,
            finish_reason="stop",
            output_tokens=0,
            text=text,
            parts=reader.parts,
            broken_calls=reader.broken_calls,
        )
    )
    return answer.turn


def _written(ours: Speaker, turn: ChatMessage) -> list[int]:
    """The tokens that stand for the turn in the next prompt."""
    results = [ChatMessage(role="tool", content="1", tool_call_id=call.id) for call in turn.tool_calls]
    first, all_of_it = ours.encode(USER), ours.encode(USER, turn, *(results or [USER]))
    assert all_of_it[: len(first)] == first
    return all_of_it[len(first) : all_of_it.index(ours.vocabulary.special_ids["</s>"]) + 1]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_generated_is_the_next_prompts_beginning(version: str) -> None:
    ours, call = speaker(version), CALLS[version]
    thought = {"v3": "", "v7": "", "v11": "<think>\nhm</think>"}.get(version, "[THINK]\nhm[/THINK]")
    for spelled in ("Yes", f"{thought}Yes", f"{thought}{call}", f"{thought}\n\nYes:{call}", f"Yes{call}", thought):
        generated = _ids(ours, spelled)
        assert _written(ours, _turn(ours, version, generated)) == [*generated, ours.vocabulary.special_ids["</s>"]]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["f", "w n", ""])
def test_a_broken_call_is_left_out_and_what_remains_is_a_turn(version: str, name: str) -> None:
    ours = speaker(version)
    broken = (
        CALLS[version].replace("f", name, 1) if name != "f" else BEGINNINGS.get(version, "[TOOL_CALLS]f[ARGS]{")
    )
    for before in ("", "Yes"):
        written = _written(ours, _turn(ours, version, _ids(ours, before + broken)))
        assert written == _ids(ours, f"{before}</s>")


@pytest.mark.parametrize("version", ["v11", "v13", "v15"])
def test_a_thought_that_is_cut_is_a_thought(version: str) -> None:
    ours = speaker(version)
    begin, end = ("<think>", "</think>") if version == "v11" else ("[THINK]", "[/THINK]")
    assert _written(ours, _turn(ours, version, _ids(ours, begin))) == _ids(ours, "</s>")
    assert _written(ours, _turn(ours, version, _ids(ours, f"{begin}so"))) == _ids(ours, f"{begin}so{end}</s>")


def test_spelled_thoughts_stay_where_they_were_and_go_on() -> None:
    ours = speaker("v11")
    turn = _turn(ours, "v11", _ids(ours, "So <think>hm</think>Yes"))
    assert isinstance(turn.content, list)
    assert _written(ours, turn) == _ids(ours, "So <think>hm</think>Yes</s>")
    last = ChatMessage(role="assistant", content=[ThinkingChunk(thinking="hm", closed=False)], prefix=True)
    ids, in_thinking = ours.chat.encode(Generate(stream=0, messages=[USER, last]), None)
    assert in_thinking
    assert ours.spell(ids).endswith("[/INST]<think>hm")
