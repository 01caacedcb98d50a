"""Choice of implementations, and the argument checks."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from cierzo.kernels import check, registry
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.registry import Implementation, KernelChoiceError, NotBoundError, bind


def test_every_implementation_loads_and_has_a_public_operation() -> None:
    for row in registry.IMPLEMENTATIONS:
        if row.name != "triton" or registry.has_triton():
            assert callable(row.load()), row
    for operation in registry.operations():
        file = (
            next(r.target for r in registry.IMPLEMENTATIONS if r.operation == operation)
            .split(":")[0]
            .split(".")[-1]
        )
        public = getattr(__import__(f"cierzo.kernels.ops.{file}", fromlist=["x"]), operation)
        assert inspect.getdoc(public), operation


def test_default_is_the_first_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "require", lambda: None)  # as on a machine with a GPU
    better = Implementation("rms_norm", "better", "cierzo.kernels.ref.norm:rms_norm", ("cuda",), exact=True)
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", [better, *registry.IMPLEMENTATIONS])
    monkeypatch.setattr(Implementation, "load", lambda row: row)
    monkeypatch.setattr(registry, "has_triton", lambda: True)
    chosen = {row.operation: row.name for row in bind(KernelsConfig(), "cuda:1").chosen}
    assert chosen["rms_norm"] == "better"
    assert chosen["linear"] == chosen["expert_mlp"] == "triton"
    assert chosen["route"] == chosen["draw"] == "cuda"
    assert chosen["decoder"] == "torch"
    assert bind(KernelsConfig(instruction_set="reference"), "cpu").chosen[0].name == "torch"
    override = KernelsConfig(implementations={"rms_norm": "torch"})
    assert bind(override, "cuda").chosen[0].name == "torch"


def test_without_triton_a_gpu_is_refused_unless_all_of_it_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "has_triton", lambda: False)
    with pytest.raises(
        KernelChoiceError, match=r"'rms_norm' needs the package triton on 'cuda:0': pip install cierzo\[cuda\]"
    ):
        bind(KernelsConfig(), "cuda:0")
    plain = KernelsConfig(implementations=dict.fromkeys(registry.operations(), "torch"))
    assert {row.name for row in bind(plain, "cuda:0").chosen} == {"torch"}
    assert bind(KernelsConfig(), "cpu").chosen


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(KernelChoiceError, match=r"unknown operation 'rms'; known: .*rms_norm, add_rms_norm"):
        bind(KernelsConfig(implementations={"rms": "torch"}), "cpu")
    with pytest.raises(
        KernelChoiceError, match=r"'rms_norm' has no implementation 'fast' on 'cpu'; known: (native, )?torch"
    ):
        bind(KernelsConfig(implementations={"rms_norm": "fast"}), "cpu")
    with pytest.raises(KernelChoiceError, match="no implementation for device 'tpu'"):
        bind(KernelsConfig(), "tpu")


def test_cuda_kernels_are_refused_at_start_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "missing", lambda: "no CuPy: pip install it")
    with pytest.raises(KernelChoiceError, match=r"the CUDA kernels cannot run: no CuPy: pip install it"):
        bind(KernelsConfig(), "cuda")
    in_torch = dict.fromkeys(registry.operations(), "torch")
    assert {row.name for row in bind(KernelsConfig(implementations=in_torch), "cuda").chosen} == {"torch"}


def test_a_refused_choice_leaves_the_bound_ones() -> None:
    bind(KernelsConfig(), "cpu")
    with pytest.raises(KernelChoiceError):
        bind(KernelsConfig(implementations={"rms_norm": "fast"}), "cpu")
    assert callable(registry.bound.rms_norm)


def test_an_operation_before_bind_says_so() -> None:
    with pytest.raises(NotBoundError, match=r"'rms_norm' is not bound: call"):
        registry.Bound().rms_norm(1)


def test_the_table_says_where_bits_depend_on_the_batch() -> None:
    text = " ".join(bind(KernelsConfig(instruction_set="reference"), "cpu").describe().split())
    groups = re.split(r"torch, (?:bits depend on the rows beside|exact) ", text)[1:]
    depending, exact = (group.strip() for group in groups)
    assert {*depending.split(", "), *exact.split(", ")} == set(registry.operations())
    assert "mla_decode" in depending.split(", ")
    assert "write_latents" in exact.split(", ")


def test_sizes_are_named_in_errors() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(4, 5)
    assert check.sizes("f", a=(a, "T D"), b=(b, "* 5")) == {"T": 2, "D": 3}
    with pytest.raises(check.ArgumentError, match=r"f: b \[N D\] needs D = 3, has shape \[4, 5\]"):
        check.sizes("f", a=(a, "T D"), b=(b, "N D"))
    with pytest.raises(check.ArgumentError, match=r"f: b must have 3 axes \[N D X\], has shape \[4, 5\]"):
        check.sizes("f", b=(b, "N D X"))
    with pytest.raises(check.ArgumentError, match="needs 6 = 6"):
        check.sizes("f", b=(b, "N 6"))
