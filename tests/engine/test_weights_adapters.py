"""An adapter in a checkpoint folder is named, and a folder that holds nothing else is no checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loading import load
from published import SMALL3, Published
from safetensors.torch import save_file

from cierzo.engine.checkpoint_format import adapter_files
from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.info import describe
from cierzo.engine.weights.reader import CheckpointReader

BASE = "example/Base-7B"
DOORS: list[Callable[[Path], object]] = [read_model_config, describe, CheckpointReader]


def peft(folder: Path) -> tuple[str, str]:
    """Save an adapter as PEFT does."""
    settings = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": BASE}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    return "adapter_config.json", "adapter_model.safetensors"


def mistral(folder: Path) -> tuple[str, ...]:
    """Save an adapter as Mistral's fine-tuning does."""
    save_file({"layers.0.attention.wq.lora_A.weight": torch.ones(2, 2)}, folder / "lora.safetensors")
    return ("lora.safetensors",)


@pytest.mark.parametrize("layout", ["hf", "native"])
@pytest.mark.parametrize("add", [peft, mistral])
def test_an_adapter_beside_its_base_is_named(
    tmp_path: Path, layout: str, add: Callable[[Path], tuple[str, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Published(SMALL3, layout).write(tmp_path)
    before = load(folder)
    assert "adapter" not in str(describe(folder))
    assert "holds an adapter" not in caplog.text
    caplog.clear()
    files = add(folder)
    assert adapter_files(folder) == files
    with caplog.at_level(logging.WARNING):
        assert load(folder).keys() == before.keys()
    (record,) = (one for one in caplog.records if "images" not in one.getMessage())
    assert record.levelno == logging.WARNING
    assert f"holds an adapter ({', '.join(files)}), which is NOT applied" in record.getMessage()
    assert "merge it into its base model first (PEFT: merge_and_unload)" in record.getMessage()
    assert f"{', '.join(files)}: NOT applied; merge it into its base model" in str(describe(folder))


@pytest.mark.parametrize("door", DOORS)
def test_a_folder_with_nothing_but_an_adapter(tmp_path: Path, door: Callable[[Path], object]) -> None:
    peft(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=f"an adapter of the base model {BASE} .* no model of its own"
    ) as caught:
        door(tmp_path)
    assert (caught.value.field, caught.value.value) == ("adapter_config.json", BASE)
    assert "merge it into its base model" in str(caught.value)


@pytest.mark.parametrize("layout", ["hf", "native"])
@pytest.mark.parametrize("add", [peft, mistral])
def test_an_adapter_beside_a_config_without_weights(
    tmp_path: Path, layout: str, add: Callable[[Path], tuple[str, ...]]
) -> None:
    """Fine-tuning copies the base model's config beside the adapter."""
    model = Published(SMALL3, layout)
    folder = model.write(tmp_path)
    (folder / ("consolidated.safetensors" if model.native else "model.safetensors")).unlink()
    files = add(folder)
    with pytest.raises(CheckpointError, match="no model of its own") as caught:
        load(folder)
    assert all(name in str(caught.value) for name in files)


def test_an_adapter_that_does_not_name_its_base(tmp_path: Path) -> None:
    mistral(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds an adapter \(lora\.safetensors\) and no model"):
        read_model_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        read_model_config(tmp_path)
