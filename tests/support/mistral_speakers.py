"""Our prompts of a conversation beside mistral-common's own, which it makes of the same one in OpenAI's words."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tekken_folders import write_tekken

from cierzo.engine.messages import ChatMessage, Generate, TextChunk, Tool
from cierzo.engine.text.mistral import MistralChat, load_mistral
from cierzo.engine.text.tekken import TekkenVocabulary


class Speaker(NamedTuple):
    """The same tekken.json, read by us and by mistral-common."""

    vocabulary: TekkenVocabulary
    chat: MistralChat
    theirs: MistralTokenizer

    def encode(self, *turns: ChatMessage, **fields: Any) -> list[int]:
        """Our ids."""
        return self.chat.encode(Generate(stream=0, messages=list(turns), **fields), None)[0]

    def encode_theirs(
        self, *turns: ChatMessage, tools: list[Tool] | None = None, reasoning_effort: str | None = None
    ) -> list[int]:
        """mistral-common's ids."""
        request = ChatCompletionRequest.from_openai(
            messages=[in_openais_words(turn) for turn in turns],
            tools=[{"type": "function", "function": _function(tool)} for tool in tools or []] or None,
            continue_final_message=turns[-1].prefix,
            reasoning_effort=reasoning_effort,
        )
        return self.theirs.encode_chat_completion(request).tokens

    def spell(self, token_ids: list[int]) -> str:
        """The tokens' text, control tokens by their names."""
        names = {token_id: text for text, token_id in self.vocabulary.special_ids.items()}
        pieces = [names[i].encode() if i in names else self.vocabulary.token_bytes(i) for i in token_ids]
        return b"".join(pieces).decode()


@lru_cache(maxsize=16)
def speaker(version: str, *, full: bool = False) -> Speaker:
    """Both readers of a tekken.json of this version."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_tekken(Path(name), version, full=full)
        vocabulary, chat, _ = load_mistral(folder)
        assert chat is not None
        return Speaker(vocabulary, chat, MistralTokenizer.from_file(folder / "tekken.json"))


def in_openais_words(turn: ChatMessage) -> dict[str, Any]:
    """A turn as OpenAI's clients send it."""
    content: Any = turn.content
    if not isinstance(content, str):
        content = [
            {"type": "text", "text": chunk.text}
            if isinstance(chunk, TextChunk)
            else {"type": "thinking", "thinking": chunk.thinking, "closed": chunk.closed}
            for chunk in content
        ]
    words: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.reasoning:
        words["reasoning"] = turn.reasoning
    if turn.tool_calls:
        words["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.tool_calls
        ]
    if turn.role == "tool":
        words |= {"tool_call_id": turn.tool_call_id, "name": turn.name or None}
    return words


def _function(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
