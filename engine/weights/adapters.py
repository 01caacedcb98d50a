"""Adapters (LoRA and its kin) in a checkpoint folder: found and named. They are not applied.

PEFT writes `adapter_config.json` and `adapter_model.safetensors`, Mistral's own fine-tuning `lora.safetensors`.
Without a word, whoever keeps them beside the base model would take its answers for the adapter's. No torch here.
"""

from __future__ import annotations

from pathlib import Path

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.fields import Fields, read_json

CONFIG_NAME = "adapter_config.json"
REMEDY = "merge it into its base model first (PEFT: merge_and_unload)"
_PATTERNS = (CONFIG_NAME, "adapter*.safetensors", "adapter*.bin", "lora*.safetensors")


def adapter_files(folder: Path) -> tuple[str, ...]:
    """The names of the adapter's files in a folder; empty where there is none."""
    return tuple(sorted({path.name for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}))


def refuse_lone_adapter(folder: Path) -> None:
    """Raise CheckpointError if a folder, which holds no model, holds an adapter: what it is, and of which base."""
    files = adapter_files(folder)
    if not files:
        return
    base = None
    if CONFIG_NAME in files:
        base = Fields(read_json(folder / CONFIG_NAME), file=CONFIG_NAME).get("base_model_name_or_path", None)
    of_base = "" if base is None else f" of the base model {base}"
    raise CheckpointError(
        f"{folder} holds an adapter{of_base} ({', '.join(files)}) and no model of its own: {REMEDY}",
        field=files[0],
        limit="a whole model",
        value=base,
    )
