"""Which output head runs: the truth table of tie flags and stored heads, as transformers 5 has it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loading import load, logits
from published import SMALL3, Published
from safetensors.torch import load_file, save_file
from tiny_folders import DENSE, changed, transformers_logits, write_config
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model import vision
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.parameters import as_tensor
from cierzo.engine.weights.info import describe

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "silu",
}
FLAGS = (True, False, ...)  # `...`: not there
STORED = ("own", "equal", "absent")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Missing vision towers and heads are reported in tables."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A dense model's, its head with values of its own."""
    folder = write_config(tmp_path_factory.mktemp("weights"), {"model_type": "mistral", **DENSE})
    transformers_logits(folder)
    return load_file(folder / "model.safetensors")


def stored(weights: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """The weights with their own head, with one that equals the embedding, or without one."""
    if head == "equal":
        return {**weights, HEAD: weights[EMBEDDING].clone()}
    return {name: tensor for name, tensor in weights.items() if name != HEAD or head == "own"}


def write(folder: Path, tensors: dict[str, Tensor], inner: object, outer: object = None) -> Path:
    """A folder of the text model alone, or, with an outer flag, of Mistral 3 around it."""
    values = changed({"model_type": "mistral", **DENSE}, {"tie_word_embeddings": inner})
    if outer is not None:
        values = {"model_type": "mistral3", "text_config": values, "vision_config": VISION}
        values = changed(values, {"tie_word_embeddings": outer})
        tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        config = read_model_config(write_config(folder, values))
        assert config.vision is not None
        tower = vision.specs(config.vision, config.hidden_size)
        tensors |= {name: torch.ones(spec.shape) for name, spec in tower.items()}
    save_file(tensors, write_config(folder, values) / "model.safetensors", metadata={"format": "pt"})
    return folder


def head_of_transformers(folder: Path, weights: dict[str, Tensor]) -> str:
    """Which tensor transformers multiplies with, loading the whole folder."""
    wrapped = json.loads((folder / "config.json").read_text())["model_type"] == "mistral3"
    family = transformers.Mistral3ForConditionalGeneration if wrapped else transformers.AutoModelForCausalLM
    found = family.from_pretrained(folder, dtype=torch.float32).get_output_embeddings().weight
    names = {"embedding": EMBEDDING, "head": HEAD}
    return next((name for name, key in names.items() if torch.equal(found, weights[key])), "random")


def head_of_cierzo(folder: Path, weights: dict[str, Tensor]) -> str:
    """Which tensor cierzo multiplies with; "random" where it refuses to load."""
    try:
        found = load(folder)
    except CheckpointError as error:
        return "random" if str(error) == f"tensor {HEAD} is missing" else str(error)
    head = as_tensor(found.get(HEAD, found[EMBEDDING]))
    return "head" if torch.equal(head, weights[HEAD]) else "embedding"


@pytest.mark.parametrize("head", STORED)
def test_a_text_model_alone(tmp_path: Path, weights: dict[str, Tensor], head: str) -> None:
    for number, flag in enumerate(FLAGS):
        folder = write(tmp_path / str(number), stored(weights, head), flag)
        theirs = head_of_transformers(folder, weights)
        assert head_of_cierzo(folder, weights) == theirs, flag
        assert theirs == {"own": "head", "equal": "embedding"}.get(head, "embedding" if flag is True else "random")


@pytest.mark.parametrize("head", STORED)
@pytest.mark.parametrize("outer", FLAGS)
def test_a_wrapped_text_model(tmp_path: Path, weights: dict[str, Tensor], outer: object, head: str) -> None:
    """The wrapper's flag counts, which is true where it is not written; the text model's own never does."""
    folders = [write(tmp_path / str(i), stored(weights, head), inner, outer) for i, inner in enumerate(FLAGS)]
    found = {head_of_cierzo(folder, weights) for folder in folders}
    assert found == {head_of_transformers(folders[FLAGS.index(False)], weights)}
    assert found == {{"own": "head", "equal": "embedding"}.get(head, "random" if outer is False else "embedding")}


def test_an_outer_flag_beside_a_stored_head(
    tmp_path: Path, weights: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """The default of transformers' wrapper beside an untied language model: the stored head computes the logits."""
    expected = transformers_logits(write_config(tmp_path / "alone", {"model_type": "mistral", **DENSE}))
    folder = write(tmp_path / "wrapped", stored(weights, "own"), False, True)
    torch.testing.assert_close(logits(folder, dtype="float32"), expected, rtol=1e-4, atol=1e-4)
    warning = next(record for record in caplog.records if record.levelno == logging.WARNING)
    assert "language_model.lm_head.weight to language_model.model.embed_tokens.weight" in warning.getMessage()
    assert "tie_word_embeddings" in warning.getMessage()


@pytest.mark.parametrize("head", STORED)
def test_params_json(tmp_path: Path, head: str) -> None:
    """`tied_embeddings` of Mistral's own layout."""
    model = Published(SMALL3, "native")
    embedding, own = model.stored["tok_embeddings.weight"], model.stored.pop("output.weight")
    if head != "absent":
        model.stored["output.weight"] = own if head == "own" else embedding.clone()
    for number, flag in enumerate(FLAGS):
        model.config = changed(model.config, {"tied_embeddings": flag})
        folder = model.write(tmp_path / str(number))
        if head == "absent" and flag is not True:
            with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
                load(folder)
            continue
        found = load(folder)
        expected = own if head == "own" else embedding
        assert torch.equal(as_tensor(found.get(HEAD, found[EMBEDDING])), expected.float())


def test_a_head_in_another_dtype_is_the_same_where_its_values_are(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    tensors = stored(weights, "equal")
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
    tensors[HEAD] = tensors[EMBEDDING].double()
    folder = write(tmp_path, tensors, True)
    assert HEAD not in load(folder)
    tensors[HEAD][191, 63] += 1e-6  # bfloat16 would round it away
    assert HEAD in load(write(tmp_path, tensors, True))
    tensors[HEAD] = torch.ones(191, 64)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: shape \[191, 64\], expected \[192, 64\]"):
        load(write(tmp_path, tensors, True))


def test_info_counts_one_head(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """A head that is stored takes part in a token's computation, and the embedding only where it is the head."""
    found: dict[str, Any] = {}
    for head in STORED:
        folder = write(tmp_path / head, stored(weights, head), True)
        assert read_model_config(folder).tie_word_embeddings
        found[head] = describe(folder).active_parameters
    assert found["own"] == found["equal"] == found["absent"]
