"""Choice of implementations, and the argument checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from native_only import needs_native

from cierzo.bench.gpu import served
from cierzo.kernels import check, registry
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.registry import Implementation, KernelChoiceError, NotBoundError, bind

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    bind(KernelsConfig(), "cpu")


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
    assert chosen["decoder"] == "composed"
    assert bind(KernelsConfig(instruction_set="reference"), "cpu").chosen[0].name == "torch"
    override = KernelsConfig(implementations={"rms_norm": "torch"})
    assert bind(override, "cuda").chosen[0].name == "torch"


def test_without_triton_a_gpu_is_refused_unless_all_of_it_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "has_triton", lambda: False)
    with pytest.raises(
        KernelChoiceError, match=r"'rms_norm' needs the package triton on 'cuda:0': pip install cierzo\[cuda\]"
    ):
        bind(KernelsConfig(), "cuda:0")
    plain = KernelsConfig(implementations=registry.reference())
    assert {row.name for row in bind(plain, "cuda:0").chosen} == {"torch", "composed"}
    assert bind(KernelsConfig(), "cpu").chosen


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(KernelChoiceError, match=r"unknown operation 'rms'; known: .*rms_norm, add_rms_norm"):
        bind(KernelsConfig(implementations={"rms": "torch"}), "cpu")
    with pytest.raises(
        KernelChoiceError, match=r"'rms_norm' has no implementation 'fast' on 'cpu'; known: (native, )?torch"
    ):
        bind(KernelsConfig(implementations={"rms_norm": "fast"}), "cpu")
    with pytest.raises(
        KernelChoiceError, match=r"'mla_block' has no implementation 'torch' on 'cuda'; known: composed"
    ):
        bind(KernelsConfig(implementations={"mla_block": "torch"}), "cuda")
    with pytest.raises(KernelChoiceError, match="no implementation for device 'tpu'"):
        bind(KernelsConfig(), "tpu")


def test_cuda_kernels_are_refused_at_start_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "missing", lambda: "no CuPy: pip install it")
    with pytest.raises(KernelChoiceError, match=r"the CUDA kernels cannot run: no CuPy: pip install it"):
        bind(KernelsConfig(), "cuda")
    plain = KernelsConfig(implementations=registry.reference())
    assert {row.name for row in bind(plain, "cuda").chosen} == {"torch", "composed"}


def test_a_refused_choice_leaves_the_bound_ones() -> None:
    bind(KernelsConfig(), "cpu")
    with pytest.raises(KernelChoiceError):
        bind(KernelsConfig(implementations={"rms_norm": "fast"}), "cpu")
    assert callable(registry.bound.rms_norm)


def test_an_operation_before_bind_says_so() -> None:
    with pytest.raises(NotBoundError, match=r"'rms_norm' is not bound: call"):
        registry.Bound().rms_norm(1)


# Single operations whose plain-torch form promises no row its bits, and what is made of single operations.
DEPENDING = {
    *("rms_norm", "add_rms_norm", "rms_norm_fp8", "add_rms_norm_fp8", "linear", "lm_head", "gated_mlp", "route"),
    *("linear_terms", "expert_terms", "norm_latents", "rotate_and_absorb", "absorbed_queries", "route_groups"),
    *("mla_values", "latents_of"),
    *("expert_mlp", "write_normed_latents", "mla_absorb", "mla_unabsorb", "mla_prefill", "mla_decode"),
    *("gqa_prefill", "gqa_decode", "image_attention", "gelu"),
}
IN_TORCH, COMPOSED_OF_DEPENDING = (f"{name}, bits depend on the rows beside" for name in ("torch", "composed"))
COMPOSED = {"mla_block", "gqa_block", "mlp_block", "moe_block", "decoder"}
# Composed on a CPU alone.
ON_CPU = {
    *("linear_terms", "expert_terms", "norm_latents", "rotate_and_absorb", "absorbed_queries", "route_groups"),
    *("mla_values", "latents_of"),
}


def described(device_name: str, **options: Any) -> dict[str, set[str]]:
    """The operations under each heading of the start-up table of `device_name`, which need not be here."""
    title, *lines = registry.choose(KernelsConfig(**options), device_name).describe().splitlines()
    assert title.startswith(f"kernels on {device_name}")
    found: dict[str, set[str]] = {}
    heading = ""
    for line in lines:
        if not line.startswith("    "):
            heading = line.strip()
            found[heading] = set()
        else:
            names = line.strip().rstrip(",").split(", ")
            assert found[heading].isdisjoint(names)
            found[heading].update(names)
    assert set().union(*found.values()) == set(registry.operations())
    assert sum(map(len, found.values())) == len(registry.operations())
    return found


def test_the_table_of_a_gpu() -> None:
    """Every operation is a kernel that keeps rows apart, so the compositions of them do as well."""
    found = described("cuda:1")
    assert set(found) == {"triton, exact", "cuda, exact", "composed, exact"}
    assert found["composed, exact"] == COMPOSED
    assert found["triton, exact"] >= DEPENDING - {"route", "route_groups"}
    assert found["cuda, exact"] >= {"route", "group_by_expert", "draw"}


@pytest.mark.parametrize(
    ("operation", "callers"),
    [
        ("linear", {"mla_block", "gqa_block", "decoder"}),
        ("linear_terms", {"mla_block", "gqa_block", "decoder"}),
        ("mla_values", {"mla_block", "decoder"}),
        ("rms_norm_fp8", {"gqa_block", "mlp_block", "decoder"}),
        ("gated_mlp", {"mlp_block", "decoder"}),
        ("expert_terms", {"moe_block", "decoder"}),
        ("lm_head", {"decoder"}),
        ("apply_rope", set()),  # its plain-torch form keeps rows apart
        ("log_probabilities", set()),
    ],
)
def test_one_operation_in_plain_torch_on_a_gpu(operation: str, callers: set[str]) -> None:
    found = described("cuda", implementations={operation: "torch"})
    in_torch = IN_TORCH if operation in DEPENDING else "torch, exact"
    assert found.pop(in_torch) == {operation}
    assert found.pop(COMPOSED_OF_DEPENDING, set()) == callers
    assert found.pop("composed, exact", set()) == COMPOSED - callers
    assert set(found) == {"triton, exact", "cuda, exact"}


def test_the_table_of_the_reference() -> None:
    found = described("cpu", instruction_set="reference")
    assert set(found) == {IN_TORCH, "torch, exact", COMPOSED_OF_DEPENDING}
    assert found[IN_TORCH] == DEPENDING - ON_CPU
    assert found[COMPOSED_OF_DEPENDING] == COMPOSED | ON_CPU


@needs_native
def test_the_table_of_a_cpu() -> None:
    """Norms that give FP8 have no native kernel, and no composition on a CPU calls them."""
    found = described("cpu", implementations={"mla_block": "composed", "route": "torch"})
    (native,) = (names for heading, names in found.items() if heading.startswith("native "))
    assert found[IN_TORCH] == {"rms_norm_fp8", "add_rms_norm_fp8", "route"}
    assert found["composed, exact"] == {"mla_block"} | ON_CPU - {"route_groups"}
    assert {"moe_block", "decoder", "linear"} <= native  # in C++ they call none of the bound operations
    composed = {"moe_block": "composed", "decoder": "composed"}
    found = described("cpu", implementations={**composed, "route": "torch"})
    assert found[COMPOSED_OF_DEPENDING] == {"moe_block", "decoder", "route_groups"}


def test_compositions_call_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of both kinds run a prompt and a generated token, in plain weights and with activations in FP8. Blocks
    run once more as the first half of a model, which has no sum to add."""
    rows = {row.operation: row for row in registry.IMPLEMENTATIONS if row.calls}
    assert set(rows) == COMPOSED | ON_CPU
    called: dict[str, set[str]] = {name: set() for name in rows}
    callers: list[str] = []

    def noting(operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if callers and callers[-1] in rows:
                called[callers[-1]].add(operation)
            callers.append(operation)
            try:
                if operation in COMPOSED - {"decoder"}:
                    function(None, *arguments[1:])
                return function(*arguments)
            finally:
                callers.pop()

        return call

    bind(KernelsConfig(instruction_set="reference"), "cpu")
    for operation, function in list(vars(registry.bound).items()):
        monkeypatch.setitem(vars(registry.bound), operation, noting(operation, function))
    for name, format in product(("small4", "small3"), ("bf16", "fp8")):
        options = {"activations": format, "max_model_len": 64, "kv_cache_gib": 0.01}
        config = served.make_config(name, format, scale="tiny", layers=2, **options)
        served.slice_logits(served.make_model(config, CPU), config, CPU)
    called["mla_block"].add("rotate_and_absorb")  # of steps that have rows of both forms
    assert called == {name: set(row.calls) for name, row in rows.items()}


def test_sizes_are_named_in_errors() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(4, 5)
    assert check.sizes("f", a=(a, "T D"), b=(b, "* 5")) == {"T": 2, "D": 3}
    with pytest.raises(check.ArgumentError, match=r"f: b \[N D\] needs D = 3, has shape \[4, 5\]"):
        check.sizes("f", a=(a, "T D"), b=(b, "N D"))
    with pytest.raises(check.ArgumentError, match=r"f: b must have 3 axes \[N D X\], has shape \[4, 5\]"):
        check.sizes("f", b=(b, "N D X"))
    with pytest.raises(check.ArgumentError, match="needs 6 = 6"):
        check.sizes("f", b=(b, "N 6"))
