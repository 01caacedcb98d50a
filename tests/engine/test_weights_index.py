"""Which files hold the tensors, where a folder has an index, a single file, or both: as transformers chooses."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from loading import load
from published import SMALL3, Published
from safetensors.torch import load_file, save_file
from tiny_folders import DENSE, transformers_logits, write_config
from torch import Tensor

from cierzo.engine.checkpoint_format import find_layout
from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import as_tensor
from cierzo.engine.weights.reader import CheckpointReader

SINGLE, INDEX, OTHER = "model.safetensors", "model.safetensors.index.json", "weights.safetensors"
NORM = "model.norm.weight"
METADATA = {"format": "pt"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in one file."""
    folder = write_config(tmp_path_factory.mktemp("source"), {"model_type": "llama", **DENSE})
    transformers_logits(folder)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint."""
    return shutil.copytree(source, tmp_path / "copy")


def write_index(folder: Path, placed: dict[str, str], stem: str = "model") -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content))


def shifted(folder: Path) -> dict[str, Tensor]:
    """The folder's weights with another final norm: which file was read shows there."""
    tensors = load_file(folder / SINGLE)
    return {**tensors, NORM: tensors[NORM] * 2}


def norms(folder: Path) -> tuple[Tensor, Tensor]:
    """The final norm as transformers loads it, and as cierzo does."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = {name: as_tensor(parameter) for name, parameter in load(folder).items()}
    assert ours.keys() == theirs.keys()
    return theirs[NORM], ours[NORM]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name.startswith("cierzo")]
    told = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    return [text for text in told if "images are not served" not in text]


@pytest.mark.parametrize("change", ["as it is", "one fewer", "one more"])
def test_an_index_of_the_one_file_beside_it(folder: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    """MLX and other savers write one; what it lists of that file is not read."""
    placed = dict.fromkeys(load_file(folder / SINGLE), SINGLE)
    if change == "one fewer":
        del placed[NORM]
    if change == "one more":
        placed["model.layers.9.input_layernorm.weight"] = SINGLE
    write_index(folder, placed)
    theirs, ours = norms(folder)
    assert torch.equal(ours, theirs)
    assert not warnings(caplog)


@pytest.mark.parametrize("there", [True, False])
def test_a_single_file_beside_an_index_of_others(
    folder: Path, there: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The shards of another save, or what an index of shards that are gone left behind."""
    tensors = shifted(folder)
    if there:
        save_file(tensors, folder / OTHER, metadata=METADATA)
    write_index(folder, dict.fromkeys(tensors, OTHER))
    theirs, ours = norms(folder)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, tensors[NORM] / 2)
    (message,) = set(warnings(caplog))
    assert f"{INDEX} names {OTHER} and not the {SINGLE} beside it; this file is read" in message


@pytest.mark.parametrize(
    "text", ["", "not json", "[]", '{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
)
def test_a_single_file_beside_an_index_that_says_nothing(
    folder: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / INDEX).write_text(text)
    theirs, ours = norms(folder)
    assert torch.equal(ours, theirs)
    (message,) = set(warnings(caplog))
    assert f"{SINGLE} beside it is read" in message
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError):
        load(folder)


def test_a_single_file_that_is_not_whole(folder: Path) -> None:
    """transformers would make up what a stray file lacks."""
    tensors = load_file(folder / SINGLE)
    save_file(tensors, folder / OTHER, metadata=METADATA)
    write_index(folder, dict.fromkeys(tensors, OTHER))
    save_file({NORM: tensors[NORM]}, folder / SINGLE, metadata=METADATA)
    with pytest.raises(CheckpointError, match=r"tensor model\.embed_tokens\.weight is missing"):
        load(folder)


def test_an_index_of_one_file_of_another_name(folder: Path) -> None:
    tensors = shifted(folder)
    (folder / SINGLE).unlink()
    save_file(tensors, folder / OTHER, metadata=METADATA)
    write_index(folder, dict.fromkeys(tensors, OTHER))
    theirs, ours = norms(folder)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, tensors[NORM])


def test_an_index_that_makes_the_single_file_a_shard(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The two together are the checkpoint: transformers would make up what the second one holds."""
    tensors = load_file(folder / SINGLE)
    whole = load(folder)
    save_file({NORM: tensors.pop(NORM)}, folder / OTHER, metadata=METADATA)
    save_file(tensors, folder / SINGLE, metadata=METADATA)
    write_index(folder, {NORM: OTHER, **dict.fromkeys(tensors, SINGLE)})
    assert torch.equal(as_tensor(load(folder)[NORM]), as_tensor(whole[NORM]))
    assert not warnings(caplog)


def test_shards_in_a_folder_below(folder: Path) -> None:
    tensors = shifted(folder)
    (folder / SINGLE).unlink()
    (folder / "shards").mkdir()
    save_file({NORM: tensors.pop(NORM)}, folder / "shards" / SINGLE, metadata=METADATA)
    save_file(tensors, folder / OTHER, metadata=METADATA)
    write_index(folder, {NORM: f"shards/{SINGLE}", **dict.fromkeys(tensors, f"./{OTHER}")})
    theirs, ours = norms(folder)
    assert torch.equal(ours, theirs)


def test_mistrals_own_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    single = "consolidated.safetensors"
    folder = Published(SMALL3, "native").write(tmp_path)
    tensors = load_file(folder / single)
    write_index(folder, dict.fromkeys(tensors, single), "consolidated")
    before = as_tensor(load(folder)[NORM]).clone()
    assert not warnings(caplog)
    write_index(folder, dict.fromkeys(tensors, OTHER), "consolidated")
    assert torch.equal(as_tensor(load(folder)[NORM]), before)
    assert f"names {OTHER} and not the {single} beside it" in warnings(caplog)[0]
    (folder / single).rename(folder / OTHER)
    assert torch.equal(as_tensor(load(folder)[NORM]), before)


def test_an_index_alone_tells_the_layout(folder: Path) -> None:
    """Hugging Face's files count in a folder with both kinds of config, whatever the shards are called."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).rename(folder / OTHER)
    write_index(folder, dict.fromkeys(tensors, OTHER))
    (folder / "params.json").write_text("{}")
    save_file({"norm.weight": tensors[NORM]}, folder / "consolidated.safetensors")
    assert find_layout(folder) == "hf"
    with CheckpointReader(folder) as reader:
        assert reader.tensors.keys() == tensors.keys()
