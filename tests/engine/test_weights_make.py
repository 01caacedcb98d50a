"""Random checkpoints are what transformers would write, and appear whole or not at all."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from cierzo.cli import main
from cierzo.engine import LLM
from cierzo.engine.checkpoint_report import report
from cierzo.engine.errors import CheckpointError, ConfigError
from cierzo.engine.messages import ChatMessage
from cierzo.engine.model.build import parameter_specs
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.text.short_tekken import NUM_BYTES, NUM_CONTROL, short_tekken
from cierzo.engine.weights import make
from cierzo.engine.weights.folder import new_folder
from cierzo.engine.weights.headers import INDEX_NAME
from cierzo.engine.weights.info import describe
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.weights.published import WEIGHT_STD
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.engine.weights.shapes import shape_of

CLASSES: dict[str, Any] = {
    "small4": transformers.Mistral4ForCausalLM,
    "small3": transformers.MistralForCausalLM,
}
SHARD_BYTES = 1_000_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint of an architecture, in several shards, made once."""
    root = tmp_path_factory.mktemp("made")

    def path(like: str) -> Path:
        if not (root / like).exists():
            make_checkpoint(root / like, like=like, max_shard_bytes=SHARD_BYTES, seed=3)
        return root / like

    return path


@pytest.mark.parametrize(
    ("like", "scale", "parameters"),
    [
        ("small4", "full", 118_972_826_624),  # text model, model.md 1.8
        ("small3", "full", 23_572_403_200),
        ("small4", "mini", 2_560_919_552),  # the two benchmark checkpoints
        ("small3", "mini", 648_188_160),
    ],
)
def test_parameter_counts(like: str, scale: str, parameters: int) -> None:
    assert sum(math.prod(shape) for _, shape in shape_of(like, scale).tensors()) == parameters


@pytest.mark.parametrize("like", CLASSES)
def test_a_factor_scales_and_keeps_the_head_sizes(like: str) -> None:
    full, half = shape_of(like, 1), shape_of(like, "0.5")
    assert full == shape_of(like, "full")
    assert half.hidden_size * 2 == full.hidden_size
    assert half.num_layers * 2 == full.num_layers
    smallest = shape_of(like, 1e-9).config("bfloat16")
    for name in ("head_dim", "qk_rope_head_dim", "kv_lora_rank", "num_experts_per_tok"):
        assert smallest.get(name) == full.config("bfloat16").get(name)


@pytest.mark.parametrize("scale", [0, -1, 1.5, "huge", "nan", "inf"])
def test_scales_that_mean_nothing(scale: str | float) -> None:
    with pytest.raises(ConfigError, match="must be tiny, mini, full or a number in"):
        shape_of("small4", scale)


def test_models_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="small4 or small3"):
        make_checkpoint(tmp_path / "new", like="small5")
    with pytest.raises(ConfigError, match="bfloat16 or float32"):
        make_checkpoint(tmp_path / "new", like="small4", dtype="float16")


@pytest.mark.parametrize("like", CLASSES)
def test_transformers_loads_it_and_would_write_the_same(
    made: Callable[[str], Path], tmp_path: Path, like: str
) -> None:
    folder = made(like)
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, report = CLASSES[like].from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    model.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        written, ours = (json.loads((path / name).read_text()) for path in (tmp_path, folder))
        del written["transformers_version"]
        assert ours == written
    stored = load_file(tmp_path / "model.safetensors")
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"] == {
        "total_parameters": sum(tensor.numel() for tensor in stored.values()),
        "total_size": sum(tensor.nbytes for tensor in stored.values()),
    }


@pytest.mark.parametrize("like", CLASSES)
def test_our_models_load_it(made: Callable[[str], Path], like: str) -> None:
    specs = parameter_specs(read_model_config(made(like)))
    with CheckpointReader(made(like)) as reader:
        parameters = load_parameters(reader, specs, dtype=torch.bfloat16, device="cpu")
    assert parameters.keys() == specs.keys()


def test_weights_are_normal_and_norms_are_one(made: Callable[[str], Path]) -> None:
    with CheckpointReader(made("small4")) as reader:
        for name in reader.tensors:
            values = reader.read(name).float()
            if "norm" in name:
                assert bool((values == 1).all())
            else:
                assert values.mean().abs() < 0.002
                assert abs(values.std() - WEIGHT_STD) < 0.001


def test_values_depend_on_seed_and_name_alone(tmp_path: Path, made: Callable[[str], Path]) -> None:
    one = make_checkpoint(tmp_path / "one", like="small3", seed=3)
    other = make_checkpoint(tmp_path / "other", like="small3", seed=4)
    with (
        CheckpointReader(made("small3")) as sharded,
        CheckpointReader(one) as single,
        CheckpointReader(other) as differs,
    ):
        assert list(single.tensors) == list(sharded.tensors)
        heads = []
        for name in single.tensors:
            assert torch.equal(single.read(name), sharded.read(name))
            heads.append(single.read(name).flatten()[:8])
        random = [head for head in heads if not bool((head == 1).all())]
        assert len({tuple(head.tolist()) for head in random}) == len(random)
        assert not torch.equal(single.read("lm_head.weight"), differs.read("lm_head.weight"))


def test_describe_counts_by_component(made: Callable[[str], Path]) -> None:
    info = describe(made("small4"))
    shape = shape_of("small4", "tiny")
    sizes = {component.name: component for component in info.components}
    layer_experts = shape.num_experts * 3 * shape.hidden_size * shape.expert_width  # type: ignore[union-attr]
    assert sizes["routed experts"].parameters == 3 * layer_experts
    assert sizes["routed experts"].active_parameters == 3 * layer_experts * 4 // 16
    assert sizes["embedding"].active_parameters == 0
    assert info.parameters == sum(math.prod(sizes) for _, sizes in shape.tensors())
    assert info.kv_bytes_per_token == 3 * (256 + 64) * 2


# --- the folder appears whole or not at all


def test_an_existing_folder_stays_unless_told_otherwise(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "new", like="small3", max_shard_bytes=SHARD_BYTES)
    with pytest.raises(CheckpointError, match="exists already"):
        make_checkpoint(path, like="small4")
    make_checkpoint(path, like="small4", overwrite=True)
    assert json.loads((path / "config.json").read_text())["model_type"] == "mistral4"
    assert len(list(path.glob("*.safetensors"))) == 1  # nothing of the earlier one is left


def test_a_progress_bar_is_for_terminals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "new", like="small3", progress=True)
    assert capsys.readouterr() == ("", "")


def test_overwriting_spares_what_is_no_checkpoint(tmp_path: Path) -> None:
    precious = tmp_path / "home" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        make_checkpoint(precious.parent, like="small3", overwrite=True)
    assert precious.exists()


def test_a_full_disk_is_told_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000_000))
    with pytest.raises(CheckpointError, match=r"10\.0 GB free, 238\.0 GB are needed"):
        make_checkpoint(tmp_path / "new", like="small4", scale="full")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = make.random_pieces

    def interrupted(plan: Any, seed: int) -> Any:
        if plan.name == "lm_head.weight":
            raise KeyboardInterrupt
        yield from pieces(plan, seed)

    monkeypatch.setattr(make, "random_pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "new", like="small3")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_writer_go_and_a_living_ones_stay(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".new.partial-dead", tmp_path / ".new.partial-alive"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    lock = os.open(alive, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with new_folder(tmp_path / "new") as folder:
            (folder / "config.json").write_text("{}")
    finally:
        os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "new"]


def test_a_piece_too_few_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "random_pieces", lambda plan, seed: iter([np.zeros(1, np.int16)]))
    with pytest.raises(ValueError, match="2 bytes given for"):
        make_checkpoint(tmp_path / "new", like="small3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("like", ["small4", "small3"])
def test_a_random_checkpoint_with_a_tokenizer_takes_words_and_chats(tmp_path: Path, like: str) -> None:
    assert main(["make-checkpoint", str(tmp_path / "made"), "--like", like, "--tokenizer"]) == 0
    settings = {"threads": 1, "max_model_len": 256, "kv_cache_gib": 0.02, "block_tokens": 8}
    with LLM(tmp_path / "made", **settings) as llm:
        assert len(llm.generate("hola, \u65e5", max_tokens=2)[0].token_ids) == 2
        asked, effort = [ChatMessage(role="user", content="hola")], "high"
        assert len(llm.chat(asked, max_tokens=2, reasoning_effort=effort).token_ids) == 2
    found = report(tmp_path / "made")
    assert found.words.num_tokens == found.checkpoint.model.vocab_size
    assert (found.refused, found.notes) == ((), ())


def test_a_vocabulary_too_small_for_a_tokenizer_is_refused(tmp_path: Path) -> None:
    assert short_tekken(NUM_BYTES + NUM_CONTROL)
    with pytest.raises(ConfigError, match="a vocabulary of 320 or more"):
        make_checkpoint(tmp_path / "made", like="small4", scale=0.001, tokenizer=short_tekken)
    assert not (tmp_path / "made").exists()
