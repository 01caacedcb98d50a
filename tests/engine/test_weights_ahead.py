"""A checkpoint is read ahead of its use, in pieces at a time, within bounds; an error names file and tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from published import SMALL3, SMALL4, Published
from safetensors.torch import save_file

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.build import build_model, parameter_specs
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.parameters import MatrixRequest, Parameter, PlainMatrices
from cierzo.engine.weights import ahead, mapping
from cierzo.engine.weights.ahead import ReadAhead, ReadFirst
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.formats.packed import Matrix

SECONDS = 10


def in_shards(folder: Path, model: Published, count: int) -> Path:
    """The checkpoint in so many shards, its tensors dealt out in turn."""
    model.write(folder)
    stem = "consolidated" if model.native else "model"
    (folder / f"{stem}.safetensors").unlink()
    names = sorted(model.stored)
    files = {f"{stem}-{number + 1}-of-{count}.safetensors": names[number::count] for number in range(count)}
    for file, held in files.items():
        save_file({name: model.stored[name] for name in held}, folder / file)
    placed = {name: file for file, held in files.items() for name in held}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


@contextmanager
def loaded(folder: Path) -> Iterator[tuple[CheckpointReader, dict[str, Parameter]]]:
    specs = parameter_specs(read_model_config(folder))
    with CheckpointReader(folder) as reader:
        yield reader, load_parameters(reader, specs, dtype=torch.bfloat16, device="cpu")


class Disk:
    """A `read` that notes what it is asked for. `hold`: until it is set, nobody is done."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.at_once = self.most_at_once = 0
        self.hold = threading.Event()
        self.hold.set()
        self._lock = threading.Lock()

    def __call__(self, begin: int, end: int) -> None:
        with self._lock:
            self.asked.append((begin, end))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.hold.wait(SECONDS)
        with self._lock:
            self.at_once -= 1

    @property
    def num_bytes(self) -> int:
        return sum(end - begin for begin, end in self.asked)


def mapped_bytes(parameter: Parameter) -> set[tuple[int, int]]:
    """Where its tensors lie, but for the order of its rows, which is in no file."""
    tensors = [one for _, one in ahead._tensors("", parameter) if one.dtype != torch.int64]
    return {(one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors}


CASES = [(SMALL4, name) for name in ("hf", "hf-fp8", "native-fp8", "native-nvfp4")] + [(SMALL3, "native")]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_every_byte_is_read_before_its_wait_is_over(tmp_path: Path, shape: object, name: str) -> None:
    model = Published(shape, name)  # type: ignore[arg-type]
    with loaded(in_shards(tmp_path, model, 3)) as (reader, parameters):
        disk = Disk()
        with ReadAhead(parameters, reader, read=disk, window_bytes=1) as reading:
            for parameter in parameters.values():
                reading.wait([parameter])
                for begin, end in mapped_bytes(parameter):
                    assert any(first <= begin and end <= last for first, last in disk.asked)


def test_several_shards_are_read_at_the_same_time(tmp_path: Path) -> None:
    """Each read waits for one of another shard."""
    with loaded(in_shards(tmp_path, Published(SMALL4, "hf"), 2)) as (reader, parameters):
        shards = sorted(mapping.mapped_ranges(reader.files))
        arrived = {file: threading.Event() for *_, file in shards}

        def read(begin: int, end: int) -> None:
            (own,) = {file for first, last, file in shards if first <= begin < last}
            arrived[own].set()
            assert all(event.wait(SECONDS) for event in arrived.values())

        with ReadAhead(parameters, reader, read=read) as reading:
            assert reading.wait(parameters.values()) > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_bounded(tmp_path: Path, threads: int) -> None:
    with loaded(in_shards(tmp_path, Published(SMALL4, "native"), 2)) as (reader, parameters):
        disk = Disk()
        before = threading.active_count()
        with ReadAhead(parameters, reader, read=disk, threads=threads) as reading:
            reading.wait(parameters.values())
            assert threading.active_count() <= before + threads
        assert disk.most_at_once <= threads
        assert threading.active_count() == before


@pytest.mark.parametrize("window_bytes", [1, 20_000, 1 << 30])
def test_no_more_than_the_window_is_read_ahead(tmp_path: Path, window_bytes: int) -> None:
    with loaded(in_shards(tmp_path, Published(SMALL4, "hf"), 2)) as (reader, parameters):
        sizes = {name: sum(end - begin for begin, end in mapped_bytes(one)) for name, one in parameters.items()}
        total, largest = sum(sizes.values()), max(sizes.values())
        disk = Disk()
        with ReadAhead(parameters, reader, read=disk, window_bytes=window_bytes) as reading:
            assert disk.asked == []
            reading.wait([parameters["model.layers.0.input_layernorm.weight"]])
            reading._pool.shutdown(wait=True)
            assert disk.num_bytes <= window_bytes + 2 * largest
            assert (disk.num_bytes >= total) == (window_bytes > total)


def test_what_is_used_makes_room(tmp_path: Path) -> None:
    with loaded(in_shards(tmp_path, Published(SMALL4, "hf"), 2)) as (reader, parameters):
        sizes = {name: sum(end - begin for begin, end in mapped_bytes(one)) for name, one in parameters.items()}
        window_bytes, used_bytes = 1, 0
        layers = [name for name in parameters if name.startswith("model.layers.")]
        with ReadAhead(parameters, reader, read=lambda begin, end: None, window_bytes=window_bytes) as reading:
            for name in layers[:-1]:
                assert reading.wait([parameters[name]]) == sizes[name]
                used_bytes += sizes[name]
                begun = sum(
                    sizes[names] for names in layers if reading._place[id(parameters[names])] in reading._reading
                )
                assert begun > used_bytes  # the next is on its way
                assert begun <= used_bytes + window_bytes + max(sizes.values())


def large_tensor(folder: Path) -> CheckpointReader:
    """A checkpoint of one tensor, of 16 MB of ones."""
    save_file({"lm_head.weight": torch.ones(1024, 4096)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return CheckpointReader(folder)


def test_a_large_tensor_is_read_in_pieces_without_gaps(tmp_path: Path) -> None:
    with large_tensor(tmp_path) as reader:
        tensor, disk = reader.read("lm_head.weight"), Disk()
        with ReadAhead({"lm_head.weight": tensor}, reader, read=disk) as reading:
            reading.wait([tensor])
        begins, ends = zip(*sorted(disk.asked), strict=True)
        assert {(begins[0], ends[-1])} == mapped_bytes(tensor)
        assert begins[1:] == ends[:-1]
        assert all(begin % ahead.PIECE_BYTES == 0 for begin in begins[1:])
        assert len(begins) == -(-ends[-1] // ahead.PIECE_BYTES) - begins[0] // ahead.PIECE_BYTES


def test_what_was_read_takes_no_memory_of_this_process(tmp_path: Path) -> None:

    def resident_bytes() -> int:
        found, inside = 0, False
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            if "-" in line.partition(" ")[0]:
                inside = line.endswith("model.safetensors")
            elif inside and line.startswith("Rss:"):
                found += int(line.split()[1]) * 1024
        return found

    with large_tensor(tmp_path) as reader:
        tensor = reader.read("lm_head.weight")
        with ReadAhead({"lm_head.weight": tensor}, reader) as reading:
            assert reading.wait([tensor]) == tensor.nbytes
            assert reading.wait([tensor]) == 0
        # Where pieces meet, or the file begins, one thread may map a page that another has let go.
        assert resident_bytes() <= 2 * mapping.HUGE_PAGE_BYTES < tensor.nbytes // 2
        assert float(tensor.sum()) == 1024 * 4096  # nothing of it is lost
        assert resident_bytes() >= tensor.nbytes


def test_memory_that_is_no_file_is_left_alone(tmp_path: Path) -> None:
    """A parameter of another dtype was copied when it was loaded: its pages must not be dropped."""
    folder = in_shards(tmp_path, Published(SMALL3, "hf"), 2)
    specs = parameter_specs(read_model_config(folder))
    with CheckpointReader(folder) as reader:
        parameters = load_parameters(reader, specs, dtype=torch.float32, device="cpu")
        before = {name: one.clone() for name, one in parameters.items() if isinstance(one, torch.Tensor)}
        with ReadAhead(parameters, reader) as reading:
            assert reading.wait(parameters.values()) == 0
        assert before
        assert all(torch.equal(parameters[name], one) for name, one in before.items())  # type: ignore[arg-type]


def test_memory_behind_a_mapping_is_none_of_it() -> None:
    tensor = torch.ones(16)
    begin = tensor.data_ptr()
    assert ahead._mapped("x", tensor, [(begin - 64, begin, "file")]) == []
    assert ahead._mapped("x", tensor, [(begin + 64, begin + 128, "file")]) == []
    (span,) = ahead._mapped("x", tensor[:4], [(begin - 64, begin + 64, "file")])
    assert (span.begin, span.end) == (begin, begin + 16)


@pytest.mark.parametrize(("shape", "name", "tensor"), [
    (SMALL4, "hf", "language_model.model.layers.1.mlp.experts.down_proj"),
    (SMALL4, "hf-fp8", "language_model.model.layers.1.mlp.experts.down_proj"),
    (SMALL4, "native-nvfp4", "layers.1.experts.3.w2"),
    (SMALL3, "native", "layers.1.feed_forward.w2.weight"),
])  # fmt: skip
def test_a_shard_that_ends_early_names_file_and_tensor(
    tmp_path: Path, shape: object, name: str, tensor: str
) -> None:
    """The shard was whole when it was opened: a disk in a network, a file that is copied over."""
    model = Published(shape, name)  # type: ignore[arg-type]
    folder = in_shards(tmp_path, model, 2)
    stored = next(full for full in model.stored if full.startswith(tensor))
    with loaded(folder) as (reader, parameters):
        file, pages = reader.tensors[stored].file, mapping.PAGE_BYTES
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        begin = json.loads(file.read_bytes()[8:header])[stored]["data_offsets"][0] + header
        os.truncate(file, begin // pages * pages)
        with (
            pytest.raises(CheckpointError, match=r"tensor .* cannot be read: it has become shorter") as caught,
            ReadAhead(parameters, reader) as reading,
        ):
            reading.wait(parameters.values())
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("hf", "language_model.model.layers.1.self_attn.o_proj.weight"),
        ("hf-fp8", "language_model.model.layers.1.mlp.experts.down_proj[3]"),
        ("native", "layers.1.attention.wo.weight"),
        ("native-nvfp4", "layers.1.experts.3.w2"),
    ],
)
def test_a_disk_that_fails_names_the_tensor(tmp_path: Path, name: str, tensor: str) -> None:
    """Also where several tensors lie in the piece that failed."""
    model = Published(SMALL4, name)
    with loaded(in_shards(tmp_path, model, 2)) as (reader, parameters):
        stored = next(one for one in model.stored if one.startswith(tensor.partition("[")[0]))
        whole = reader.read(stored)
        part = whole[3] if "[" in tensor else whole
        begin, end = part.data_ptr(), part.data_ptr() + part.nbytes

        def read(first: int, last: int) -> None:
            if first < end and begin < last:
                raise OSError(5, "Input/output error")

        with (
            pytest.raises(CheckpointError, match=r": tensor .* cannot be read: Input/output error") as caught,
            ReadAhead(parameters, reader, read=read) as reading,
        ):
            reading.wait(parameters.values())
        assert caught.value.field == tensor
        assert str(caught.value).startswith(f"{reader.tensors[stored].file}: ")


def test_ctrl_c_drops_what_is_not_begun(tmp_path: Path) -> None:
    with loaded(in_shards(tmp_path, Published(SMALL4, "native"), 2)) as (reader, parameters):
        disk = Disk()
        disk.hold.clear()
        before = threading.active_count()

        def interrupted(reading: ReadAhead) -> None:
            for place in range(6):
                reading._begin(place)
            last, *_ = reading._reading[5].pieces[-1]
            last.add_done_callback(lambda _: disk.hold.set())  # when it is dropped
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), ReadAhead(parameters, reader, read=disk, threads=2) as reading:
            interrupted(reading)
        assert len(disk.asked) == 2  # of six parameters: those under way
        assert threading.active_count() == before


def test_a_source_reads_parts_before_it_makes_them(tmp_path: Path) -> None:
    with loaded(in_shards(tmp_path, Published(SMALL4, "hf"), 2)) as (reader, parameters):
        names = ("model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight")
        parts = tuple(parameters[name] for name in names)
        disk, seen = Disk(), []
        told: list[tuple[int, int]] = []

        def made() -> Parameter:
            seen.append(disk.num_bytes)
            return parts[0]

        progress = lambda done, total: told.append((done, total))  # noqa: E731
        with ReadAhead(parameters, reader, read=disk, window_bytes=1, progress=progress) as reading:
            source = ReadFirst(PlainMatrices(), reading, reader, at_once=True)
            source.matrix(MatrixRequest("x", tuple(parts[0].shape), made, parts=parts))
            sizes = [part.nbytes for part in parts if isinstance(part, torch.Tensor)]
            assert seen[0] >= sum(sizes)
            norm = parameters["model.norm.weight"]
            source.tensor(norm)
            assert told[-1][0] == sum(sizes) + norm.nbytes  # type: ignore[union-attr]
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        expected = sum(end - begin for one in parameters.values() for begin, end in mapped_bytes(one))
        assert {total for _, total in told} == {expected}


@pytest.mark.parametrize(("shape", "name"), [(SMALL4, "hf"), (SMALL4, "native-nvfp4"), (SMALL3, "native")])
def test_a_model_names_the_parts_of_every_matrix(tmp_path: Path, shape: object, name: str) -> None:
    """So that none is made before it is read."""
    folder = Published(shape, name).write(tmp_path / "model")  # type: ignore[arg-type]
    used: set[int] = set()

    class Source(PlainMatrices):
        def tensor(self, stored: Parameter) -> torch.Tensor:
            used.add(id(stored))
            return super().tensor(stored)

        def matrix(self, request: MatrixRequest) -> Matrix:
            assert request.parts, request.key
            used.update(map(id, request.parts))
            return super().matrix(request)

    config = read_model_config(folder)
    with loaded(folder) as (_, parameters):
        build_model(config, parameters, device="cpu", dtype=torch.bfloat16, matrices=Source())
        assert used == {id(parameter) for parameter in parameters.values()}


def test_what_a_gpu_has_taken_is_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the host would hold all of a checkpoint that is only carried through it."""
    let_go: list[set[Path]] = []
    monkeypatch.setattr(ahead, "RELEASE_BYTES", 10_000)
    monkeypatch.setattr(mapping, "release_pages", lambda files: let_go.append(set(files)))
    with loaded(in_shards(tmp_path, Published(SMALL4, "hf"), 2)) as (reader, parameters):
        matrix = parameters["model.layers.0.mlp.experts.down_proj"]
        assert matrix.nbytes >= 10_000  # type: ignore[union-attr]
        request = MatrixRequest("x", tuple(matrix.shape), lambda: matrix, parts=(matrix,))
        for at_once, times in ((False, 0), (True, 1)):
            with ReadAhead(parameters, reader, read=lambda begin, end: None) as reading:
                ReadFirst(PlainMatrices(), reading, reader, at_once=at_once).matrix(request)
            assert let_go == [reader.files] * times


CORE = """
import os, sys
from pathlib import Path
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.errors import CheckpointError
from cierzo.engine.worker.runner import load_model

folder = Path(sys.argv[1])
shard = folder / "model-2-of-2.safetensors"
config = resolve(EngineOptions(model=str(folder), kv_cache_gib=0.01))
try:
    load_model(config, begin=lambda parameters: os.truncate(shard, 4096))
except CheckpointError as error:
    print(error)
"""


def test_the_engine_dies_with_words_when_a_shard_is_gone_under_it(tmp_path: Path) -> None:
    """And not by a signal, of which nobody could tell what it was."""
    folder = in_shards(tmp_path, Published(SMALL4, "hf"), 2)
    done = subprocess.run([sys.executable, "-c", CORE, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{folder / 'model-2-of-2.safetensors'}: tensor language_model.model.layers." in done.stdout
    assert "cannot be read: it has become shorter" in done.stdout
