"""What is made of a checkpoint for a peer: the same weights under other names, and kept."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cierzo.bench.peers import environments, vllm
from cierzo.bench.peers.engine import Checkpoint, kept
from cierzo.bench.peers.process import WORKERS
from cierzo.bench.peers.workers import gguf_convert
from cierzo.engine.errors import ConfigError
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.weights.names import native_name
from cierzo.engine.weights.shapes import shape_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several shards."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return make_checkpoint(folder, like="small4", scale="tiny", max_shard_bytes=2_000_000)


def test_the_native_layout_has_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    vllm.convert(Checkpoint("tiny", checkpoint), tmp_path)
    native = load_file(tmp_path / "consolidated.safetensors")
    theirs: dict[str, torch.Tensor] = {}
    for path in checkpoint.glob("*.safetensors"):
        theirs |= load_file(path)
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    assert sum(t.numel() for t in native.values()) == sum(t.numel() for t in theirs.values())
    gate_up = theirs["model.layers.1.mlp.experts.gate_up_proj"]
    width = gate_up.shape[1] // 2
    for expert in (0, 3, gate_up.shape[0] - 1):
        name = f"layers.1.experts.{expert}"
        assert torch.equal(native[f"{name}.w1.weight"], gate_up[expert, :width])
        assert torch.equal(native[f"{name}.w3.weight"], gate_up[expert, width:])
        down = theirs["model.layers.1.mlp.experts.down_proj"][expert]
        assert torch.equal(native[f"{name}.w2.weight"], down)
    assert torch.equal(
        native["layers.2.attention.wkv_b.weight"], theirs["model.layers.2.self_attn.kv_b_proj.weight"]
    )
    assert torch.equal(native["output.weight"], theirs["lm_head.weight"])
    assert read_model_config(tmp_path) == read_model_config(checkpoint)


@pytest.mark.parametrize("name", ["model.extra.weight", "model.layers.0.extra.weight"])
def test_an_unknown_tensor_is_named(name: str) -> None:
    with pytest.raises(KeyError, match="extra"):
        native_name(name)


def test_llama_cpp_gets_a_factor_that_cancels_its_own() -> None:
    """It multiplies cos and sin by m A and the scale by (m A)^2, m = 1 + 0.1 ln 128: A must be 1 / m."""
    rope = shape_of("small4", "mini").config("bfloat16")["rope_parameters"]
    assert gguf_convert.without_magnitude(rope) * (1 + 0.1 * math.log(128)) == pytest.approx(1)
    assert "factor" in rope
    assert not [name for name in rope if name.startswith("mscale")]


def test_what_was_made_is_kept_until_its_source_changes(checkpoint: Path, tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text(str(len(made)))

    source = Checkpoint("tiny", checkpoint)
    for recipe, count in ((1, 1), (1, 1), (2, 2)):
        assert (kept(source, tmp_path, "peer", recipe, make) / "file").read_text() == str(count)
    other = Checkpoint("tiny", make_checkpoint(tmp_path / "other", like="small3", scale="tiny"))
    assert (kept(other, tmp_path, "peer", 2, make) / "file").read_text() == "3"


def test_what_could_not_be_finished_is_not_kept(checkpoint: Path, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("disk full")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="disk full"):
            kept(Checkpoint("tiny", checkpoint), tmp_path, "peer", 1, fail)
        assert not list((tmp_path / "converted").iterdir())


def test_environments_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        (tmp_path / "transformers").mkdir(exist_ok=True)

    monkeypatch.setattr(environments, "_run", run)
    with pytest.raises(ConfigError, match="make peers"):
        environments.python("transformers", tmp_path)
    environments.build("transformers", tmp_path, torch_index="https://index.example")
    packages = [command[command.index("install") + 1 :] for command in commands if "install" in command]
    assert packages[0] == ["--index-url", "https://index.example", environments.TORCH], "torch first and alone"
    assert "transformers==5.23.0" in packages[1]
    assert environments.python("transformers", tmp_path) == tmp_path / "transformers" / "bin" / "python"
    commands.clear()
    environments.build("transformers", tmp_path)
    assert commands == []


@pytest.mark.parametrize("path", sorted(WORKERS.glob("*.py")), ids=lambda path: path.name)
def test_scripts_for_other_environments_need_nothing_of_ours(path: Path) -> None:
    """Only our own backend may import this package."""
    if path.name != "cierzo_backend.py":
        assert "cierzo" not in path.read_text()
    subprocess.run([sys.executable, "-m", "py_compile", str(path)], check=True, capture_output=True)
