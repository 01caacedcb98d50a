"""A tekken.json for a random checkpoint, so that it takes words: the first tokens of the vocabulary that
mistral-common brings along, bytes and the most frequent merges, with the control tokens of Small 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mistral_common
import msgspec

from cierzo.engine.errors import refusal

VERSION = "v15"
NUM_CONTROL = 64  # places of control tokens; a published file has a thousand
NUM_BYTES = 256
_CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
    *(f"<SPECIAL_{rank}>" for rank in range(20, 32)),
    *("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"),
)
_EFFORTS = {"values": ["none", "high"], "accepts_none": True, "default": "none"}


def short_tekken(num_tokens: int) -> bytes:
    """The content of a tekken.json of so many tokens, or of all that there are. Raises ConfigError for fewer than
    the bytes and control tokens."""
    least = NUM_CONTROL + NUM_BYTES
    if num_tokens < least:
        raise refusal("scale", f"one with a vocabulary of {least} or more, for a tokenizer", num_tokens)
    path = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    bundled: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    vocab = bundled["vocab"][: num_tokens - NUM_CONTROL]
    config = bundled["config"] | {
        "version": VERSION,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": NUM_CONTROL + len(vocab),
        "default_num_special_tokens": NUM_CONTROL,
    }
    control = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(_CONTROL)]
    return msgspec.json.encode(
        {
            "config": config,
            "vocab": vocab,
            "special_tokens": control,
            "type": "Tekken",
            "version": 1,
            "model_settings_builder": {"reasoning_effort": _EFFORTS},
        }
    )
