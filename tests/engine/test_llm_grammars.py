"""Grammars that `LLM` is asked for: refused before anything runs, as by the RPC, or told to the core."""

from __future__ import annotations

from pathlib import Path

import pytest

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.llm import LLM
from cierzo.engine.messages import Grammar
from cierzo.engine.testing.words import TEMPLATE, marked_level
from cierzo.engine.text.grammar_check import GrammarCompiler
from cierzo.engine.weights.make import make_checkpoint

HI = {"role": "user", "content": "Hi"}
WRONG = Grammar(kind="json_schema", value='{"type": "x"}')
TOOL = {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"a": {"type": "x"}}}}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("llm") / "marking", like="small3", dtype="float32")
    marked_level().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return LLM(folder, max_model_len=128)


def test_what_cannot_be_held_is_refused_by_its_field(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="Invalid type: x") as caught:
        llm.generate("a", grammar=WRONG)
    assert caught.value.field == "grammar.value"
    with pytest.raises(InvalidRequest, match="prompt 0: ") as caught:
        llm.generate(["a", "b"], grammar={"kind": "choice", "value": []})
    assert caught.value.field == "grammar.value"
    with pytest.raises(InvalidRequest) as caught:
        llm.chat(HI, tools=[TOOL])
    assert caught.value.field == "tools[0].parameters"
    with pytest.raises(InvalidRequest) as caught:
        llm.chat(HI, tool_choice={"type": "function", "function": {"name": "g"}})
    assert caught.value.field == "tool_choice"


def test_the_core_gets_the_grammar_of_the_whole_answer(llm: LLM) -> None:
    asked = {"text": "a", "grammar": {"kind": "choice", "value": ["yes"]}}
    assert 'HELD: "yes"' in llm._submit(asked, None, {}).submit.grammar
    chat = {"messages": HI, "tools": [{"name": "f"}], "tool_choice": "required"}
    assert "thought_rest" in llm._submit(chat, None, {}).submit.grammar
    assert llm._submit({"text": "a"}, None, {}).submit.grammar == ""


def test_messages_that_share_a_grammar_have_it_compiled_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(GrammarCompiler, "check", lambda self, grammar: compiled.append(grammar))
    for word in ("once", "once", "twice", "once"):
        llm._submit({"text": "a", "grammar": {"kind": "choice", "value": [word]}}, None, {})
    assert [text.count('"once"') for text in compiled] == [1, 0, 1]
