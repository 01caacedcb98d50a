"""Options become a whole configuration, or a ConfigError with field, limit and value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cierzo.cache.layout import GIB
from cierzo.engine import config, host
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.errors import ConfigError
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.weights.make import make_checkpoint
from cierzo.kernels.config import KernelsConfig


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small checkpoint: 3,072 bytes of KV per token, positions up to 131,072."""
    return str(make_checkpoint(tmp_path_factory.mktemp("config") / "tiny", like="small3"))


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "threads": [0, -1],
    "max_model_len": [0, 131_073],
    "kv_cache_gib": [0.0, -1.0, NAN, INF, 1e-7, 1e6],
    "block_tokens": [0],
    "budget_tokens": [0],
    "max_chunk_tokens": [0],
    "max_running": [0],
    "max_waiting": [0],
    "priority_aging_s": [0.0, NAN],
    "softmax_scale": [0.0, INF],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values]
)
def test_values_out_of_bounds_are_refused(checkpoint: str, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        resolve(EngineOptions(model=checkpoint, **{field: value}))
    assert (caught.value.field, caught.value.value) == (field, str(value))
    assert caught.value.limit


@pytest.mark.parametrize(
    ("field", "value"), [("max_connections", 0), ("max_logprobs", -1), ("handshake_timeout_s", NAN)]
)
def test_limits_of_the_front_end_have_bounds_too(checkpoint: str, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        resolve(EngineOptions(model=checkpoint, frontend=FrontendConfig(**{field: value})))


def test_a_cache_of_one_byte_is_in_the_format_that_the_device_has_kernels_for(checkpoint: str) -> None:
    for device, right, wrong in (("cpu", "int8", "fp8"), ("cuda", "fp8", "int8")):
        options: dict[str, Any] = {"model": checkpoint, "device": device, "instruction_set": "auto"}
        if config.default_instruction_set() != "reference" or device == "cuda":
            with pytest.raises(
                ConfigError, match=f"kv_dtype {wrong} has no kernels on a [CG]PU; {right} has"
            ) as caught:
                resolve(EngineOptions(**options, kv_dtype=wrong))
            assert (caught.value.field, caught.value.limit, caught.value.value) == ("kv_dtype", right, wrong)
        assert resolve(EngineOptions(**options, kv_dtype=right)).layout.dtype == right
    options = {"model": checkpoint, "instruction_set": "reference"}
    assert resolve(EngineOptions(**options, kv_dtype="fp8")).layout.dtype == "fp8"


def test_activations_in_fp8_need_a_gpu_and_weights_in_fp8(checkpoint: str) -> None:
    def resolved(**options: Any) -> Any:
        return resolve(EngineOptions(model=checkpoint, **options))

    assert resolved().activations == resolved(activations="bf16").activations == "bf16"
    assert resolved(dtype="float32").activations == "float32"
    assert resolved(device="cuda", weights="fp8").activations == "bf16"
    whole = resolved(device="cuda", weights="fp8", activations="fp8")
    assert whole.activations == "fp8"
    assert "weights fp8, activations fp8, KV cache bfloat16" in whole.describe()
    refused: tuple[tuple[dict[str, Any], str, str], ...] = (
        ({"activations": "fp8"}, "device cuda", "auto"),
        ({"activations": "fp8", "device": "cpu", "weights": "int8"}, "device cuda", "cpu"),
        ({"activations": "fp8", "device": "cuda"}, "weights fp8", "auto"),
        ({"activations": "fp8", "device": "cuda", "weights": "nvfp4"}, "weights fp8", "nvfp4"),
        ({"activations": "bf16", "dtype": "float32"}, "dtype bfloat16", "float32"),
    )
    for options, limit, value in refused:
        with pytest.raises(ConfigError, match=f"activations {options['activations']} needs {limit}") as caught:
            resolved(**options)
        assert (caught.value.field, caught.value.limit, caught.value.value) == ("activations", limit, value)


def test_a_length_that_does_not_fit_is_refused_with_the_numbers(checkpoint: str) -> None:
    kv_cache_gib = 10 * 32 * 3072 / GIB
    assert resolve(EngineOptions(model=checkpoint, kv_cache_gib=kv_cache_gib)).scheduler.max_model_len == 320
    with pytest.raises(ConfigError, match=r"holds 320 tokens") as caught:
        resolve(EngineOptions(model=checkpoint, kv_cache_gib=kv_cache_gib, max_model_len=321))
    assert (caught.value.limit, caught.value.value) == ("320", "321")


def test_a_budget_beyond_the_free_memory_is_refused(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "available_memory_bytes", lambda: GIB)
    assert resolve(EngineOptions(model=checkpoint, kv_cache_gib=0.9)).cache.num_blocks == int(0.9 * GIB) // (
        32 * 3072
    )
    with pytest.raises(ConfigError, match=r"1\.0 GiB of memory are free"):
        resolve(EngineOptions(model=checkpoint, kv_cache_gib=1.1))
    resolve(EngineOptions(model=checkpoint, kv_cache_gib=1.1, device="cuda"))  # its memory is another one


def test_the_front_end_admits_what_the_queue_takes(checkpoint: str) -> None:
    assert resolve(EngineOptions(model=checkpoint, max_waiting=7)).frontend.max_open_samples == 7


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIERZO_CACHEDIR", "/x")
    with pytest.raises(ConfigError, match="CIERZO_CACHEDIR") as caught:
        config.check_environment()
    assert caught.value.limit == "CIERZO_CACHE_DIR, CIERZO_INSTRUCTION_SET, CIERZO_NATIVE"


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CIERZO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config.cache_dir() == tmp_path / "cierzo"
    monkeypatch.setenv("CIERZO_CACHE_DIR", "relative")
    with pytest.raises(ConfigError, match="absolute"):
        config.cache_dir()


def test_no_request_may_ask_for_more_samples_than_can_wait(checkpoint: str) -> None:
    front_end = resolve(EngineOptions(model=checkpoint, max_waiting=3)).frontend
    assert (front_end.max_samples, front_end.max_open_samples) == (3, 3)


def test_threads_spin_briefly_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    config.spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "5000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    config.spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_the_instruction_set_is_the_options_then_the_environments(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(**options: Any) -> str:
        return resolve(EngineOptions(model=checkpoint, **options)).kernels.instruction_set

    monkeypatch.delenv("CIERZO_INSTRUCTION_SET", raising=False)
    assert chosen() == "auto"
    monkeypatch.setenv("CIERZO_INSTRUCTION_SET", "avx512")
    assert chosen() == "avx512"
    assert chosen(kernels=KernelsConfig(instruction_set="avx2")) == "avx2"
    assert chosen(instruction_set="reference", kernels=KernelsConfig(instruction_set="avx2")) == "reference"
    monkeypatch.setenv("CIERZO_INSTRUCTION_SET", "avx1024")
    with pytest.raises(ConfigError, match="CIERZO_INSTRUCTION_SET must be one of auto, avx512_bf16") as caught:
        chosen()
    assert caught.value.value == "avx1024"


V1 = {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, [2.5]),
        ("0::/", {"cpu.max": "max 100000"}, []),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, [0.5]),
        ("0::/not/seen/from/here", {"cpu.max": "300000 100000"}, [3.0]),
        ("3:cpu,cpuacct:/\n0::/", {f"cpu/{name}": value for name, value in V1.items()}, [1.5]),
        ("3:cpu:/docker/x", {f"cpu/docker/x/{name}": value for name, value in V1.items()}, [1.5]),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("3:cpuset:/", {f"cpu/{name}": value for name, value in V1.items()}, []),
        ("", {}, []),
    ],
)
def test_the_limits_of_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], limits: list[float]
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert list(host._cpu_limits(tmp_path)) == limits


@pytest.mark.parametrize(("limits", "expected"), [([], 3), ([2.9, 8.0], 2), ([0.2], 1), ([4.0], 3)])
def test_no_more_threads_than_cpus(monkeypatch: pytest.MonkeyPatch, limits: list[float], expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7})
    monkeypatch.setattr(host, "_cpu_limits", lambda: iter(limits))
    assert host.usable_cpus() == expected


# --- profiles ----------------------------------------------------------------------------------------------


def test_a_profile_fills_what_is_left_open(checkpoint: str) -> None:
    found = resolve(EngineOptions(model=checkpoint, profile="throughput"))
    limits = found.scheduler
    assert (limits.budget_tokens, limits.max_chunk_tokens, limits.max_running) == (2048, 1024, 64)
    assert (found.weights, found.overlap, found.layout.dtype) == ("int8", False, "bfloat16")
    latency = resolve(EngineOptions(model="small4", profile="latency", device="simulated:h200"))
    assert (latency.weights, latency.layout.dtype, latency.overlap) == ("nvfp4", "fp8", True)
    assert (latency.graph_sequences, latency.scheduler.max_running) == (32, 32)
    assert "profile        latency" in latency.describe()


def test_what_is_given_counts_whatever_the_profile_says(checkpoint: str) -> None:
    found = resolve(
        EngineOptions(
            model="small4",
            profile="throughput",
            device="simulated:2xh200",
            weights="fp8",
            kv_dtype="bf16",
            overlap="off",
            budget_tokens=1000,
            max_running=77,
            graph_sequences=0,
        )
    )
    limits = found.scheduler
    assert (limits.budget_tokens, limits.max_chunk_tokens, limits.max_running) == (1000, 1000, 77)
    assert (found.weights, found.layout.dtype, found.overlap, found.graph_sequences) == (
        "fp8",
        "bfloat16",
        False,
        0,
    )
    plain = resolve(EngineOptions(model=checkpoint, profile="throughput", weights="bf16"))
    assert plain.weights == "bf16"


def test_no_profile_rounds_what_is_asked_for_in_float32(checkpoint: str) -> None:
    found = resolve(EngineOptions(model=checkpoint, profile="latency", dtype="float32"))
    assert (found.weights, found.layout.dtype) == ("float32", "float32")


def test_without_a_profile_everything_is_as_it_was(checkpoint: str) -> None:
    found = resolve(EngineOptions(model=checkpoint))
    limits = found.scheduler
    assert (limits.budget_tokens, limits.max_chunk_tokens, limits.max_running) == (1024, 512, 256)
    assert (found.weights, found.profile, found.card) == ("bf16", "balanced", None)


@pytest.mark.parametrize("device", ["gpu", "", "simulated", "simulated:", "cuda:0", "simulated:h999"])
def test_a_device_that_there_is_not_is_refused(checkpoint: str, device: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(EngineOptions(model=checkpoint, device=device))
    assert caught.value.field == "device"
