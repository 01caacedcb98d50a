"""Which implementations each operation has, and which one runs: chosen by `bind` once, at start.

How the files hang together, with `rms_norm` as the example:

- `ops/norm.py` holds what callers call: the docstring (shapes, dtypes, padding, errors), the argument check,
  and then `return bound.rms_norm(x, weight, eps)`, with `from cierzo.kernels.registry import bound`.
- `ref/norm.py` holds the function of the same name and signature in plain torch: the definition of correct.
- The table below holds one line per implementation. `_torch("norm", "rms_norm", ...)` registers the
  reference; any other implementation is one source file and one line, placed before the reference:
  `Implementation("rms_norm", "native", "cierzo.kernels.cpu.launch.norm:rms_norm", ("cpu",), exact=True)`.

A new operation is therefore: ops/, ref/, its name in a `_torch` line, and a row in the test cases. Nothing is
imported before it is chosen, so a target may need libraries that the machine at hand lacks.

The order of the table is the order of preference; the last row of an operation is its reference. `exact` says that
a row's bits do not depend on the rows beside it; plain torch's matmul, softmax and SDPA cannot promise that, and
the start-up table says so. The blocks of a layer have no plain-torch form of their own: they are "composed" of
single operations (ops/compose.py), and as exact as the implementations bound for those that they call.

    table = bind(KernelsConfig(), "cpu")      # once per process, before the first operation is called
    print(table.describe())
    choose(KernelsConfig(), "cuda")           # the table alone, on a machine without a GPU too

One process computes on one kind of device, hence one table per process; `bind` again replaces it (tests do).
"""

from __future__ import annotations

import importlib
import importlib.util
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cierzo.kernels.config import KernelsConfig  # a msgspec Struct; to run kernels alone takes torch alone


class KernelChoiceError(ValueError):
    """The configuration names an operation or implementation that does not exist or cannot run here."""


class NotBoundError(RuntimeError):
    """An operation was called before `bind`."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """A way to compute an operation; `target` is "module:function", imported when chosen.

    calls: the bound operations that a composition is made of; its `exact` is about what it does between them.
    """

    operation: str
    name: str
    target: str
    devices: tuple[str, ...]
    exact: bool
    calls: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """Import the target."""
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)


def _torch(file: str, *operations: str, exact: bool = False) -> list[Implementation]:
    """The plain-torch references of `operations` in ref/<file>.py. They run on any device of torch's."""
    return [
        Implementation(name, "torch", f"cierzo.kernels.ref.{file}:{name}", ("cpu", "cuda"), exact)
        for name in operations
    ]


def _composed(operation: str, *calls: str) -> Implementation:
    """A composition of bound operations (ops/compose.py), which treats each row alone between them."""
    target = f"cierzo.kernels.ops.compose:{operation}"
    return Implementation(operation, "composed", target, ("cpu", "cuda"), exact=True, calls=calls)


def _in_steps(operation: str, *calls: str) -> Implementation:
    """For a CPU, what a GPU computes in fewer launches: the operations that make it up, as they are bound."""
    target = f"cierzo.kernels.ops.compose:{operation}"
    return Implementation(operation, "composed", target, ("cpu",), exact=True, calls=calls)


def _native(file: str, *operations: str) -> list[Implementation]:
    """C++ kernels (cpu/launch/<file>.py), where the library is built and the CPU can run it."""
    module = f"cierzo.kernels.cpu.launch.{file}"
    return [Implementation(name, "native", f"{module}:{name}", ("cpu",), exact=True) for name in operations]


def _triton(file: str, *operations: str) -> list[Implementation]:
    """GPU kernels (triton/<file>.py), where the package triton is installed."""
    module = f"cierzo.kernels.triton.{file}"
    return [Implementation(name, "triton", f"{module}:{name}", ("cuda",), exact=True) for name in operations]


def _cuda(file: str, *operations: str) -> list[Implementation]:
    """CUDA C++ kernels (cuda/launch/<file>.py). `bind` refuses them where a GPU or CuPy is missing."""
    module = f"cierzo.kernels.cuda.launch.{file}"
    return [Implementation(name, "cuda", f"{module}:{name}", ("cuda",), exact=True) for name in operations]


_NORMS = ("rms_norm", "add_rms_norm")
_FP8_NORMS = ("rms_norm_fp8", "add_rms_norm_fp8")  # for matrices whose activations are FP8: on a GPU alone

IMPLEMENTATIONS: list[Implementation] = [
    *_native("norm", "rms_norm", "add_rms_norm"),
    *_triton("norm", "rms_norm", "add_rms_norm"),
    *_triton("norm", "rms_norm_fp8", "add_rms_norm_fp8"),
    *_torch("norm", "rms_norm", "add_rms_norm", "rms_norm_fp8", "add_rms_norm_fp8"),
    *_native("rope", "rope_tables", "apply_rope"),
    *_triton("rope", "rope_tables", "apply_rope"),
    *_torch("rope", "rope_tables", "apply_rope", exact=True),
    *_native("linear", "linear", "lm_head", "gated_mlp"),
    *_triton("linear", "linear", "lm_head", "gated_mlp"),
    *_torch("linear", "linear", "lm_head", "gated_mlp"),
    *_triton("linear", "linear_terms"),
    _in_steps("linear_terms", "linear"),
    *_torch("linear", "linear_terms"),
    *_triton("terms", "sum_terms"),
    *_torch("terms", "sum_terms", exact=True),
    *_native("moe", "route", "group_by_expert", "expert_mlp"),
    *_triton("moe", "expert_mlp"),
    *_cuda("moe", "route", "group_by_expert"),
    *_torch("moe", "route", "expert_mlp"),
    *_torch("moe", "group_by_expert", exact=True),
    *_cuda("moe", "route_groups"),
    _in_steps("route_groups", "route", "group_by_expert"),
    *_torch("moe", "route_groups"),
    *_triton("moe", "expert_terms"),
    _in_steps("expert_terms", "expert_mlp"),
    *_torch("moe", "expert_terms"),
    *_native("attention", "write_latents", "write_keys_values", "mla_decode", "gqa_decode"),
    *_native("attention", "write_normed_latents", "rotate_and_write_keys_values"),
    *_triton("cache_write", "write_latents", "write_keys_values"),
    *_triton("cache_write", "write_normed_latents", "rotate_and_write_keys_values"),
    *_torch("attention", "write_latents", "write_keys_values", "rotate_and_write_keys_values", exact=True),
    *_torch("attention", "write_normed_latents"),
    *_native("attention", "mla_prefill", "gqa_prefill"),
    *_native("attention", "mla_absorb", "mla_unabsorb"),
    *_triton("linear", "mla_absorb", "mla_unabsorb"),
    *_triton("mla", "mla_decode", "mla_prefill"),
    *_triton("gqa", "gqa_decode", "gqa_prefill"),
    *_torch("attention", "mla_absorb", "mla_unabsorb", "mla_prefill", "mla_decode"),
    _in_steps("mla_values", "mla_decode", "mla_unabsorb"),
    *_triton("values", "mla_values"),
    *_torch("attention", "mla_values"),
    *_torch("attention", "gqa_prefill", "gqa_decode"),
    *_triton("latents", "norm_latents", "rotate_and_absorb"),
    _in_steps("norm_latents", "rms_norm", "rms_norm_fp8", "write_normed_latents"),
    _in_steps("rotate_and_absorb", "apply_rope", "mla_absorb"),
    *_torch("latents", "norm_latents", "rotate_and_absorb"),
    *_native("vision", "image_attention", "gelu"),
    *_triton("vision", "image_attention", "gelu"),
    *_torch("vision", "image_attention", "gelu"),
    _in_steps("latents_of", *_NORMS, *_FP8_NORMS, "linear_terms", "norm_latents"),
    _in_steps("absorbed_queries", "linear_terms", "rotate_and_absorb"),
    *_triton("latent_products", "latents_of", "absorbed_queries"),
    *_torch("latents", "latents_of", "absorbed_queries"),
    *_cuda("blocks", "copy_blocks", "gather_blocks", "scatter_blocks"),
    *_torch("blocks", "copy_blocks", "gather_blocks", "scatter_blocks", exact=True),
    *_cuda("sampling", "add_bias", "apply_penalties", "mask_tokens", "peaks", "draw"),
    *_cuda("sampling", "log_probabilities", "top_tokens", "mask_bits"),
    *_native("sampling", "apply_penalties", "peaks", "draw", "log_probabilities", "top_tokens", "mask_bits"),
    *_torch("sampling", "add_bias", "apply_penalties", "mask_tokens", "peaks", "draw", exact=True),
    *_torch("sampling", "log_probabilities", "top_tokens", "mask_bits", exact=True),
    *_native("block", "mla_block", "gqa_block", "mlp_block", "moe_block", "decoder"),
    _composed(
        "mla_block",
        *("linear", "linear_terms", "apply_rope"),
        *("latents_of", "rotate_and_absorb", "absorbed_queries", "mla_prefill", "mla_values"),
    ),
    _composed(
        "gqa_block",
        *(*_NORMS, *_FP8_NORMS, "linear", "linear_terms", "rotate_and_write_keys_values"),
        *("gqa_prefill", "gqa_decode"),
    ),
    _composed("mlp_block", *_NORMS, *_FP8_NORMS, "gated_mlp"),
    _composed("moe_block", *_NORMS, "route_groups", "expert_terms"),
    _composed("decoder", "mla_block", "gqa_block", "mlp_block", "moe_block", "add_rms_norm", "lm_head"),
]


class Bound:
    """The callables in force, one attribute per operation; empty until `bind`."""

    def __getattr__(self, name: str) -> Any:  # reached only for what is not bound
        raise NotBoundError(
            f"operation {name!r} is not bound: call kernels.registry.bind(KernelsConfig(), device) at start"
        )


bound = Bound()


# The instruction set that "auto" stands for in this process; tests force it.
default_instruction_set: str = "auto"


@dataclass(frozen=True, slots=True)
class BoundTable:
    """The implementations chosen for `device`, in the table's order.

    instruction_set: of the C++ kernels, or "reference"; then `reason` says why there are none.
    """

    device: str
    chosen: tuple[Implementation, ...]
    instruction_set: str
    reason: str = ""

    @property
    def uses_native(self) -> bool:
        """Whether any operation runs in C++, and weights are wanted in its order."""
        return any(choice.name == "native" for choice in self.chosen)

    def is_exact(self, operation: str) -> bool:
        """Whether a row's bits do not depend on the rows beside it, in the operation nor in any that it calls."""
        choice = next(row for row in self.chosen if row.operation == operation)
        unused = _FP8_NORMS if self.device.startswith("cpu") else ()
        return choice.exact and all(self.is_exact(name) for name in choice.calls if name not in unused)

    def describe(self) -> str:
        """Return the start-up table: each implementation's operations, and where a row's bits depend on the rows
        beside it."""
        groups: dict[tuple[str, bool], list[str]] = {}
        for choice in self.chosen:
            name = f"native {self.instruction_set}" if choice.name == "native" else choice.name
            groups.setdefault((name, self.is_exact(choice.operation)), []).append(choice.operation)
        lines = [f"kernels on {self.device}" + (f" (no native ones: {self.reason})" if self.reason else "")]
        for (name, exact), names in groups.items():
            lines.append(f"  {name}, {'exact' if exact else 'bits depend on the rows beside'}")
            lines += textwrap.wrap(", ".join(names), 100, initial_indent="    ", subsequent_indent="    ")
        return "\n".join(lines)


def operations() -> tuple[str, ...]:
    """All operation names, in the table's order."""
    return tuple(dict.fromkeys(row.operation for row in IMPLEMENTATIONS))


def reference() -> dict[str, str]:
    """Name the reference of every operation: plain torch, or composed of such. KernelsConfig takes the names."""
    return {row.operation: row.name for row in IMPLEMENTATIONS}  # the last row of each stays


def implementations(operation: str, device: str, instruction_set: str = "auto") -> list[Implementation]:
    """List the implementations of `operation` that run on `device` ("cpu", "cuda", "cuda:1") here, best first.

    Raises KernelChoiceError if the native library is there and broken, or lacks the instruction set.
    """
    kind = device.partition(":")[0]
    rows = [row for row in IMPLEMENTATIONS if row.operation == operation and kind in row.devices]
    if any(row.name == "native" for row in rows) and _instruction_set(instruction_set)[0] == "reference":
        return [row for row in rows if row.name != "native"]
    return rows


@cache
def has_triton() -> bool:
    """Whether the package is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def has_native() -> bool:
    """Whether C++ kernels run here: built, and on a CPU with one of their instruction sets."""
    return bool(importlib.import_module("cierzo.kernels.cpu.native").available())


def _instruction_set(wanted: str) -> tuple[str, str]:
    """The instruction set that runs when `wanted` is; and if that is "reference", why."""
    native = importlib.import_module("cierzo.kernels.cpu.native")
    if wanted == "auto":
        wanted = default_instruction_set
    try:
        if wanted == "reference":
            return wanted, "chosen"
        if wanted == "auto" and not native.available():
            return "reference", native.missing()
        return native.supported(wanted), ""
    except native.NativeError as error:
        raise KernelChoiceError(str(error)) from error


def choose(config: KernelsConfig, device: str) -> BoundTable:
    """Choose one implementation per operation, and import none of them. Raises KernelChoiceError."""
    known = operations()
    for name in config.implementations:
        if name not in known:
            raise KernelChoiceError(f"unknown operation {name!r}; known: {', '.join(known)}")
    wanted = config.instruction_set
    chosen = tuple(_choose(name, config.implementations.get(name), device, wanted) for name in known)
    on_cpu = device.partition(":")[0] == "cpu"
    instruction_set, reason = _instruction_set(wanted) if on_cpu else ("reference", "")
    return BoundTable(device, chosen, instruction_set, reason)


def bind(config: KernelsConfig, device: str) -> BoundTable:
    """Choose, import and put in force one implementation per operation. Raises KernelChoiceError."""
    table = choose(config, device)
    _require_packages(table)
    callables = {choice.operation: choice.load() for choice in table.chosen}
    if table.instruction_set != "reference":
        importlib.import_module("cierzo.kernels.cpu.native").select(table.instruction_set)
    vars(bound).clear()
    vars(bound).update(callables)
    return table


def _require_packages(table: BoundTable) -> None:
    """Raise KernelChoiceError where Triton, CuPy or the GPU of the chosen kernels is missing."""
    for choice in table.chosen:
        if choice.name == "triton" and not has_triton():
            raise KernelChoiceError(
                f"operation {choice.operation!r} needs the package triton on {table.device!r}: "
                "pip install cierzo[cuda]"
            )
    if any(choice.name == "cuda" for choice in table.chosen):
        importlib.import_module("cierzo.kernels.cuda.launch.device").require()


def _choose(operation: str, wanted: str | None, device: str, instruction_set: str) -> Implementation:
    """The wanted implementation, or the best one for the device."""
    runnable = implementations(operation, device, instruction_set)
    if not runnable:
        raise KernelChoiceError(f"operation {operation!r} has no implementation for device {device!r}")
    for choice in runnable:
        if wanted in (None, choice.name):
            return choice
    names = ", ".join(choice.name for choice in runnable)
    raise KernelChoiceError(
        f"operation {operation!r} has no implementation {wanted!r} on {device!r}; known: {names}"
    )
