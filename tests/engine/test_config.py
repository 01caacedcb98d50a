"""Options become a whole configuration, or a ConfigError with field, limit and value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cierzo.cache.layout import GIB
from cierzo.engine import config, environment, host
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
COUNT = "an integer from 1 to 1048576"
NUMBER = "a finite number above 0"
REFUSED: list[tuple[str, Any, str]] = [
    *(("threads", value, "an integer from 1 to 1024") for value in (0, -1, 1025, 100_000, 2**70, "4", True, 4.0)),
    *(("max_model_len", value, "an integer of at least 1") for value in (0, "4096", 1e3)),
    ("max_model_len", 2**70, f"an integer of at most {2**63 - 1}"),
    ("max_model_len", 131_073, "at most 131072"),
    *(("kv_cache_gib", value, NUMBER) for value in (0.0, -1.0, -1, NAN, INF, "1", True, [1])),
    ("kv_cache_gib", 1e-7, "at least 0.0000916"),
    *(("block_tokens", value, COUNT) for value in (0, -4, 2**70, "auto")),
    *(("budget_tokens", value, COUNT) for value in (0, 2**31, 1.5)),
    *(("max_chunk_tokens", value, COUNT) for value in (0, "all")),
    *(("max_step_ms", value, "a finite number from 0 to 1000000000.0") for value in (-1.0, 1e10, float("nan"))),
    *(("max_running", value, COUNT) for value in (0, False)),
    ("max_running", 1025, "at most 1024"),
    ("graph_sequences", -1, "an integer from 0 to 1048576"),
    *(("max_waiting", value, COUNT) for value in (0, 2**21)),
    *(("priority_aging_s", value, NUMBER) for value in (0.0, NAN)),
    *(("image_cache_tokens", value, COUNT) for value in (0, -1)),
    *(("softmax_scale", value, NUMBER) for value in (0.0, INF)),
    *(("dtype", value, "one of auto, bfloat16, float32") for value in ("float16", "", 16, None)),
    ("weights", "fp16", "one of auto, bf16, fp8, int8, int4, nvfp4"),
    ("weights", "fp8", "one of auto, bf16, int8, int4, nvfp4"),
    ("activations", "fp8", "auto or bf16"),
    ("profile", "fast", "one of balanced, throughput, latency"),
    ("device", "gpu", "auto, cpu, cuda or simulated:NAME"),
    ("device", 0, "text in UTF-8"),
    *(("pin_threads", value, "True or False") for value in (1, "yes", None)),
    ("frontend", 3, "a FrontendConfig, or a mapping with its fields"),
    ("kernels", "avx2", "a KernelsConfig, or a mapping with its fields"),
    ("expert_statistics", True, "False"),
]


@pytest.mark.parametrize(("field", "value", "limit"), REFUSED)
def test_a_wrong_setting_is_refused_with_field_limit_and_value(
    checkpoint: str, field: str, value: Any, limit: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(EngineOptions(model=checkpoint, **{field: value}))
    error = caught.value
    assert (error.field, error.limit) == (field, limit)
    assert error.value == (None if value is None else str(value))
    assert error.message.startswith(f"{field} must be {limit}")
    assert error.message.endswith(f", got {value!r}")


def test_a_length_beyond_the_model_names_the_models(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"at most 131072 \(the model's max_position_embeddings\), got 131073"):
        resolve(EngineOptions(model=checkpoint, max_model_len=131_073))


WRONG_LIMITS: list[tuple[str, Any, str]] = [
    ("max_connections", 0, "an integer of at least 1"),
    ("max_connections", "8", "an integer of at least 1"),
    ("max_logprobs", -1, "an integer of at least 0"),
    ("max_frame_bytes", 2**70, f"an integer of at most {2**63 - 1}"),
    ("handshake_timeout_s", NAN, NUMBER),
    ("max_deadline_s", True, NUMBER),
]


@pytest.mark.parametrize(("field", "value", "limit"), WRONG_LIMITS)
@pytest.mark.parametrize("kind", [FrontendConfig, dict])
def test_limits_of_the_front_end_have_bounds_too(
    checkpoint: str, kind: Any, field: str, value: Any, limit: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(EngineOptions(model=checkpoint, frontend=kind(**{field: value})))
    assert (caught.value.field, caught.value.limit, caught.value.value) == (f"frontend.{field}", limit, str(value))


def test_a_section_may_be_a_mapping_with_its_fields(checkpoint: str) -> None:
    sections: Any = {"frontend": {"max_connections": 3}, "kernels": {"instruction_set": "reference"}}
    found = resolve(EngineOptions(model=checkpoint, **sections))
    assert found.frontend == msgspec.structs.replace(FrontendConfig(max_connections=3))
    assert found.kernels == KernelsConfig(instruction_set="reference")
    with pytest.raises(ConfigError, match=r"no setting frontend\.max_conections: it must be one of max_connec"):
        resolve(EngineOptions(model=checkpoint, frontend={"max_conections": 3}))  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(checkpoint: str) -> None:
    numbers: Any = {"threads": np.int64(2), "kv_cache_gib": np.float32(0.5), "priority_aging_s": 7}
    found = resolve(EngineOptions(model=checkpoint, **numbers))
    assert (found.threads, type(found.threads), found.scheduler.priority_aging_s) == (2, int, 7.0)
    assert found.cache.num_blocks == (GIB // 2) // (32 * 3072)


def test_no_more_may_run_than_a_step_has_tokens(checkpoint: str) -> None:
    """A number that is given is refused; a profile's own is cut."""
    assert resolve(EngineOptions(model=checkpoint, budget_tokens=100)).scheduler.max_running == 100
    assert resolve(EngineOptions(model=checkpoint, budget_tokens=9, max_running=9)).scheduler.max_running == 9
    with pytest.raises(ConfigError, match=r"max_running must be at most 9 \(budget_tokens.*\), got 10") as caught:
        resolve(EngineOptions(model=checkpoint, budget_tokens=9, max_running=10))
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("max_running", "at most 9", "10")


def test_a_cache_of_one_byte_is_in_the_format_that_the_device_has_kernels_for(checkpoint: str) -> None:
    for device, right, wrong in (("cpu", "int8", "fp8"), ("cuda", "fp8", "int8")):
        options: dict[str, Any] = {"model": checkpoint, "device": device, "instruction_set": "auto"}
        if environment.default_instruction_set() != "reference" or device == "cuda":
            with pytest.raises(ConfigError, match=rf"\({wrong} has no kernels on a [CG]PU\)") as caught:
                resolve(EngineOptions(**options, kv_dtype=wrong))
            found = (caught.value.field, caught.value.limit, caught.value.value)
            assert found == ("kv_dtype", f"one of auto, bf16, {right}", wrong)
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
    assert "weights fp8, activations fp8, head bf16, KV cache bfloat16" in whole.describe()
    refused: tuple[tuple[dict[str, Any], str, str], ...] = (
        ({"activations": "fp8"}, "auto or bf16", "device cuda, not cpu"),
        ({"activations": "fp8", "device": "cpu", "weights": "int8"}, "auto or bf16", "device cuda, not cpu"),
        ({"activations": "fp8", "device": "cuda"}, "auto or bf16", "weights fp8, not bf16"),
        ({"activations": "fp8", "device": "cuda", "weights": "nvfp4"}, "auto or bf16", "weights fp8, not nv"),
        ({"activations": "bf16", "dtype": "float32"}, "auto", "dtype bfloat16, not float32"),
    )
    for options, limit, needed in refused:
        value = options["activations"]
        told = rf"activations must be {limit} \({value} needs {needed}.*\), got '{value}'"
        with pytest.raises(ConfigError, match=told) as caught:
            resolved(**options)
        assert (caught.value.field, caught.value.limit, caught.value.value) == ("activations", limit, value)


def test_a_head_in_fp8_needs_a_gpu(checkpoint: str) -> None:
    def head(**options: Any) -> str:
        return resolve(EngineOptions(model=checkpoint, **options)).head

    assert [head(), head(weights="int4"), head(dtype="float32")] == ["bf16", "int8", "float32"]
    assert [head(device="cuda", weights=one) for one in ("auto", "fp8", "nvfp4")] == ["bf16"] * 3
    assert [head(device="cuda", weights=one, head="fp8") for one in ("auto", "fp8", "nvfp4")] == ["fp8"] * 3
    told = r"head must be auto \(fp8 has no kernels on a CPU\), got 'fp8'"
    with pytest.raises(ConfigError, match=told) as caught:
        head(head="fp8")
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("head", "auto", "fp8")


def test_a_length_that_does_not_fit_is_refused_with_the_numbers(checkpoint: str) -> None:
    kv_cache_gib = 10 * 32 * 3072 / GIB
    assert resolve(EngineOptions(model=checkpoint, kv_cache_gib=kv_cache_gib)).scheduler.max_model_len == 320
    told = r"at most 320 \(what a KV cache of 0.000915 GiB holds; 321 tokens need 0.00101\), got 321"
    with pytest.raises(ConfigError, match=told) as caught:
        resolve(EngineOptions(model=checkpoint, kv_cache_gib=kv_cache_gib, max_model_len=321))
    assert (caught.value.limit, caught.value.value) == ("at most 320", "321")


def test_a_core_counts_as_stalled_before_it_is_killed(checkpoint: str) -> None:
    for stall_s, is_right in ((1.9, True), (2.0, False), (3.0, False)):
        options = EngineOptions(model=checkpoint, frontend=FrontendConfig(core_stall_s=stall_s, core_hang_s=2.0))
        if is_right:
            assert resolve(options).frontend.core_stall_s == stall_s
            continue
        with pytest.raises(ConfigError, match="core_stall_s must be less than 2 ") as caught:
            resolve(options)
        assert (caught.value.field, caught.value.value) == ("core_stall_s", str(stall_s))


def test_a_budget_beyond_the_free_memory_is_refused(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "available_memory_bytes", lambda: GIB)
    assert resolve(EngineOptions(model=checkpoint, kv_cache_gib=0.9)).cache.num_blocks == int(0.9 * GIB) // (
        32 * 3072
    )
    with pytest.raises(ConfigError, match=r"must be at most 1.00 \(GiB of memory that are free\), got 1\.1"):
        resolve(EngineOptions(model=checkpoint, kv_cache_gib=1.1))
    resolve(EngineOptions(model=checkpoint, kv_cache_gib=1.1, device="cuda"))  # its memory is another one
    monkeypatch.setattr(config, "available_memory_bytes", lambda: 40_000_000)
    with pytest.raises(ConfigError, match=r"at most 0\.0372 .*, got 0\.0373"):
        resolve(EngineOptions(model=checkpoint, kv_cache_gib=0.0373))
    monkeypatch.setattr(config, "available_memory_bytes", lambda: 4 * 98_303)
    with pytest.raises(ConfigError, match=r"at least 0\.0000916 .* not given, it is what the free memory allows"):
        resolve(EngineOptions(model=checkpoint))


def test_the_front_end_admits_what_the_queue_takes(checkpoint: str) -> None:
    assert resolve(EngineOptions(model=checkpoint, max_waiting=7)).frontend.max_open_samples == 7


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIERZO_CACHEDIR", "/x")
    with pytest.raises(ConfigError, match="CIERZO_CACHEDIR") as caught:
        environment.check_environment()
    assert caught.value.limit == "CIERZO_CACHE_DIR, CIERZO_INSTRUCTION_SET, CIERZO_NATIVE"
    assert (caught.value.field, caught.value.value) == ("CIERZO_CACHEDIR", "/x")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CIERZO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_dir() == tmp_path / "cierzo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification has ignored
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.cache_dir() == tmp_path / ".cache" / "cierzo"
    monkeypatch.setenv("CIERZO_CACHE_DIR", "/some/where")
    assert environment.cache_dir() == Path("/some/where")
    for wrong in ("relative", "", "~/cache"):
        monkeypatch.setenv("CIERZO_CACHE_DIR", wrong)
        with pytest.raises(ConfigError, match="CIERZO_CACHE_DIR must be an absolute path, got") as caught:
            environment.check_environment()  # by every command
        assert (caught.value.field, caught.value.value) == ("CIERZO_CACHE_DIR", wrong)


def test_a_user_without_a_home_folder_has_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIERZO_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ConfigError, match=r"CIERZO_CACHE_DIR must be set \(this user has no home folder\)"):
        environment.cache_dir()
    environment.check_environment()  # most commands keep nothing there


def _escaped(text: str | None) -> str:
    return str(text).encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize("name", ["", "{}/none", "{}/file", "none", "\0", "x" * 5000, "{}/loop", "{}/caf\udce9"])
def test_a_checkpoint_that_is_no_folder_is_refused_in_the_same_words(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "caf\udce9").mkdir()  # a name of bytes that are no text
    name = name.format(tmp_path)
    with pytest.raises(ConfigError, match="checkpoint must be ") as caught:
        resolve(EngineOptions(model=name))
    assert caught.value.field == "checkpoint"
    assert _escaped(caught.value.value) == _escaped(name[:200])
    kind = "a folder whose path is text in UTF-8" if "caf" in name else "the folder of a checkpoint"
    assert caught.value.limit == kind


def test_no_request_may_ask_for_more_samples_than_can_wait(checkpoint: str) -> None:
    front_end = resolve(EngineOptions(model=checkpoint, max_waiting=3)).frontend
    assert (front_end.max_samples, front_end.max_open_samples) == (3, 3)


def test_threads_spin_briefly_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    environment.spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "5000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    environment.spin_briefly()
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
    assert (found.scheduler.max_step_s, latency.scheduler.max_step_s) == (0.0, 0.15)
    told = "prompt chunks are shortened so that a step should take at most 150 ms (--max-step-ms); predicted"
    assert f"step time      {told}" in latency.describe()
    assert "step time      no target" in found.describe()


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
            max_step_ms=0,
        )
    )
    limits = found.scheduler
    assert limits.max_step_s == 0.0
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
    assert limits.max_step_s == 5.5
    assert (found.weights, found.profile, found.card) == ("bf16", "balanced", None)


@pytest.mark.parametrize("device", ["gpu", "", "simulated", "simulated:", "cuda:0", "simulated:h999"])
def test_a_device_that_there_is_not_is_refused(checkpoint: str, device: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(EngineOptions(model=checkpoint, device=device))
    assert caught.value.field == "device"


def test_a_model_by_its_name_alone_runs_on_simulated_gpus() -> None:
    options = EngineOptions(model="small4", device="cpu")
    with pytest.raises(ConfigError, match="a model by its name alone runs on simulated GPUs"):
        resolve(options)
    assert resolve(msgspec.structs.replace(options, device="simulated:h200", weights="fp8")).model.num_layers == 36
