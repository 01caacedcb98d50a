"""The tiny model's tokenizer, a tekken.json of its own, and its prompts as mistral-common writes them."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mistral_common
import regex
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, Tool
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from cierzo.bench.tiny.tasks import Instance

NUM_TOKENS = 1024  # control tokens among them
NUM_SPECIAL = 64
BEGIN, IMAGE, BREAK, END_IMAGE = 3, 10, 12, 13  # control tokens of a prompt: of a turn, and of its image
THINK, END_THINK, CALLS, ARGUMENTS, END = 34, 35, 9, 32, 2  # of an answer
UNIT_PX = 28  # of an image for one token
# Of version 15, by id; the ids between are fillers.
CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
    *(f"<SPECIAL_{index}>" for index in range(20, 32)),
    *("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"),
)
_EFFORTS = {"reasoning_effort": {"values": ["none", "high"], "accepts_none": True, "default": "none"}}
_OUTLINE = b"\xe2\x98"  # a token that mistral-common's fill in the middle counts on


def tekken(texts: Iterable[str]) -> dict[str, Any]:
    """The content of a tekken.json: the bytes, what the texts' words are made of, and then the commonest tokens of
    mistral-common's own vocabulary."""
    bundled = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_bytes())
    pattern = bundled["config"]["pattern"]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += _merges(Counter(word for text in texts for word in regex.findall(pattern, text)))
    others = (base64.b64decode(token["token_bytes"]) for token in bundled["vocab"])
    tokens = [*dict.fromkeys((*tokens, *others))]
    tokens = [token for token in tokens if token != _OUTLINE][: NUM_TOKENS - NUM_SPECIAL - 1]
    tokens.append(_OUTLINE)
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    return {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": NUM_TOKENS,
            "default_num_special_tokens": NUM_SPECIAL,
            "version": "v15",
        },
        "vocab": vocab,
        "special_tokens": [
            {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(CONTROL)
        ],
        "image": {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2},
        "model_settings_builder": _EFFORTS,
        "type": "Tekken",
        "version": 1,
    }


def _merges(words: Counter[str]) -> list[bytes]:
    """Pairs of tokens in the order in which they are the commonest, ties by their bytes."""
    spelled = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    merged: list[bytes] = []
    while len(merged) < NUM_TOKENS - NUM_SPECIAL - 256:
        pairs = Counter[tuple[bytes, bytes]]()
        for word, tokens in spelled.items():
            for pair in pairwise(tokens):
                pairs[pair] += words[word]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged.append(left + right)
        for tokens in spelled.values():
            for index in range(len(tokens) - 2, -1, -1):
                if index + 1 < len(tokens) and (tokens[index], tokens[index + 1]) == (left, right):
                    tokens[index : index + 2] = [left + right]
    return merged


class Writer:
    """Writes instances as token ids."""

    def __init__(self, folder: Path) -> None:
        """folder: with the tekken.json."""
        self._chat = MistralTokenizer.from_file(str(folder / "tekken.json")).instruct_tokenizer
        inner = self._chat.tokenizer
        self._normalizer = get_normalizer(inner.version, inner.model_settings_builder)

    def prompt(self, one: Instance) -> list[int]:
        """The ids of the prompt. Images are whole tokens wide and high, and come before the text."""
        tools = [Tool(function=Function(**tool)) for tool in one.tools] or None
        turn = UserMessage(content=one.question)
        effort: Any = one.effort
        request = ChatCompletionRequest(messages=[turn], tools=tools, reasoning_effort=effort)
        ids = self._chat.encode_instruct(self._normalizer.from_chat_completion_request(request)).tokens
        if one.image is None:
            return ids
        columns, rows = one.image.width // UNIT_PX, one.image.height // UNIT_PX
        image = ([IMAGE] * columns + [BREAK]) * rows
        begin = ids.index(BEGIN) + 1
        return [*ids[:begin], *image[:-1], END_IMAGE, *ids[begin:]]

    def answer(self, one: Instance) -> list[int]:
        """The ids of the right answer, up to its end."""
        ids = [THINK, *self._encode(one.thinking), END_THINK] if one.thinking else []
        if one.call is not None:
            name, arguments = one.call
            return [*ids, CALLS, *self._encode(name), ARGUMENTS, *self._encode(json.dumps(arguments)), END]
        return [*ids, *self._encode(one.answer), END]

    def _encode(self, text: str) -> list[int]:
        return self._chat.tokenizer.encode(text, bos=False, eos=False)

    def texts(self) -> list[str]:
        """The text of each token, of a control token its name."""
        tokenizer = self._chat.tokenizer
        return [tokenizer.id_to_piece(index) for index in range(NUM_TOKENS)]
