"""transformers 5.23 dequantises Hugging Face's FP8 spelling on the CPU: the same weights, and the same logits.

It leaves the experts of Mistral 4 as they are, codes without scales: those are compared elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import make_queries
from published import FP8_CONFIG, MINISTRAL3, SMALL3, SMALL4, Published
from safetensors.torch import save_file

from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.model.build import parameter_specs
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.parameters import as_tensor
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.engine.worker.runner import load_model
from cierzo.kernels.ops.block import StepRows


def text_only(folder: Path, shape: Any) -> Path:
    """transformers' text classes take neither Mistral 3's prefix nor vision tensors."""
    model = Published(shape, "hf-fp8")
    stored = {
        name.removeprefix("language_model."): tensor
        for name, tensor in model.stored.items()
        if name.startswith("language_model.")
    }
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**model.base, "quantization_config": FP8_CONFIG}))
    return folder


def dequantised(folder: Path, name: str) -> Any:
    settings = transformers.FineGrainedFP8Config(
        activation_scheme="static", weight_block_size=None, dequantize=True, modules_to_not_convert=["lm_head"]
    )
    family = getattr(transformers, name)
    return family.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).eval()


@pytest.mark.parametrize(
    ("shape", "name"),
    [(SMALL3, "MistralForCausalLM"), (MINISTRAL3, "Ministral3ForCausalLM"), (SMALL4, "Mistral4ForCausalLM")],
)
def test_the_same_weights(tmp_path: Path, shape: Any, name: str) -> None:
    theirs = dequantised(text_only(tmp_path, shape), name).state_dict()
    specs = parameter_specs(read_model_config(tmp_path))
    with CheckpointReader(tmp_path) as reader:
        ours = load_parameters(reader, specs, dtype=torch.float32, device="cpu")
        assert ours.keys() == theirs.keys()
        for key, parameter in ours.items():
            if "mlp.experts." not in key:
                assert torch.equal(as_tensor(parameter), theirs[key]), key


@pytest.mark.parametrize(("shape", "name"), [(SMALL3, "MistralForCausalLM"), (MINISTRAL3, "Ministral3ForCausalLM")])
def test_the_same_logits(tmp_path: Path, shape: Any, name: str) -> None:
    oracle = dequantised(text_only(tmp_path, shape), name).float()  # some of it is bfloat16
    tokens = torch.arange(9) * 17 % 192
    with torch.inference_mode():
        expected = oracle(tokens[None]).logits[0]
    options = EngineOptions(model=str(tmp_path), kv_cache_gib=0.01, block_tokens=4, dtype="float32")
    model, pool, _ = load_model(resolve(options))
    tables = torch.tensor([[3, 0, 1]], dtype=torch.int32)
    slots = torch.tensor([12, 13, 14, 15, 0, 1, 2, 3, 4])
    none = make_queries([], tables)
    inputs = StepRows(tokens, torch.arange(9), slots, 9, make_queries([(9, 9, 0)], tables), none)
    torch.testing.assert_close(model.logits(inputs, pool), expected, rtol=1e-4, atol=1e-4)
