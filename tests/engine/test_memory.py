"""What a model takes in memory, from its first start on: its packed weights, its cache, and hardly more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from native_only import needs_native

from cierzo.engine.weights.make import make_checkpoint

CACHE_BYTES = 0.01 * 2**30
# A tiny model goes first, so that the code of torch and ours is in memory before anything is counted.
GROWTH = """
import sys
from pathlib import Path
from cierzo.engine import LLM, SamplingParams
from cierzo.engine.weights import packed

def resident_bytes(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))

def generate(model):
    with LLM(model, weights=weights, threads=1, kv_cache_gib=0.01, max_model_len=256) as llm:
        outputs = llm.generate([list(range(1, 200))] * 2, SamplingParams(max_tokens=8, temperature=0.0))
        assert [len(output.token_ids) for output in outputs] == [8, 8]

packed.PIECE_BYTES, packed.SMALL_BYTES = 1 << 20, 1 << 20
tiny, model, weights = sys.argv[1:]
generate(tiny)
Path("/proc/self/clear_refs").write_text("5")
before = resident_bytes("VmRSS")
generate(model)
print(resident_bytes("VmHWM") - before)
"""


def used_bytes(tiny: Path, model: Path, weights: str) -> int:
    """Memory that a process takes at most when it loads the model and generates a little."""
    command = [sys.executable, "-c", GROWTH, str(tiny), str(model), weights]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and one of 175 MB in bf16, 85 % of it experts."""
    folder = tmp_path_factory.mktemp("memory")
    scales: dict[str, str | float] = {"tiny": "tiny", "model": 0.15}
    tiny, model = (make_checkpoint(folder / name, like="small4", scale=scale) for name, scale in scales.items())
    return tiny, model


@needs_native
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_model_takes_its_packed_weights_and_hardly_more(models: tuple[Path, Path], weights: str) -> None:
    """At the first start, which packs, and at the second. Every expert is used: all of the file is touched."""
    tiny, model = models
    for start in ("first", "second"):
        used = used_bytes(tiny, model, weights)
        packed_bytes = (model / ".cierzo" / f"packed-{weights}").stat().st_size
        assert 0.5 * packed_bytes < used < 1.15 * (packed_bytes + CACHE_BYTES), (start, used, packed_bytes)


@needs_native
@pytest.mark.parametrize("published", ["hf-fp8", "native-nvfp4"])
def test_dequantising_takes_a_matrix_at_a_time(models: tuple[Path, Path], tmp_path: Path, published: str) -> None:
    """From shards of 32 MB, of which several are read at a time. A layer's stack of experts, dequantised, would be
    16.4 MB beside the packed weights, and those of all layers as much as these."""
    folder = tmp_path / "model"
    make_checkpoint(folder, like="small4", scale=0.15, checkpoint_format=published, max_shard_bytes=32 << 20)
    assert len(list(folder.glob("*.safetensors"))) > 2
    used = used_bytes(models[0], folder, "bf16")
    packed_bytes = (folder / ".cierzo" / "packed-bf16").stat().st_size
    stack_bytes = 2 * 20 * 640 * 640
    assert 0.9 * packed_bytes < used < packed_bytes + stack_bytes, (used, packed_bytes)
