"""CUDA errors as they come from torch, Triton and CuPy: told by the names of kernels, and from others apart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from cierzo.cache.pool import KVPool
from cierzo.engine.worker.batch import BatchBuilder
from cierzo.engine.worker.graphs import DecodeGraphs
from cierzo.engine.worker.runner import ModelRunner
from cierzo.kernels import fault
from cierzo.kernels.cuda.launch.kernel import Kernel
from cierzo.kernels.cuda.launch.launcher import launch as launch_cuda
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.fault import DeviceFault, launched, note, watching
from cierzo.kernels.triton.launch import Configuration
from cierzo.kernels.triton.launch import launch as launch_triton
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import Admission, SeqPlan, StepPlan

ILLEGAL = "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in ..."
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which .."
)
CUDA_ERRORS = [
    torch.AcceleratorError(ILLEGAL),
    torch.AcceleratorError("in words of some later torch"),
    RuntimeError(ILLEGAL),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(..)`"),
    RuntimeError("CUDA driver error: invalid argument"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"),
    RuntimeError("cudaErrorLaunchFailure: unspecified launch failure"),
]
FULL = [
    torch.OutOfMemoryError(OUT_OF_MEMORY),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    RuntimeError("cudaErrorMemoryAllocation: out of memory"),
]
OTHERS = [RuntimeError("shape mismatch"), ValueError("CUDA error: so to speak"), KeyError("x"), KeyboardInterrupt()]


@pytest.fixture(autouse=True)
def _nothing_launched() -> Iterator[None]:
    fault._noted.clear()
    yield
    fault._noted.clear()


@pytest.mark.parametrize("error", CUDA_ERRORS, ids=lambda error: str(error)[:24])
def test_a_cuda_error_names_what_was_launched(error: Exception) -> None:
    for name in ("_rms_norm", "_linear", "_linear", "route_choose"):
        note(name)
    with pytest.raises(DeviceFault) as caught, watching("step 7"):
        raise error
    first = str(error).split("\n")[0]
    told = "one of the last 4 launches: route_choose (1), linear (2), rms_norm (1)"
    assert str(caught.value) == f"step 7: {first}; {told}"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, watching("step 7"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:24])
def test_a_full_device_is_told_as_a_full_host_is(error: Exception) -> None:
    with pytest.raises(MemoryError, match="step 7: ") as caught, watching("step 7"):
        raise error
    assert str(caught.value) == f"step 7: {error}"
    assert not isinstance(caught.value, DeviceFault)


def test_a_fault_is_told_once() -> None:
    with pytest.raises(DeviceFault) as caught, watching("step 7"), watching("results of step 6"):
        raise torch.AcceleratorError(ILLEGAL)
    assert str(caught.value).startswith("results of step 6: CUDA error")
    assert str(caught.value).endswith("one of the last 0 launches: none of ours")


def test_only_so_many_launches_are_kept() -> None:
    for number in range(5000):
        note(f"kernel{number % 2}" if number < 4999 else "last")
    assert launched() == f"one of the last {fault.MOST_NOTED} launches: last (1), kernel0 (1024), kernel1 (1023)"


def test_it_imports_no_torch() -> None:
    code = "import sys, cierzo.kernels.fault; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- launches ----------------------------------------------------------------------------------------------


class Refusing:
    """A Triton kernel whose launch raises."""

    __name__ = "_scale"

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.fn = launch_refused  # the function of it; no chained one

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> None:
            raise self._error

        return launch


def launch_refused(error: Exception) -> None:
    types = {"x_ptr": "*bf16", "count": "i32"}
    launch_triton(
        Configuration(Refusing(error), types, {}), (3,), x_ptr=torch.zeros(2, 8, dtype=torch.bfloat16), count=7
    )


def test_a_triton_launch_names_its_kernel_and_arguments_and_those_before() -> None:
    note("_rms_norm")
    message = (
        r"scale\(x_ptr=torch.bfloat16 \[2, 8\] at 0x\w+, count=7\), grid \(3,\): Triton Error \[CUDA\]: misaligned "
        r"address; this launch, or one of the last 2 launches: scale \(1\), rms_norm \(1\)$"
    )
    with pytest.raises(DeviceFault, match=message):
        launch_refused(RuntimeError("Triton Error [CUDA]: misaligned address"))
    with pytest.raises(RuntimeError, match=r"^out of resource") as caught:
        launch_refused(RuntimeError("out of resource: shared memory"))
    assert not isinstance(caught.value, DeviceFault)


def test_a_tensor_descriptor_is_told_as_its_tensor() -> None:
    configuration = Configuration(
        Refusing(RuntimeError("Triton Error [CUDA]: misaligned address")),
        {"x_ptr": "*bf16"},
        {},
        blocks={"x_ptr": (2, 8)},
    )
    with pytest.raises(DeviceFault, match=r"^scale\(x_ptr=torch.bfloat16 \[4, 8\] at 0x\w+\), grid \(1,\)"):
        launch_triton(configuration, (1,), x_ptr=torch.zeros(4, 8, dtype=torch.bfloat16))


def test_a_cuda_launch_names_its_kernel_and_arguments() -> None:
    class Failing:
        device_type = "cpu"

        def run(self, *arguments: Any) -> None:
            raise DeviceFault("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    kernel = Kernel("route.cu", "route_choose", {"logits": "*f32", "rows": "i32"})
    message = (
        r"route.cu: route_choose\(logits=torch.float32 \[4\] at 0x\w+, rows=4\), grid \(2, 1, 1\), 32 threads, 0 "
        r"bytes shared: CUDA_ERROR_ILLEGAL_ADDRESS: .* this launch, or one of the last 1 launches: route_choose"
    )
    with running_on(Failing()), pytest.raises(DeviceFault, match=message):
        launch_cuda(kernel, grid=(2,), threads=32, logits=torch.zeros(4), rows=4)


# --- the runner --------------------------------------------------------------------------------------------


def one_step(logits: Any, record: Any = None) -> None:
    """A decode step of one sequence whose forward pass is `logits`, launched and collected."""

    class Model:
        def logits(self, *inputs: Any) -> torch.Tensor:
            return logits()

    model, nothing = Model(), cast(KVPool, None)
    graphs = record and DecodeGraphs(
        model, nothing, max_running=1, max_model_len=8, cached_tokens=0, device=torch.device("cpu"), record=record
    )
    if graphs:
        graphs.record_all(torch.zeros(1, 4, dtype=torch.int32), None)
    runner = ModelRunner(model, nothing, 1, graphs=graphs)
    admission = Admission(SamplingParams(temperature=0.0), (1,), (5,), ())
    seq = SeqPlan((1, 0), 0, 0, 1, [5], 1, [3], True, admission)
    plan = StepPlan(12, [seq], 1)
    runner.launch(plan, BatchBuilder(4, 1, 4, 4).build(plan))
    runner.collect()


def raising(error: Exception) -> Any:
    def raises() -> None:
        raise error

    return raises


def test_whatever_meets_the_device_within_a_step_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in CUDA_ERRORS:
        with pytest.raises(DeviceFault, match=r"^step 12: "):
            one_step(raising(error))
    with pytest.raises(MemoryError, match=r"^step 12: CUDA out of memory"):
        one_step(raising(torch.OutOfMemoryError(OUT_OF_MEMORY)))
    monkeypatch.setattr("cierzo.engine.worker.sampling.ops.peaks", lambda logits: raising(CUDA_ERRORS[0])())
    with pytest.raises(DeviceFault, match=r"^results of step 12: CUDA error: an illegal memory access"):
        one_step(lambda: torch.zeros(1, 9))


def test_a_replay_is_told_by_the_kernels_that_were_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Replayed:
        def replay(self) -> None:
            raise torch.AcceleratorError(ILLEGAL)

    def forward() -> torch.Tensor:
        for name in ("_rms_norm", "_mla_decode", "_rms_norm"):
            note(name)
        return torch.zeros(1, 9)

    def record(work: Any) -> Replayed:
        work()
        work()
        fault._noted.clear()  # long ago
        return Replayed()

    def record_now(work: Any) -> Replayed:
        work()
        return Replayed()

    note("_sample_peaks")
    message = r"launches: recorded step of 1 sequences, 8192 tokens \[rms_norm, mla_decode\] \(1\), rms_norm \(2\)"
    with pytest.raises(DeviceFault, match=message):
        one_step(forward, record_now)
    with pytest.raises(DeviceFault, match=r"one of the last 1 launches: recorded step of .* \[\] \(1\)"):
        one_step(forward, record)
