"""tokenizer_config.json and the files beside it, read as transformers 5.23 reads them.

`add_bos_token` and `add_eos_token` are not read: beside a tokenizer.json transformers drops them, and the
post-processor in that file alone decides what is put around a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken

from cierzo.engine.checkpoint_file import require_file
from cierzo.engine.errors import CheckpointError

IMAGE_TOKEN = "[IMG]"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Token(msgspec.Struct, frozen=True):
    content: str
    special: bool | None = None
    normalized: bool | None = None
    single_word: bool | None = None
    lstrip: bool | None = None
    rstrip: bool | None = None


class TokenizerConfig(msgspec.Struct, frozen=True):
    """The special tokens of a checkpoint, and its chat templates by name.

    named: by role (`bos_token`, ..., and roles of the checkpoint's own, such as `image_token`). extra: special
    tokens without a role. declared: tokens by the id that the configuration says they have.
    split_special_tokens: a special token that is spelled out in a text is not taken for that token.
    """

    named: dict[str, AddedToken] = {}
    extra: list[AddedToken] = []
    declared: dict[int, AddedToken] = {}
    split_special_tokens: bool = False
    chat_templates: dict[str, str] | None = None

    @property
    def spellings(self) -> dict[str, str]:
        """The text of each special token that has a role."""
        return {role: token.content for role, token in self.named.items()}


def read_tokenizer_config(checkpoint_dir: Path) -> TokenizerConfig:
    """Read the files; a missing one leaves the defaults. Raises CheckpointError."""
    path = checkpoint_dir / "tokenizer_config.json"
    config = read_object(path)
    declared, extra = config.get("added_tokens_decoder"), _extra(path, config)
    if declared is None:  # as older versions saved it, in files of their own, which then count for more
        special_map = checkpoint_dir / "special_tokens_map.json"
        config |= read_object(special_map)
        extra += _extra(special_map, config)
        ids = read_object(checkpoint_dir / "added_tokens.json")
        declared = {index: {"content": content} for content, index in ids.items()}
    try:
        by_id = {int(index): _token(path, "added_tokens_decoder", value) for index, value in declared.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise _unreadable(path, "added_tokens_decoder", declared) from error
    return TokenizerConfig(
        named={role: _token(path, role, value) for role, value in _roles(config) if value is not None},
        extra=extra,
        declared=by_id,
        split_special_tokens=bool(config.get("split_special_tokens")),
        chat_templates=templates_by_name(path, config.get("chat_template")),
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, an empty one where the file is missing; raises CheckpointError."""
    require_file(path)
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field=path.name) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", field=path.name, value=type(value).__name__)
    return value


def templates_by_name(path: Path, value: Any) -> dict[str, str] | None:
    """The "chat_template" of file `path`: one text, which is the default, or several, as an object or as a list of
    {"name": ..., "template": ...}. None where there is none; raises CheckpointError."""
    if value is None:
        return None
    if isinstance(value, str):
        return {"default": value}
    try:
        named = {entry["name"]: entry["template"] for entry in value} if isinstance(value, list) else dict(value)
        return msgspec.convert(named, dict[str, str])
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, "chat_template", value) from error


def read_chat_templates(checkpoint_dir: Path) -> dict[str, str]:
    """The chat templates of a checkpoint by name, from the first of these places that has any: files of their own,
    tokenizer_config.json (the order of transformers' tokenizers), and what its processors alone read.

    Raises CheckpointError.
    """
    single, several = checkpoint_dir / "chat_template.jinja", checkpoint_dir / "additional_chat_templates"
    files = {"default": single} if single.exists() else {}
    files |= {path.name.removesuffix(".jinja"): path for path in several.glob("*.jinja")}
    if files:
        return {name: _read(path) for name, path in sorted(files.items())}
    templates = read_tokenizer_config(checkpoint_dir).chat_templates
    for name in ("processor_config.json", "chat_template.json"):
        if templates is None:
            path = checkpoint_dir / name
            templates = templates_by_name(path, read_object(path).get("chat_template"))
    return templates or {}


def _read(path: Path) -> str:
    require_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field="chat_template") from error


def image_token_ids(checkpoint_dir: Path, special_ids: Mapping[str, int]) -> frozenset[int]:
    """The tokens that stand for a piece of an image, by the names that Mistral gives them, and by config.json."""
    config = read_object(checkpoint_dir / "config.json")
    declared = [config.get(name) for name in ("image_token_id", "image_token_index")]
    return frozenset(index for index in (*declared, special_ids.get(IMAGE_TOKEN)) if isinstance(index, int))


def _roles(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for role in ROLES:
        yield role, config.get(role)
    for role, value in config.items():
        if role.endswith("_token") and role not in ROLES and isinstance(value, str | dict):
            yield role, value
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(group), dict):
            yield from config[group].items()


def _extra(path: Path, config: dict[str, Any]) -> list[AddedToken]:
    """The special tokens without a role, which older versions called "additional"."""
    tokens = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(tokens, list | dict):
        raise _unreadable(path, "extra_special_tokens", tokens)
    return [] if isinstance(tokens, dict) else [_token(path, "extra_special_tokens", token) for token in tokens]


def _token(path: Path, field: str, value: Any) -> AddedToken:
    """A token that is written as its text alone, or as an object that says how the text is matched."""
    try:
        if isinstance(value, str):
            return AddedToken(value, special=True)
        options = msgspec.structs.asdict(msgspec.convert(value, _Token))
        return AddedToken(**{name: option for name, option in options.items() if option is not None})
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise _unreadable(path, field, value) from error


def _unreadable(path: Path, field: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read: {field} is {ascii(value)[:80]}", field=path.name, value=ascii(value)
    )
