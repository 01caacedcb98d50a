"""Number formats of weights, and of what they are multiplied with: the choice that settings leave or make."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cierzo.engine.errors import refusal
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS, formats_on, plain_format

if TYPE_CHECKING:
    from cierzo.engine.config import EngineOptions

PLACE = {"cpu": "on a CPU", "cuda": "on a GPU"}


def listed(kind: str) -> str:
    """The number formats of weights that a kind of device computes with, as text."""
    return ", ".join(formats_on(kind))


def weights_format(options: EngineOptions, kind: str, dtype: str) -> str:
    """The weights' number format. Activations in fp32 are not multiplied with rounded weights unasked."""
    if options.weights == "auto":
        return plain_format(dtype)
    known = formats_on(kind)
    if options.weights not in known:
        limit = f"one of auto, {listed(kind)}"
        raise refusal("weights", limit, options.weights, f"{options.weights} has no kernels {PLACE[kind]}")
    if options.weights == "bf16" and dtype != "bfloat16":
        rounded = ", ".join(name for name in known if name != "bf16")
        raise refusal("weights", f"one of auto, {rounded}", options.weights, f"dtype is {dtype}")
    return options.weights


def activations_format(options: EngineOptions, kind: str, dtype: str) -> str:
    """The number format of what weights are multiplied with. Those in FP8 meet it in FP8, on the tensor cores of a
    GPU, only where that is asked for: it rounds what dtype would hold."""
    plain = plain_format(dtype)
    if options.activations in ("auto", plain):
        return plain
    if options.activations == "bf16":
        needed, found = "dtype bfloat16", dtype
    elif kind != "cuda":
        needed, found = "device cuda", kind
    elif options.weights not in (takers := formats_meeting(options.activations)):
        needed, found = f"weights {' or '.join(takers)}", weights_format(options, kind, dtype)
    else:
        return options.activations
    limit = "auto or bf16" if plain == "bf16" else "auto"
    why = f"{options.activations} needs {needed}, not {found}"
    raise refusal("activations", limit, options.activations, why)


def head_format(options: EngineOptions, kind: str, weights: str, dtype: str) -> str:
    """The number format of lm_head, for weights of a format that was chosen. In FP8 it is never unasked."""
    if options.head == "auto":
        return NUMBER_FORMATS[weights].of("head", kind, plain_format(dtype))
    if options.head not in formats_on(kind):
        why = f"{options.head} has no kernels {PLACE[kind]}"
        raise refusal("head", "auto", options.head, why)
    return options.head


def formats_meeting(activations: str) -> list[str]:
    """The number formats of weights whose codes are multiplied with activations in this format."""
    return [name for name, one in NUMBER_FORMATS.items() if activations in one.activations]
