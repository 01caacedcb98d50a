"""Prompts of a Mistral model, token by token, by mistral-common:."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
from mistral_common.protocol.instruct.chunk import ImageURLChunk
from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest, ReasoningEffort
from mistral_common.protocol.instruct.tool_calls import Function
from mistral_common.protocol.instruct.tool_calls import Tool as TheirTool
from mistral_common.protocol.instruct.tool_calls import ToolCall as TheirCall
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.image import ImageEncoding
from mistral_common.tokens.tokenizers.instruct import (
    InstructTokenizerV3,
    InstructTokenizerV7,
    InstructTokenizerV11,
    InstructTokenizerV13,
    InstructTokenizerV15,
)
from mistral_common.utils.json_utils import validate_json_schema_by_draft7
from pydantic import ValidationError

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import Generate, Tool
from cierzo.engine.text.image_tokens import Images
from cierzo.engine.text.mistral_turns import (
    MAX_VALUE_CHARS,
    Rules,
    check_name,
    is_within_thought,
    texts,
    their_messages,
)
from cierzo.engine.text.syntax import SPELLED_THOUGHTS, THINK_TAGS
from cierzo.engine.text.tekken import TekkenVocabulary, load_tekken
from cierzo.engine.text.tool_arguments import canonical_json
from cierzo.engine.text.unicode import refuse_surrogates
from cierzo.engine.text.vocabulary import TEKKEN_FILE, refuse_unfit

_WRITERS: dict[TokenizerVersion, type[InstructTokenizerV3]] = {
    TokenizerVersion.v3: InstructTokenizerV3,
    TokenizerVersion.v7: InstructTokenizerV7,
    TokenizerVersion.v11: InstructTokenizerV11,
    TokenizerVersion.v13: InstructTokenizerV13,
    TokenizerVersion.v15: InstructTokenizerV15,
}
MAX_KEPT_BYTES = 64 * 1024  # of tools whose schemas are not checked again
IMAGE_TOKENS = frozenset(("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
RESULTS_SEEN = 15  # the version from which on a tool's result may hold images
_NO_PIXELS = np.empty(0, np.float32)


class MistralChat:
    """A `Chat`. Arguments of calls come into a prompt as they were generated, so that the next turn's prompt begins
    with this one's tokens; mistral-common alone would write their JSON anew."""

    def __init__(self, vocabulary: TekkenVocabulary) -> None:
        """Raises ValueError where the vocabulary lacks what its version needs to write a conversation."""
        inner = vocabulary.inner
        if inner.version not in _WRITERS:
            raise ValueError(f"its version is {inner.version}, known: {', '.join(_WRITERS)}")
        builder = inner.model_settings_builder
        if inner.version.supports_model_settings and builder is None:
            raise ValueError("it has no model_settings_builder")
        self._vocabulary = vocabulary
        self._special_ids = special_ids = vocabulary.special_ids
        number = inner.version.version_num
        thinks = number >= 13 and {"[THINK]", "[/THINK]"} <= special_ids.keys()
        thinkers = ("assistant", "system") if number == 13 else ("assistant",)
        spells = inner.version == SPELLED_THOUGHTS and "[THINK]" not in special_ids
        tags = tuple(THINK_TAGS) if spells else ()
        self.writes_images = special_ids.keys() >= IMAGE_TOKENS
        seers = () if not self.writes_images else ("user", "tool") if number >= RESULTS_SEEN else ("user",)
        self._rules = Rules(number, thinkers if thinks or spells else (), (*special_ids, *tags), tags, seers)
        efforts = None if builder is None else builder.reasoning_effort
        self.efforts = () if efforts is None else tuple(ReasoningEffort(value).value for value in efforts.values)
        self.thinks_unasked = efforts is None or efforts.default != ReasoningEffort.none
        self._validator = get_validator(inner.version, ValidationMode.test)
        self._normalizer = get_normalizer(inner.version, builder)
        self._writer = _WRITERS[inner.version](inner)
        # Changes of these three objects alone: mistral-common's classes stay as they are.
        hooks: dict[str, Callable[..., object]] = {
            "encode_assistant_message": self._answer_tokens,
            "_encode_tool_calls_in_assistant_message": self._call_tokens,
            "decode": lambda tokens, special_token_policy: "",  # a prompt's text, which nobody reads
        }
        vars(self._writer).update(hooks)
        vars(self._normalizer)["_normalize_tool_call"] = lambda call: call
        for each in (self._validator, self._normalizer):
            vars(each)["_allow_tool_call_and_content"] = True  # or neither

    def encode(
        self, message: Generate, max_tokens: int | None, images: Images | None = None
    ) -> tuple[list[int], bool]:
        """Token ids of the prompt of `message.messages`, and whether the answer goes on within a thought. Raises
        InvalidRequest, with the field that is wrong."""
        conversation = message.messages or []
        if message.reasoning_effort is not None and message.reasoning_effort not in self.efforts:
            known = ", ".join(self.efforts) or "none of them: the served model has no such setting"
            raise InvalidRequest(
                f"reasoning_effort is {message.reasoning_effort[:50]!r}, allowed: {known}",
                field="reasoning_effort",
                limit=known,
                value=message.reasoning_effort,
            )
        text = "".join(texts(conversation))
        refuse_unfit(self._vocabulary, "messages", text, max_tokens)
        refuse_surrogates("messages", text)
        turns, tools = their_messages(conversation, self._rules), their_tools(message.tools)
        vars(self._writer)["image_encoder"] = _ImageWriter(images or Images())
        try:
            self._validator.validate_messages(turns)
            effort = None if message.reasoning_effort is None else ReasoningEffort(message.reasoning_effort)
            request = ChatCompletionRequest(messages=turns, tools=tools or None, reasoning_effort=effort)
            tokenized = self._writer.encode_instruct(self._normalizer.from_chat_completion_request(request))
        except Exception as error:  # it raises errors of its own, pydantic's, and fails assertions
            roles = ", ".join(turn.role for turn in conversation)
            raise _refusal("messages", error, f"turns of {roles}") from error
        return tokenized.tokens, is_within_thought(conversation)

    def _answer_tokens(self, message: AssistantMessage, is_before_last_user_message: bool) -> list[int]:
        """A turn of the assistant. Models write what mistral-common does not: nothing; with v3, text and calls."""
        inner, text, calls = self._vocabulary.inner, message.content, message.tool_calls
        if bool(text) != bool(calls) or (text and self._rules.version >= 7):
            write = type(self._writer).encode_assistant_message
            return write(self._writer, message, is_before_last_user_message)
        tokens = [*inner.encode(str(text), bos=False, eos=False), *self._call_tokens(message)] if text else []
        return [*tokens, inner.eos_id]

    def _call_tokens(self, message: AssistantMessage) -> list[int]:
        """The calls of a turn. Up to v7 they are one JSON list, from v11 on a marker begins each of them."""
        inner, ids, version = self._vocabulary.inner, self._special_ids, self._rules.version
        calls = message.tool_calls or []
        if version < 11:
            listed = ", ".join(map(_in_list, calls))
            return [ids["[TOOL_CALLS]"], *inner.encode(f"[{listed}]", bos=False, eos=False)]
        tokens = []
        for call in calls:
            tokens += [ids["[TOOL_CALLS]"], *inner.encode(call.function.name, bos=False, eos=False)]
            if version == 11:
                tokens += [ids["[CALL_ID]"], *inner.encode(call.id, bos=False, eos=False)]
            tokens += [ids["[ARGS]"], *inner.encode(call.function.arguments, bos=False, eos=False)]
        return tokens


class _ImageWriter:
    """An encoder of images, to mistral-common: it gives their tokens, and no pixels, as they are decoded
    elsewhere."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __call__(self, content: ImageURLChunk) -> ImageEncoding:
        return ImageEncoding(tokens=self._images.write(int(content.get_url())), image=_NO_PIXELS)


def load_mistral(
    checkpoint_dir: Path, vocab_size: int | None = None
) -> tuple[TekkenVocabulary, MistralChat | None, str]:
    """Read tekken.json. Without a chat where it lacks what a conversation is written with; the last is a sentence
    that says so, or "".

    Raises CheckpointError.
    """
    vocabulary = load_tekken(checkpoint_dir, vocab_size)
    try:
        return vocabulary, MistralChat(vocabulary), ""
    except ValueError as error:
        path = checkpoint_dir / TEKKEN_FILE
        return vocabulary, None, f"{path}: text is served, conversations are not: {error}"


def their_tools(tools: list[Tool]) -> list[TheirTool]:
    """The tools for mistral-common. Raises InvalidRequest, with the field that is wrong."""
    if not tools:
        return []
    try:
        packed = msgspec.msgpack.encode(tools)
    except (UnicodeEncodeError, RecursionError) as error:
        raise _refusal("tools", error, type(error).__name__) from error
    return _checked_tools(packed) if len(packed) <= MAX_KEPT_BYTES else _checked_tools.__wrapped__(packed)


@lru_cache(maxsize=64)
def _checked_tools(packed: bytes) -> list[TheirTool]:
    """Kept, as requests repeat their tools, and holding schemas against their own schema takes milliseconds."""
    made = []
    for index, tool in enumerate(msgspec.msgpack.decode(packed, type=list[Tool])):
        check_name(f"tools[{index}].name", tool.name)
        try:
            canonical_json(tool.parameters)
            validate_json_schema_by_draft7(tool.parameters)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"tools[{index}].parameters is no JSON schema: {str(error)[:MAX_VALUE_CHARS]}",
                field=f"tools[{index}].parameters",
                limit="a JSON schema (draft 7)",
                value=tool.name,
            ) from error
        function = Function(name=tool.name, description=tool.description, parameters=tool.parameters)
        made.append(TheirTool(function=function))
    return made


def _in_list(call: TheirCall) -> str:
    name, call_id = json.dumps(call.function.name), json.dumps(call.id)
    return f'{{"name": {name}, "arguments": {call.function.arguments}, "id": {call_id}}}'


def _refusal(field: str, error: Exception, value: str) -> InvalidRequest:
    """The error for what mistral-common raises. It may quote a text as long as a prompt: its beginning is told."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        field, error = ".".join([field, *map(str, first["loc"])]), ValueError(first["msg"])
    said = str(getattr(error, "message", None) or error)[:MAX_VALUE_CHARS]
    what = f"mistral-common refuses {field}: {said}"
    return InvalidRequest(what, field=field, limit="what mistral-common takes", value=value)
