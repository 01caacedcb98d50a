"""A tokenizer whose ids are bytes; the demo model, converted once per test run, and what transformers makes of the
file it came from."""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from byte_words import byte_prompts, byte_tokenizer

from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.tokenizer import Tokenizer
from cierzo.engine.weights.gguf import find_demo_gguf, prepare_demo


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def prompts(tokenizer: Tokenizer) -> PromptEncoder:
    return byte_prompts(tokenizer)


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run. Under xdist every worker's own lies in it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextmanager
def _one_worker_at_a_time(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def smollm2_cache(of_all_workers: Path) -> Path:
    """A cache folder with nothing in it but the demo model."""
    cache = of_all_workers / "cache"
    with _one_worker_at_a_time(of_all_workers):
        cache.mkdir(exist_ok=True)
        prepare_demo(cache, progress=False)
    return cache


@pytest.fixture(scope="session")
def smollm2(smollm2_cache: Path) -> Path:
    """The demo model's checkpoint folder."""
    return prepare_demo(smollm2_cache, progress=False)


@pytest.fixture(scope="session")
def smollm2_oracle(of_all_workers: Path) -> Any:
    """transformers' LlamaForCausalLM in float32, loaded from the GGUF file itself."""
    kept = of_all_workers / "oracle.pt"
    with _one_worker_at_a_time(of_all_workers):
        if not kept.exists():
            torch.save(_load_oracle(), kept)
        return torch.load(kept, weights_only=False)


def _load_oracle() -> Any:
    source = find_demo_gguf()
    with pytest.MonkeyPatch.context() as patch:  # transformers asks for the same map at every layer
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
    return model.eval()
