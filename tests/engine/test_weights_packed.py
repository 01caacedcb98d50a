"""Packed weights: made once, mapped ever after, and never trusted without a look."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import MatrixRequest
from cierzo.engine.weights import mapping, packed, packed_file
from cierzo.engine.weights.packed import PackedStore
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.formats.packed import PANEL, PackedMatrix, PackError
from cierzo.kernels.pack import pack, pack_into

GENERATOR = torch.Generator().manual_seed(5)
TENSORS: dict[str, Tensor] = {  # odd sizes, several panels, experts
    "lm_head": torch.randn(3 * PANEL + 5, 9, generator=GENERATOR).bfloat16(),
    "gate_up": torch.randn(3, 40, 7, generator=GENERATOR).bfloat16(),
    "down": torch.randn(3, 7, 20, generator=GENERATOR).bfloat16(),
    "mlp": torch.randn(2 * 50, 6, generator=GENERATOR).bfloat16(),
}
PAIRED = {"gate_up", "mlp"}


def expected(name: str) -> Tensor:
    return pack(TENSORS[name], "bf16", paired=name in PAIRED).data


class Start:
    """One start of an engine: asks for all matrices and fills them."""

    def __init__(self, folder: Path, cache: Path, *, pack: Callable[..., None] = pack_into, **changes: Any) -> None:
        self.made: list[str] = []
        self.progress: list[tuple[int, int]] = []
        variant = changes.pop("variant", "bf16")
        with CheckpointReader(folder) as reader:
            store = PackedStore(reader, variant, cache, dtype=torch.bfloat16, pack_into=pack)
            self.matrices = {name: self._ask(store, name) for name in changes.pop("names", TENSORS)}
            self.how = store.fill(lambda *done: self.progress.append(done))

    def _ask(self, store: PackedStore, name: str) -> PackedMatrix:
        def make() -> Tensor:
            self.made.append(name)
            return TENSORS[name]

        return store.matrix(MatrixRequest(name, tuple(TENSORS[name].shape), make, name in PAIRED), "bf16")

    def check(self) -> None:
        for name, matrix in self.matrices.items():
            assert torch.equal(matrix.data, expected(name)), name
            assert matrix.shape == tuple(TENSORS[name].shape)


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Whole enough for a reader; what the matrices are made of is not in it, which the store cannot know."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    values = torch.randn(1 << 17, generator=torch.Generator().manual_seed(seed))
    save_file({"values": values}, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def files_for_small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALL_BYTES", 0)


def kept(folder: Path) -> Path:
    return folder / ".cierzo" / "packed-bf16"


def test_the_second_start_maps_what_the_first_packed(folder: Path, cache: Path) -> None:
    first = Start(folder, cache)
    first.check()
    assert first.made == list(TENSORS)
    assert first.how.endswith(f"packed into {kept(folder)}")
    total = sum(expected(name).numel() for name in TENSORS)
    assert first.progress == sorted(first.progress)
    assert first.progress[-1] == (total, total)
    second = Start(folder, cache)
    second.check()
    assert second.made == []
    assert second.progress == []
    assert second.how.endswith(f"mapped from {kept(folder)}")
    assert os.listdir(kept(folder).parent) == ["packed-bf16"]
    assert not cache.exists()


@pytest.mark.parametrize("piece_bytes", [1, 700, 1 << 20])
def test_the_pieces_do_not_show(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(packed, "PIECE_BYTES", piece_bytes)
    start = Start(folder, cache)
    start.check()
    assert len(start.progress) == {1: 4 + 3 + 3 + 1, 700: 4 + 3 + 3 + 1, 1 << 20: 4}[piece_bytes]
    monkeypatch.setattr(packed, "SMALL_BYTES", 1 << 30)
    Start(folder, cache).check()


def test_small_weights_are_packed_into_memory(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed, "SMALL_BYTES", 1 << 20)
    for _ in range(2):
        start = Start(folder, cache)
        start.check()
        assert start.made == list(TENSORS)
        assert start.how.endswith("packed into memory")
    assert not kept(folder).parent.exists()
    assert not caplog.messages


# --- files that are not used -------------------------------------------------------------------------------


def another_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {path.name: path.stat().st_mtime for path in folder.glob("*.safetensors")}
    make_checkpoint(folder.with_name("other"), seed=1)
    for name, time in times.items():
        shutil.copy(folder.with_name("other") / name, folder / name)
        os.utime(folder / name, (time, time))


def touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(folder / "model.safetensors", (1e9, 1e9))


def another_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / "config.json").open("a") as file:
        file.write("\n")


def another_way_of_packing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one format, by one bit."""

    def pack_otherwise(weight: Tensor, format: str, *, paired: bool) -> PackedMatrix:
        packed = pack(weight, format, paired=paired)
        packed.data[-1] ^= format == "int8"
        return packed

    monkeypatch.setattr(packed_file, "pack", pack_otherwise)
    monkeypatch.setattr(packed_file, "layout", packed_file.layout.__wrapped__)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_seed, "was packed from another checkpoint"),
        (touched, "was packed from another checkpoint"),
        (another_config, "was packed from another checkpoint"),
        (another_way_of_packing, "holds another layout or other matrices"),
    ],
)
def test_a_stale_file_is_replaced(
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[..., None],
    reason: str,
) -> None:
    caplog.set_level(logging.INFO)
    Start(folder, cache)
    before = kept(folder).stat().st_ino
    change(folder, monkeypatch)
    start = Start(folder, cache)
    start.check()
    assert start.made == list(TENSORS)
    assert f"{kept(folder)} {reason}: weights are packed again" in caplog.messages
    assert kept(folder).stat().st_ino != before
    assert Start(folder, cache).made == []


def test_other_matrices_are_packed_anew(folder: Path, cache: Path) -> None:
    Start(folder, cache)
    fewer = Start(folder, cache, names=["gate_up", "lm_head"])
    fewer.check()
    assert fewer.made == ["gate_up", "lm_head"]
    beside = Start(folder, cache, variant="int8")
    assert beside.made == list(TENSORS)
    assert Start(folder, cache, names=["gate_up", "lm_head"]).made == []
    assert sorted(os.listdir(kept(folder).parent)) == ["packed-bf16", "packed-int8"]


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, path.stat().st_size + size if size <= 0 else size)


def flip(place: int, bits: int = 1) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= bits
        path.write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut(-1), "instead of"),
        (cut(4096), "instead of"),
        (cut(20), "is no file of packed weights"),
        (lambda path: os.truncate(path, 0), "is no file of packed weights"),
        (lambda path: path.open("ab").write(b"x"), "instead of"),
        (flip(0), "is no file of packed weights"),
        (flip(8), "instead of"),
        (flip(-2), "has a damaged index"),
        (flip(-4, 0x80), "has a damaged index"),  # no UTF-8
        (flip(-4), "other matrices"),
    ],
)
def test_a_damaged_file_is_replaced(
    folder: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    caplog.set_level(logging.INFO)
    Start(folder, cache)
    damage(kept(folder))
    start = Start(folder, cache)
    start.check()
    assert start.made == list(TENSORS)
    assert reason in caplog.text
    assert Start(folder, cache).made == []


def test_the_file_of_another_checkpoint_is_refused(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_checkpoint(folder.with_name("other"), seed=1)
    Start(other, cache)
    shutil.copytree(other / ".cierzo", folder / ".cierzo")
    caplog.set_level(logging.INFO)
    assert Start(folder, cache).made == list(TENSORS)
    assert "was packed from another checkpoint" in caplog.text


# --- places that cannot be written -------------------------------------------------------------------------


def in_cache(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_a_checkpoint_that_cannot_be_written_is_kept_in_the_cache(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / ".cierzo").write_text("no folder")  # root may write anywhere else
    Start(folder, cache).check()
    assert [path.name for path in in_cache(cache)] == ["packed-bf16"]
    assert len(caplog.messages) == 1
    second = Start(folder, cache)
    second.check()
    assert second.made == []
    assert len(caplog.messages) == 1


def test_nowhere_to_write(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / ".cierzo").write_text("no folder")
    cache.write_text("no folder either")
    for _ in range(2):
        start = Start(folder, cache)
        start.check()
        assert start.made == list(TENSORS)
        assert start.how.endswith("packed into memory")
    assert caplog.messages[-1] == "packed weights are kept nowhere: the next start packs them again"


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 8 KB, as on a disk that becomes full. (Nor may the file that pytest reports into.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_becomes_full(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_files():
        start = Start(folder, cache)
    start.check()
    assert start.how.endswith("packed into memory")
    assert "File too large" in caplog.text
    assert os.listdir(folder / ".cierzo") == []
    assert in_cache(cache) == []


def test_a_disk_that_is_full(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = os.statvfs_result((4096, 4096, 100, 1, 1, 100, 100, 100, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    start = Start(folder, cache)
    start.check()
    assert start.how.endswith("packed into memory")
    assert "has 0.00000409 GB free, 0.0000180 GB are needed" in caplog.text
    assert os.listdir(folder / ".cierzo") == []


def test_a_file_that_cannot_be_mapped(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it fails in the middle: what is mapped by then is not writable."""
    calls = 0

    def map_file(target: Tensor, file: int, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise OSError(19, "No such device")
        whole(target, file, offset)

    whole = mapping.map_file
    monkeypatch.setattr(mapping, "map_file", map_file)
    start = Start(folder, cache)
    start.check()
    assert start.how.endswith("packed into memory")


def test_an_error_while_packing_leaves_nothing(folder: Path, cache: Path) -> None:
    def fail(*arguments: object) -> None:
        raise PackError("int8 cannot hold NaN")

    with pytest.raises(CheckpointError, match="lm_head, from 0 on: int8 cannot hold NaN") as caught:
        Start(folder, cache, pack=fail)
    assert caught.value.field == "lm_head"
    assert os.listdir(folder / ".cierzo") == []
    assert in_cache(cache) == []


def test_misuse() -> None:
    reader: Any = None
    store = PackedStore(reader, "bf16", Path(), dtype=torch.bfloat16)
    request = MatrixRequest("a", (4, 4), lambda: torch.zeros(4, 4))
    store.matrix(request, "bf16")
    with pytest.raises(ValueError, match="a was asked for already"):
        store.matrix(request, "bf16")


def test_a_tensor_of_another_shape(folder: Path, cache: Path) -> None:
    with CheckpointReader(folder) as reader:
        store = PackedStore(reader, "bf16", cache, dtype=torch.bfloat16)
        store.matrix(MatrixRequest("a", (4, 4), lambda: torch.zeros(4, 5)), "bf16")
        with pytest.raises(ValueError, match=r"matrix a: made \[4, 5\] instead of \[4, 4\]"):
            store.fill()


# --- several processes -------------------------------------------------------------------------------------


def test_a_second_starter_waits_and_maps(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are between open files, not processes: two threads meet them as two processes do."""
    packs, waits = threading.Event(), threading.Event()
    monkeypatch.setattr(packed_file._log, "info", lambda *text: waits.set())

    def wait_for_the_second(*arguments: Any) -> None:
        packs.set()
        assert waits.wait(60)
        pack_into(*arguments)

    starts: list[Start] = []
    first = threading.Thread(target=lambda: starts.append(Start(folder, cache, pack=wait_for_the_second)))
    first.start()
    assert packs.wait(60)
    second = Start(folder, cache)
    first.join()
    second.check()
    starts[0].check()
    assert second.made == []
    assert starts[0].made == list(TENSORS)


def test_what_a_killed_packer_left_is_removed(folder: Path, cache: Path) -> None:
    (folder / ".cierzo").mkdir()
    (folder / ".cierzo" / ".packed-bf16.partial-abc").write_text("half")
    Start(folder, cache)
    assert os.listdir(folder / ".cierzo") == ["packed-bf16"]


def test_without_locks_all_pack(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(packed_file.fcntl, "flock", refuse)
    (folder / ".cierzo").mkdir()
    (folder / ".cierzo" / ".packed-bf16.partial-abc").write_text("of a living process, perhaps")
    Start(folder, cache).check()
    assert sorted(os.listdir(folder / ".cierzo")) == [".packed-bf16.partial-abc", "packed-bf16"]


# --- memory ------------------------------------------------------------------------------------------------

PEAK = """
import sys
import torch
from pathlib import Path
from cierzo.engine.weights import packed
from cierzo.engine.parameters import MatrixRequest
from cierzo.engine.weights.packed import PackedStore
from cierzo.engine.weights.reader import CheckpointReader

def bytes_of(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))

packed.PIECE_BYTES = 1 << 20
folder, where = sys.argv[1:]
if where == "memory":
    packed.SMALL_BYTES = 1 << 40
torch.set_num_threads(1)
copy = lambda source, format, paired, target: target.copy_(source.reshape(-1).view(torch.uint8))
copy(torch.zeros(4, 4), "", False, torch.zeros(64, dtype=torch.uint8))
with CheckpointReader(folder) as reader:
    store = PackedStore(reader, "bf16", Path(folder) / "cache", dtype=torch.bfloat16, pack_into=copy)
    weights = []
    for name, info in reader.tensors.items():
        weights.append(store.matrix(MatrixRequest(name, info.shape, lambda name=name: reader.read(name)), "bf16"))
    num_bytes = store.num_bytes
    Path("/proc/self/clear_refs").write_text("5")
    before = bytes_of("VmRSS")
    store.fill()
    packing = bytes_of("VmHWM") - before
    assert sum(int(weight.data[::4096].sum()) for weight in weights) > 0
    print(num_bytes, packing, bytes_of("VmHWM") - before)
"""


@pytest.mark.parametrize("where", ["file", "memory"])
def test_packing_takes_hardly_more_than_the_packed_weights(tmp_path: Path, where: str) -> None:
    """Of a file, nothing stays in memory until it is touched."""
    (tmp_path / "config.json").write_text("{}")
    tensors = {f"experts.{layer}": torch.full((4, 1024, 1024), 1.5, dtype=torch.bfloat16) for layer in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")  # whole panels: packed, they are as large
    command = [sys.executable, "-c", PEAK, str(tmp_path), where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    num_bytes, packing, used = map(int, done.stdout.split())
    assert num_bytes > 50e6
    assert used < 1.15 * num_bytes
    assert packing < (0.15 if where == "file" else 1.15) * num_bytes
