"""The engine. `from cierzo.engine import LLM, SamplingParams`; nothing heavy is imported before it is named."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cierzo.engine.llm import LLM, Output, SampleOutput
    from cierzo.scheduler.params import SamplingParams

__all__ = ["LLM", "Output", "SampleOutput", "SamplingParams"]

_HOMES = {
    "LLM": "cierzo.engine.llm",
    "Output": "cierzo.engine.llm",
    "SampleOutput": "cierzo.engine.llm",
    "SamplingParams": "cierzo.scheduler.params",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
