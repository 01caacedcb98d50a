"""Steps of a ready server launch nothing but what was compiled and recorded before."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cuda_on_cpu
import msgspec
import pytest
import torch
from gpu_engine import CPU, MODELS, gpu_kernels, load, make_config
from graph_repeater import Repeated

from cierzo.bench.gpu import served
from cierzo.cache.pool import KVPool
from cierzo.engine.config import EngineConfig
from cierzo.engine.messages import Abort, Submit
from cierzo.engine.model.build import build_model, parameter_specs
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.model.positions import Positions
from cierzo.engine.parameters import MatrixRequest, Shard
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.matrices import DeviceMatrices
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.engine.worker import launches, warm
from cierzo.engine.worker import runner as runner_module
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.experts import ExpertCounter
from cierzo.engine.worker.graphs import DecodeGraphs
from cierzo.engine.worker.runner import ModelRunner
from cierzo.engine.worker.step_rows import DeviceRows
from cierzo.kernels.cuda.launch import moe
from cierzo.kernels.cuda.launch.kernel import Kernel
from cierzo.kernels.cuda.launch.launcher import backend
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import DecoderWeights, StepRows
from cierzo.kernels.triton import flash, heuristics, split
from cierzo.kernels.triton.launch import Configuration, Launch, dry_run
from cierzo.kernels.triton.split import Splits
from cierzo.scheduler.params import SamplingParams

META = torch.device("meta")
MAX_RUNNING = 4


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with gpu_kernels(monkeypatch):
        yield


class Prepared:
    """Configurations that a runner compiled and loaded, and launches of others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled: list[str] = []
        self.loaded: list[str] = []
        self.kernels: list[str] = []
        self.strangers: set[str] = set()
        self.launched: set[str] = set()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(warm.widths, "settle", lambda *_: None)
        monkeypatch.setattr(warm.compiling, "missing", lambda configurations: configurations[1:])
        monkeypatch.setattr(warm.compiling, "compile_all", self._compile_all)
        monkeypatch.setattr(warm.compiling, "load", lambda one: self.loaded.append(one.key))
        monkeypatch.setattr(cuda_on_cpu.CpuBackend, "prepare", self._prepare)
        self._monkeypatch = monkeypatch

    def _compile_all(self, configurations: Sequence[Configuration], capability: int, done: Any) -> None:
        assert capability == 90
        for configuration in configurations:
            self.compiled.append(configuration.key)
            done()

    def _prepare(self, kernels: Sequence[Kernel], device: torch.device, folder: Path) -> None:
        self.kernels += [kernel.name for kernel in kernels]

    def watch(self) -> None:
        """From here on note launches: each asks for the compiler's options."""
        options = Configuration.options.fget  # type: ignore[attr-defined]
        key = Configuration.key.fget  # type: ignore[attr-defined]
        asking: list[bool] = []

        def noted(configuration: Configuration) -> Any:
            if not asking:
                asking.append(True)
                self.launched.add(key(configuration))
                asking.clear()
            return options(configuration)

        self._monkeypatch.setattr(Configuration, "options", property(noted))


def make_core(config: EngineConfig, model: Decoder) -> tuple[EngineCore, ModelRunner]:
    """An engine on the interpreter, as on a GPU."""
    pool = KVPool(config.layout, config.cache.num_blocks + 1, CPU)
    limits = config.scheduler
    graphs = DecodeGraphs(
        model,
        pool,
        max_running=limits.max_running - 1,  # some decode steps are beyond the graphs
        max_model_len=limits.max_model_len,
        cached_tokens=config.cache.num_blocks * config.cache.block_tokens,
        device=CPU,
        record=Repeated,
    )
    experts = None if config.model.moe is None else ExpertCounter.of(config.model)
    runner = ModelRunner(
        model, pool, limits.max_running, staged=DeviceRows(CPU), graphs=graphs, overlap=True, experts=experts
    )
    return EngineCore(msgspec.structs.replace(config, overlap=True), runner), runner


def weights_before_they_are_loaded(config: EngineConfig) -> DecoderWeights:
    """As a server knows them when it begins to compile."""
    with CheckpointReader(Path(config.checkpoint)) as reader:
        specs = parameter_specs(config.model)
        parameters = load_parameters(reader, specs, dtype=torch.bfloat16, device="cpu")
        return launches.weights_on_meta(config, parameters)


def serve(core: EngineCore, seed: int, count: int) -> None:
    """A random load: prompts that begin alike, and any parameters; some are aborted."""
    chosen = random.Random(seed)
    beginning = [chosen.randrange(1, 99) for _ in range(32)]
    waiting = []
    for number in range(count):
        prompt = beginning[: chosen.choice((0, 16, 32))] + [
            chosen.randrange(1, 99) for _ in range(chosen.choice((1, 2, 9)))
        ]
        edits: dict[str, Any] = {"repetition_penalty": 1.2, "logit_bias": {5: 2.0}, "min_tokens": 2}
        params = SamplingParams(
            max_tokens=chosen.randrange(1, 6),
            temperature=chosen.choice((0.0, 0.8)),
            logprobs=chosen.choice((None, 2)),
            prompt_logprobs=(None, 3, 0)[number % 3],
            seed=number,
            **(edits if number % 3 == 0 else {}),
        )
        waiting.append(Submit(request_id=number, prompt_token_ids=prompt, sampling=params))
    while waiting or core.has_work():
        for _ in range(chosen.choice((0, 1, 4))):
            if waiting:
                core.submit(waiting.pop())
        if chosen.random() < 0.05:
            core.abort(Abort(request_id=chosen.randrange(count), reason="cancelled"))
        for delta in core.step():
            assert delta.finish is None or delta.finish.reason in ("length", "stop", "cancelled"), delta.finish


def test_kernels_compile_while_the_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix is made before compilation has begun; the runner is there when it has ended."""
    config = make_config(tmp_path, "small4", "hf-fp8")
    config = msgspec.structs.replace(config, device="cuda", weights="fp8", activations="fp8", dtype="bfloat16")
    prepared, begun = Prepared(monkeypatch), threading.Event()
    compile_all = warm.compiling.compile_all

    def begin(*arguments: Any) -> None:
        begun.set()
        compile_all(*arguments)

    class Loading(DeviceMatrices):
        def matrix(self, request: MatrixRequest) -> Matrix:
            assert begun.wait(60)
            return super().matrix(request)

    on_cpu = {"device": CPU, "dtype": torch.bfloat16}
    monkeypatch.setattr(warm.compiling, "compile_all", begin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(multi_processor_count=heuristics.MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(runner_module, "DeviceMatrices", lambda *named: Loading(named[0], named[1], CPU, named[3]))
    monkeypatch.setattr(runner_module, "build_model", lambda *given, **named: build_model(*given, **named | on_cpu))
    monkeypatch.setattr(runner_module, "make_pool", lambda config: KVPool(config.layout, 2, CPU))
    monkeypatch.setattr(ModelRunner, "of", lambda config, *made: ModelRunner(*made[:2], 4, description=made[2]))
    *table, loaded, compiled = runner_module.load_runner(config).describe().splitlines()
    assert table[0] == "kernels on cuda"
    assert loaded.startswith("weights loaded in ")
    number = len(prepared.loaded) + len(prepared.kernels)
    assert compiled.startswith(f"{number} kernels compiled in ")
    assert prepared.compiled == prepared.loaded[1:]  # the first is in the cache
    assert len(prepared.loaded) > 20


def set_thresholds(monkeypatch: pytest.MonkeyPatch, *, apart: int, described: int, workspace: int) -> None:
    """Numbers of tokens at which kernels choose another form."""
    monkeypatch.setattr(heuristics, "APART_TOKENS", apart)
    monkeypatch.setattr(heuristics, "DESCRIBED_TOKENS", described)
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", workspace)


@pytest.mark.parametrize(("like", "checkpoint_format", "weights", "activations"), [MODELS[0], MODELS[4]])
def test_a_random_load_launches_what_was_prepared_and_records_nothing(
    like: str,
    checkpoint_format: str,
    weights: str,
    activations: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With thresholds so low that the load is on both sides of each."""
    set_thresholds(monkeypatch, apart=5, described=7, workspace=64)
    monkeypatch.setattr(moe, "MOST_ALONE", 9)
    monkeypatch.setattr(split, "SPLITS", Splits(32, 4, 64))
    monkeypatch.setattr(split, "WALKED", Splits(64, 2, 128, walked=(2, 2)))
    config = make_config(
        tmp_path, like, checkpoint_format, prefix_caching=True, max_running=MAX_RUNNING, kv_cache_gib=0.0002
    )
    model = load(config, weights, activations)
    prepared = Prepared(monkeypatch)
    core, runner = make_core(config, model)
    Repeated.recordings = Repeated.replays = 0
    on_gpu = msgspec.structs.replace(
        config, device="cuda", weights=weights, activations=activations, dtype="bfloat16"
    )
    runner.prepare(on_gpu, warm.Compilation(on_gpu, partial(weights_before_they_are_loaded, on_gpu)))
    assert prepared.compiled == prepared.loaded[1:]  # the first is in the cache
    assert Repeated.recordings == MAX_RUNNING - 1
    assert "kernels compiled in" in runner.describe()
    assert "3 steps recorded in" in runner.describe()
    Repeated.replays = 0
    before = len(backend().launches)  # type: ignore[attr-defined]
    prepared.watch()
    serve(core, seed=3, count=5)
    assert Repeated.recordings == MAX_RUNNING - 1
    assert Repeated.replays > 3
    assert prepared.launched - set(prepared.loaded) == set()
    assert len(prepared.launched) > 10
    launched = set(backend().launches[before:])  # type: ignore[attr-defined]
    assert launched - set(prepared.kernels) == set()
    assert "sample_apply_penalties" in launched


@pytest.mark.parametrize(
    ("name", "weights", "thresholds"),
    [("small4", "nvfp4", (9, 61, 16_384)), ("small3", "fp8", (53, 50, 256))],
)
def test_numbers_that_tell_find_what_all_numbers_find(
    name: str, weights: str, thresholds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    apart, described, workspace = thresholds
    set_thresholds(monkeypatch, apart=apart, described=described, workspace=workspace)
    config = full(monkeypatch, name, weights, layers=2, max_model_len=400)
    model = served.make_model(config, META)
    found = {one.key for one in launches.launches(config, model.weights).configurations}
    monkeypatch.setattr(launches, "telling", lambda most: range(1, most + 1))
    assert {one.key for one in launches.launches(config, model.weights).configurations} == found


@pytest.mark.parametrize(
    ("name", "weights", "max_model_len", "max_running"),
    [("small4", "nvfp4", 16_384, 3), ("small4", "nvfp4", 600, 40), ("small3", "fp8", 600, 40)],
)
def test_long_contexts_find_what_the_longest_find(
    name: str, weights: str, max_model_len: int, max_running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one sequence fills more than the workspace, and where it takes many."""
    limits = {"max_model_len": max_model_len, "max_running": max_running}
    config = full(monkeypatch, name, weights, layers=2, **limits)
    model = served.make_model(config, META)
    found = {one.key for one in launches.launches(config, model.weights).configurations}
    assert {key for key in found if "'CARRIED', True" in key}
    monkeypatch.setattr(
        launches, "long_contexts", lambda lengths, most, before: [most if before else one for one in lengths]
    )
    assert {one.key for one in launches.launches(config, model.weights).configurations} == found


def test_long_contexts_have_enough_tokens_between_them() -> None:
    assert launches.long_contexts([3, 4], 100, 0) == [3, 4]
    assert launches.long_contexts([3, 4], 100, 50) == [53, 4]
    assert launches.long_contexts([3, 4, 5], 100, 120) == [100, 27, 5]
    assert launches.long_contexts([3, 4], 100, 1000) == [100, 100]


@pytest.mark.parametrize(("name", "weights"), [("small4", "nvfp4"), ("small3", "fp8")])
def test_steps_drawn_at_random_launch_what_is_in_the_list(
    name: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any segments, contexts and logits, with thresholds that they lie on both sides of."""
    set_thresholds(monkeypatch, apart=11, described=21, workspace=512)
    config = full(monkeypatch, name, weights, layers=2, max_model_len=9000, max_running=7)
    weights_read = served.make_model(config, META).weights
    found = launches.launches(config, weights_read)
    keys, kernels = {one.key for one in found.configurations}, {one.name for one in found.kernels}
    chosen = random.Random(2)
    model = Decoder(launches._on_meta(weights_read), Positions(config.model, META), Shard(0, 1, lambda part: part))
    pool, tables = KVPool(config.layout, 1, META), torch.empty(7, 1000, dtype=torch.int32, device=META)
    launched: list[Launch] = []
    with torch.inference_mode():
        for _ in range(150):
            segments: tuple[list[int], list[int]] = ([], [])
            left = chosen.choice((1, 7, 64))
            for _ in range(chosen.randrange(1, 8)):
                length = min(left, chosen.choice((1, 1, 2, 5, 20, 63)))
                if length:
                    segments[chosen.randrange(2)].append(length)
                left -= length
            queries = [
                PagedQueries.of(
                    lengths,
                    [min(9000, one + chosen.choice((0, 0, 1, 63, 400, 600, 8191, 8192))) for one in lengths],
                    [chosen.randrange(7) for _ in lengths],
                    tables,
                )
                for lengths in segments
            ]
            total, of = sum(map(sum, segments)), sum(map(len, segments))
            numbers = (torch.empty(total, dtype=torch.int64, device=META) for _ in range(3))
            rows = StepRows(*numbers, sum(segments[0]), *queries)
            logit_rows = torch.empty(chosen.randrange(of + 1), dtype=torch.int64, device=META)
            asked = None if total == of and chosen.randrange(2) else logit_rows
            launched += dry_run(model.logits, rows, pool, asked)
            if segments[0]:
                scored = torch.empty(chosen.randrange(1, 129), dtype=torch.int64, device=META)
                launched += dry_run(score, model, rows, pool, scored)
    of_triton = {one.kernel.key for one in launched if isinstance(one.kernel, Configuration)}
    assert of_triton - keys == set()
    assert {one.kernel.name for one in launched if isinstance(one.kernel, Kernel)} - kernels == set()
    assert len(of_triton) > 0.9 * len(keys)


def score(model: Decoder, rows: StepRows, pool: KVPool, scored: torch.Tensor) -> None:
    model.head(rows, pool)(scored)


def test_every_form_of_a_step_is_in_the_list_of_the_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a kernel, or a constant of one, of its own; all layers but the first launch the same."""
    options: dict[str, Any] = {"activations": "fp8", "max_model_len": 16_384, "budget_tokens": 4096}
    config = full(monkeypatch, "small4", "fp8", layers=4, **options)
    found = launches.launches(config, served.make_model(config, META).weights)
    values: dict[tuple[str, str], set[Any]] = {}
    for one in found.configurations:
        for constant, value in one.constants.items():
            values.setdefault((one.name, constant), set()).add(value)
    assert values["flash", "CARRIED"] == {False, True}  # a prompt in one round, and in several
    assert values["mla_attend", "TOGETHER"] == values["values", "TOGETHER"] == {2}  # also of one sequence
    assert values["mla_attend", "SHORT"] == values["values", "SHORT"] == {256, 2048}  # few sequences, and many
    assert values["linear", "APART"] == {False, True}
    assert values["apply_rope", "SCALED"] == {False, True}  # contexts beyond the original positions
    assert {"route_choose", "count_by_expert", "group_by_expert", "sample_draw_choose"} < {
        one.name for one in found.kernels
    }
    assert len(found.configurations) == len({one.key for one in found.configurations}) < 80
    two = full(monkeypatch, "small4", "fp8", layers=2, **options)
    of_two = launches.launches(two, served.make_model(two, META).weights)
    assert {one.key for one in of_two.configurations} == {one.key for one in found.configurations}


def test_a_dense_layer_below_the_experts_is_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    config = full(monkeypatch, "small4", "fp8", layers=3)
    assert config.model.moe is not None
    moe_config = msgspec.structs.replace(config.model.moe, first_dense_layers=1)
    config = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, moe=moe_config))
    found = launches.launches(config, served.make_model(config, META).weights).configurations
    paired = [one for one in found if one.name == "linear" and one.constants["PAIRED"]]
    assert {one.constants["ROWS"] for one in paired} == {2 * config.model.mlp_width}
    assert "expert_gate_up" in {one.name for one in found}


def full(monkeypatch: pytest.MonkeyPatch, name: str, weights: str, **options: Any) -> EngineConfig:
    """A published model on an H200."""
    monkeypatch.setattr("cierzo.engine.device_memory.free_bytes", lambda: 139 << 30)
    limits = {"budget_tokens": 64, "max_running": 40, "kv_dtype": "fp8"}
    return served.make_config(name, weights, **{**limits, **options})


@pytest.mark.parametrize(
    ("like", "checkpoint_format", "weights", "activations"),
    [*MODELS, ("small4", "native-nvfp4", "nvfp4", "bf16"), ("small4", "native-fp8", "fp8", "fp8")],
)
def test_parameters_tell_what_weights_do(
    like: str, checkpoint_format: str, weights: str, activations: str, tmp_path: Path
) -> None:
    """Codes that are kept, codes that are made anew, static scales and none."""
    config = make_config(tmp_path, like, checkpoint_format)
    config = msgspec.structs.replace(config, weights=weights, activations=activations, dtype="bfloat16")
    of_weights, of_parameters = (
        {one.key for one in launches.launches(config, found).configurations}
        for found in (load(config, weights, activations).weights, weights_before_they_are_loaded(config))
    )
    assert of_parameters == of_weights


def test_numbers_tell_both_sides_of_each_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    set_thresholds(monkeypatch, apart=41, described=60, workspace=64)
    assert launches.telling(1) == [1]
    assert launches.telling(7) == [1, 2, 3, 4, 5, 7]
    assert launches.telling(59) == [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 41, 42, 59]
    assert launches.telling(64)[-4:] == [42, 59, 60, 64]


def test_operations_of_plain_torch_are_not_asked_what_they_launch(tmp_path: Path) -> None:
    config = make_config(tmp_path, "small4", "hf")
    kernels = msgspec.structs.replace(config.kernels, implementations={"mla_decode": "torch"})
    on_gpu = msgspec.structs.replace(config, kernels=kernels, device="cuda")
    assert "as they are launched" in warm.Compilation(on_gpu, cast(Any, None)).finish()


def test_a_cpu_server_compiles_nothing_and_imports_no_triton(tmp_path: Path) -> None:
    config = make_config(tmp_path, "small4", "hf")
    program = """
import sys, msgspec
from cierzo.engine.config import EngineConfig
from cierzo.engine.worker.core import EngineCore
EngineCore(msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig))
assert "torch" in sys.modules
assert not {"triton", "cierzo.engine.worker.warm", "cierzo.engine.worker.launches"} & set(sys.modules)
"""
    encoded = msgspec.json.encode(config)
    subprocess.run([sys.executable, "-c", program], input=encoded, check=True)
