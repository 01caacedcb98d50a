"""make-checkpoint in the published formats: the tensors and bytes of the real ones, and models that run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cierzo.cli import main
from cierzo.engine.checkpoint_format import PUBLISHED_FORMATS
from cierzo.engine.errors import ConfigError
from cierzo.engine.llm import LLM
from cierzo.engine.model.build import parameter_specs
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.parameters import as_tensor
from cierzo.engine.weights.info import describe
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.weights.published import WEIGHT_STD, tensor_plans
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.engine.weights.shapes import shape_of
from cierzo.scheduler.params import SamplingParams

TEXT_PARAMETERS = 118_972_826_624
VISION_TENSORS, VISION_BYTES = 222, 856_944_640
CASES = [
    ("small4", "native"),
    ("small4", "hf-fp8"),
    ("small4", "native-fp8"),
    ("small4", "native-nvfp4"),
    ("small3", "native"),
    ("small3", "hf-fp8"),
    ("small3", "native-fp8"),
]


def test_census_of_small4_in_nvfp4() -> None:
    """Of the published repository: 56,313 tensors, 70,801,959,560 bytes, vision included; 1558 tensors a layer."""
    plans = tensor_plans(shape_of("small4", "full"), PUBLISHED_FORMATS["native-nvfp4"], "BF16")
    assert len(plans) + VISION_TENSORS == 56_313
    assert sum(plan.num_bytes for plan in plans) + VISION_BYTES == 70_801_959_560
    assert sum(plan.name.startswith("layers.7.") for plan in plans) == 1558
    assert sum(plan.name.endswith(".weight_packed") for plan in plans) == 13_932


@pytest.mark.parametrize(("name", "num_tensors"), [("hf-fp8", 36 * 35 + 3), ("native-fp8", 36 * 1181 + 3)])
def test_census_of_small4_in_fp8(name: str, num_tensors: int) -> None:
    """The published repository has 19,008 scales in Hugging Face's layout; a native gate has its own."""
    plans = tensor_plans(shape_of("small4", "full"), PUBLISHED_FORMATS[name], "BF16")
    assert len(plans) == num_tensors
    scales = 36 * (8 * 2 + (4 if name == "hf-fp8" else 6) * 128)
    assert sum(plan.num_elements for plan in plans) == TEXT_PARAMETERS + scales
    kept = [plan.name for plan in plans if plan.dtype != "F8_E4M3" and len(plan.shape) == 2]
    assert len(kept) == 36 + 2  # routers, embedding and head


@pytest.mark.parametrize(("like", "name"), CASES)
def test_it_loads_with_normal_weights(tmp_path: Path, like: str, name: str) -> None:
    folder = make_checkpoint(tmp_path / "new", like=like, checkpoint_format=name, max_shard_bytes=1_000_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert describe(folder).format == str(PUBLISHED_FORMATS[name])
    assert describe(folder).parameters == sum(math.prod(sizes) for _, sizes in shape_of(like, "tiny").tensors())
    with CheckpointReader(folder) as reader:
        found = load_parameters(
            reader, parameter_specs(read_model_config(folder)), dtype=torch.float32, device="cpu"
        )
        for key, parameter in found.items():
            values = as_tensor(parameter)
            if "norm" in key:
                assert bool((values == 1).all())
            else:
                assert values.mean().abs() < 0.005
                assert abs(values.std() - WEIGHT_STD) < 0.4 * WEIGHT_STD, (
                    key
                )  # an NVFP4 divisor is up to a quarter off
        scales = [key for key in reader.tensors if key.endswith(("qscale_weight", "_scale_inv", "global_scale"))]
        used = [key for key in scales if "input" not in key]
        values = [value for key in used for value in reader.read(key).flatten().tolist()]
        assert len(set(values)) >= len(values) / 8  # bfloat16 has few numbers so near each other


def test_it_generates_and_says_its_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    assert main(["make-checkpoint", str(folder), "--like", "small4", "--checkpoint-format", "native-nvfp4"]) == 0
    assert "format            Mistral-native, NVFP4 (compressed-tensors), experts only" in capsys.readouterr().out
    with LLM(folder, kv_cache_gib=0.01) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert len(output.token_ids) == 4
    make_checkpoint(folder, like="small3", checkpoint_format="native-fp8", overwrite=True)
    assert describe(folder).model.architecture == "mistral"


@pytest.mark.parametrize(
    ("like", "name", "dtype", "field"),
    [
        ("small4", "gguf", "bfloat16", "checkpoint_format"),
        ("small3", "native-nvfp4", "bfloat16", "like"),
        ("small4", "hf-fp8", "float32", "dtype"),
    ],
)
def test_formats_that_do_not_fit(tmp_path: Path, like: str, name: str, dtype: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_checkpoint(tmp_path / "new", like=like, checkpoint_format=name, dtype=dtype)
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_of_text_needs_a_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "new", like="small4", checkpoint_format="native-fp8")
    with LLM(folder, kv_cache_gib=0.01) as llm, pytest.raises(Exception, match="token") as caught:
        llm.generate(["text"])
    assert "tokenizer" in str(caught.value)
