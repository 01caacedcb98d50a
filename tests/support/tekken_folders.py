"""tekken.json for each version of Mistral's tokenizers: mistral-common's bundled vocabulary, with the control
tokens of the version. The published files are the same vocabulary; they are not bundled."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import mistral_common
import msgspec

VERSIONS = ("v3", "v7", "v11", "v13", "v15")
NUM_SPECIAL = 64  # of the short files; full ones have a thousand, as published
NUM_SHORT = 2048  # tokens of a short vocabulary: the bytes, and the merges that come first
OUTLINE = b"\xe2\x98"  # the token that mistral-common's fill in the middle counts on
CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
    *(f"<SPECIAL_{index}>" for index in range(20, 32)),
    *("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"),
)
_COUNT = {"v3": 20, "v7": 20, "v11": 34, "v13": 36, "v15": 38}  # of CONTROL
_EFFORTS = {"reasoning_effort": {"values": ["none", "high"], "accepts_none": True, "default": "none"}}


@lru_cache(maxsize=1)
def _bundled() -> dict[str, Any]:
    path = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    return msgspec.json.decode(path.read_bytes())


def tekken(version: str, *, full: bool = False) -> dict[str, Any]:
    """The content of a tekken.json. `full`: of 131,072 tokens instead of about two thousand."""
    bundled = _bundled()
    config = dict(bundled["config"], version=version)
    vocab = bundled["vocab"][: config["default_vocab_size"] - 1000]
    if not full:
        more = next(token for token in vocab if _bytes(token) == OUTLINE)
        vocab = [*vocab[:NUM_SHORT], dict(more, rank=NUM_SHORT)]
        config |= {
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": len(vocab) + NUM_SPECIAL,
            "default_num_special_tokens": NUM_SPECIAL,
        }
    control = CONTROL[: _COUNT[version]]
    special = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(control)]
    file = {"config": config, "vocab": vocab, "special_tokens": special, "type": "Tekken", "version": 1}
    if version in ("v13", "v15"):
        file["image"] = {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}
    return file | ({"model_settings_builder": _EFFORTS} if version == "v15" else {})


def write_tekken(folder: Path, version: str = "v15", *, full: bool = False, **changes: Any) -> Path:
    """The folder, with a tekken.json. `changes`: fields of it that are other ones."""
    folder.mkdir(exist_ok=True)
    (folder / "tekken.json").write_bytes(msgspec.json.encode(tekken(version, full=full) | changes))
    return folder


def _bytes(token: dict[str, Any]) -> bytes:
    return msgspec.convert(token["token_bytes"], bytes)
