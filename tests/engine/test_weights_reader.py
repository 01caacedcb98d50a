"""Every way in which a checkpoint folder can be broken gives an error that names the file or the tensor."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.errors import CheckpointError, ConfigError
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.headers import INDEX_NAME, SINGLE_NAME
from cierzo.engine.weights.info import describe
from cierzo.engine.weights.reader import CheckpointReader

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = {"model_type": "mistral"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards: a [4,6] and b [3] in the first, c [5] in the second, each in its own dtype."""
    shards = {
        FIRST: {"a": torch.arange(24.0).reshape(4, 6), "b": torch.ones(3, dtype=torch.bfloat16)},
        SECOND: {"c": torch.arange(5, dtype=torch.float16)},
    }
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    write(tmp_path / INDEX_NAME, {"weight_map": {name: file for file, held in shards.items() for name in held}})
    write(tmp_path / "config.json", CONFIG)
    return tmp_path


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def cut(path: Path, num_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - num_bytes)


def edit_index(folder: Path, **changes: str | None) -> None:
    placed = json.loads((folder / INDEX_NAME).read_text())["weight_map"] | changes
    write(folder / INDEX_NAME, {"weight_map": {name: file for name, file in placed.items() if file is not None}})


def only_single(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    (folder / FIRST).rename(folder / SINGLE_NAME)


def header(text: str) -> bytes:
    """A file of nothing but this header."""
    return len(text).to_bytes(8, "little") + text.encode()


def wrong_span(folder: Path) -> None:
    """The header claims one element more than it has bytes for."""
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data.replace(b'"shape":[5]', b'"shape":[6]'))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4938985352\n"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "it has neither config.json nor params.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json cannot be read"),
    "config a list": (lambda f: write(f / "config.json", []), "no JSON object"),
    "quantised": (
        lambda f: write(f / "config.json", {"quantization_config": {"quant_method": "fp8"}}),
        r"config.json: quantization_config.activation_scheme is missing",
    ),
    "quantised inside": (
        lambda f: write(f / "config.json", {"text_config": {"quantization_config": {"quant_method": "nvfp4"}}}),
        "text_config.quantization_config.quant_method is 'nvfp4', must be \"fp8\"",
    ),
    "fp8 tensor": (
        lambda f: save_file({"c": torch.zeros(5, dtype=torch.float8_e4m3fn)}, f / SECOND),
        "tensor c is F8_E4M3, but config.json declares no quantisation",
    ),
    "no index": (
        lambda f: (f / INDEX_NAME).unlink(),
        rf"neither {INDEX_NAME} nor model.safetensors \({FIRST} and 1 more lie there; the index, ",
    ),
    "no index and one shard": (
        lambda f: [(f / INDEX_NAME).unlink(), (f / SECOND).unlink()],
        rf"\({FIRST} lies there; the index, ",
    ),
    "GGUF alone": (
        lambda f: [(f / "config.json").unlink(), (f / "tiny.gguf").touch()],
        "neither config.json nor params.json; tiny.gguf is of a format that is not read",
    ),
    "pointer for a shard": (
        lambda f: (f / SECOND).write_text(POINTER),
        f"{SECOND} is a pointer of git-lfs.*git lfs pull",
    ),
    "pointer for the index": (
        lambda f: (f / INDEX_NAME).write_text(POINTER),
        f"{INDEX_NAME} is a pointer of git-lfs",
    ),
    "other format": (
        lambda f: [
            (f / INDEX_NAME).unlink(),
            (f / SECOND).unlink(),
            (f / FIRST).rename(f / "consolidated.safetensors"),
        ],
        "consolidated.safetensors would need params.json beside it",
    ),
    "index not JSON": (lambda f: (f / INDEX_NAME).write_text("nonsense"), "index.json cannot be read"),
    "index empty": (lambda f: write(f / INDEX_NAME, {"weight_map": {}}), "weight_map is missing or empty"),
    "index leads out": (
        lambda f: edit_index(f, c="../secret.safetensors"),
        "c: '../secret.safetensors' is no file",
    ),
    "index names a path": (lambda f: edit_index(f, c=f"{f}/{SECOND}"), f"{SECOND}' is no file name"),
    "index names the folder": (lambda f: edit_index(f, c=".."), r"c: '\.\.' is no file name"),
    "index names nothing": (lambda f: edit_index(f, c=""), "c: '' is no file name"),
    "index names what is no name": (lambda f: edit_index(f, c="a\0b"), "header cannot be read: embedded null"),
    "no shard": (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing"),
    "shard cut by a byte": (lambda f: cut(f / SECOND, 1), f"{SECOND} is truncated.*tensor c"),
    "shard cut in its header": (lambda f: os.truncate(f / FIRST, 20), f"{FIRST} is truncated: 20 bytes"),
    "shard empty": (lambda f: os.truncate(f / FIRST, 0), f"{FIRST} is truncated: 0 bytes"),
    "shard too long": (lambda f: (f / SECOND).open("ab").write(b"x"), "1 bytes after the last tensor"),
    "header too deep": (
        lambda f: (f / SECOND).write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
        "header cannot be read",
    ),
    "header not JSON": (lambda f: (f / SECOND).write_bytes(b"\x04" + b"\0" * 7 + b"{{{{"), "header cannot be read"),
    "header with an endless shape": (
        lambda f: (f / SECOND).write_bytes(header('{"c":{"dtype":"F16","shape":[Infinity],"data_offsets":[0,2]}}')),
        f"{SECOND}: tensor c: malformed entry",
    ),
    "header with endless data": (
        lambda f: (f / SECOND).write_bytes(header('{"c":{"dtype":"F16","shape":[1],"data_offsets":[0,Infinity]}}')),
        f"{SECOND}: tensor c: malformed entry",
    ),
    "header lies": (wrong_span, r"tensor c: 10 bytes for F16 \[6\]"),
    "index names more": (lambda f: edit_index(f, d=SECOND), f"{SECOND} lacks tensor d"),
    "index names the other shard": (lambda f: edit_index(f, c=FIRST, b=SECOND), f"{FIRST} lacks tensor c|{SECOND}"),
    "index names less": (lambda f: edit_index(f, b=None), "tensor b is not in the index"),
    "tensor in two shards": (
        lambda f: save_file({"b": torch.ones(3), "c": torch.ones(5)}, f / SECOND),
        f"tensor b is in both .*{FIRST} and .*{SECOND}",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_by_name(folder: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder)


DOORS: dict[str, Callable[[Path], object]] = {
    "read_model_config": read_model_config,
    "describe": describe,
    "CheckpointReader": CheckpointReader,
    "resolve": lambda folder: resolve(EngineOptions(model=str(folder), kv_cache_gib=0.01)),
}
NO_FILE: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "pipe": os.mkfifo,  # whose reader would wait for ever
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", NO_FILE)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_NAME, SECOND, SINGLE_NAME])
def test_what_is_no_file_is_named(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink(missing_ok=True)
    NO_FILE[kind](folder / name)
    read = read_model_config if "config" in name else CheckpointReader
    with pytest.raises(CheckpointError, match=rf"{name} is no file, or a link to none") as caught:
        read(folder)
    assert caught.value.field == name


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_NAME, FIRST])
def test_an_empty_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    read = read_model_config if "config" in name else CheckpointReader
    with pytest.raises(CheckpointError, match=name):
        read(folder)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "loop", "config.json", "missing"])
def test_a_folder_that_is_none(folder: Path, name: str, door: str) -> None:
    (folder / "loop").symlink_to("loop")
    message = "is not a folder|has no config.json|cannot be read: |must be the folder of a checkpoint"
    with pytest.raises(ConfigError if door == "resolve" else CheckpointError, match=message):
        DOORS[door](folder / name)


@pytest.mark.parametrize("door", DOORS)
def test_a_folder_without_permission(folder: Path, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder that may not be searched answers; the superuser may search any."""

    def stat(path: Path, **_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Permission denied"):
        DOORS[door](folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        CheckpointReader(tmp_path / "nowhere")


def test_headers_tell_shape_dtype_and_size(folder: Path) -> None:
    with CheckpointReader(folder) as reader:
        assert {name: (t.dtype, t.shape, t.num_bytes) for name, t in reader.tensors.items()} == {
            "a": ("F32", (4, 6), 96),
            "b": ("BF16", (3,), 6),
            "c": ("F16", (5,), 10),
        }


def test_reads_wholes_and_slices(folder: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    with CheckpointReader(folder) as reader:
        assert torch.equal(reader.read("a"), whole)
        assert torch.equal(reader.read("a", 0, (1, 3)), whole[1:3])
        assert torch.equal(reader.read("a", 1, (2, 5)), whole[:, 2:5])


def test_an_unsharded_checkpoint(folder: Path) -> None:
    only_single(folder)
    with CheckpointReader(folder) as reader:
        assert sorted(reader.tensors) == ["a", "b"]
        assert reader.read("b").tolist() == [1.0, 1.0, 1.0]


def test_tensors_outlive_the_reader_and_no_file_stays_open(folder: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with CheckpointReader(folder) as reader:
        tensor = reader.read("c")
    assert tensor.tolist() == [0, 1, 2, 3, 4]
    assert os.listdir("/proc/self/fd") == before


def test_a_shard_that_vanishes_after_opening(folder: Path) -> None:
    with CheckpointReader(folder) as reader:
        (folder / SECOND).unlink()
        with pytest.raises(CheckpointError, match="tensor c cannot be read"):
            reader.read("c")
