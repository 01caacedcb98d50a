"""The demo model, converted once per test run, and what transformers makes of the file it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cierzo.engine.weights.gguf import find_demo_gguf, prepare_demo


@pytest.fixture(scope="session")
def smollm2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with nothing in it but the demo model."""
    cache = tmp_path_factory.mktemp("cache")
    prepare_demo(cache, progress=False)
    return cache


@pytest.fixture(scope="session")
def smollm2(smollm2_cache: Path) -> Path:
    """The demo model's checkpoint folder."""
    return prepare_demo(smollm2_cache, progress=False)


@pytest.fixture(scope="session")
def smollm2_oracle() -> Any:
    """transformers' LlamaForCausalLM in float32, loaded from the GGUF file itself."""
    source = find_demo_gguf()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    return model.eval()
