"""The vision tower against transformers' Mistral 3: features and whole logits, in each spelling of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import Sequence, make_queries
from safetensors.torch import load_file, save_file
from torch import Tensor
from vision_oracle import (
    BREAK,
    END,
    IMAGE,
    SPELLINGS,
    TEXTS,
    image,
    image_tokens,
    oracle_features,
    oracle_logits,
    write_folder,
)

from cierzo.cache.pool import KVPool
from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.build import build_model, parameter_specs
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.model.vision import VisionTower
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import bind

SIZES = [(2, 3), (1, 5), (4, 1), (1, 1), (7, 9)]  # merged tokens, down and across
BLOCK_TOKENS, NUM_BLOCKS = 16, 16


@pytest.fixture(autouse=True)
def _bound() -> None:
    bind(KernelsConfig(), "cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The model of each text family in each spelling."""
    base = tmp_path_factory.mktemp("vision")
    return {(text, one): write_folder(base / f"{text} {one}", text, one) for text in TEXTS for one in SPELLINGS}


def load(folder: Path, dtype: torch.dtype = torch.float32, text_only: bool = False) -> Decoder:
    config = read_model_config(folder, text_only)
    with CheckpointReader(folder) as reader:
        parameters = load_parameters(reader, parameter_specs(config), dtype=dtype, device="cpu")
        return build_model(config, parameters, device="cpu", dtype=dtype)


def tower(folder: Path, dtype: torch.dtype = torch.float32) -> VisionTower:
    found = load(folder, dtype).tower
    assert found is not None
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("text", TEXTS)
def test_features_are_those_of_transformers(folders: dict[tuple[str, str], Path], text: str, spelling: str) -> None:
    images = [image(*size, seed=number) for number, size in enumerate(SIZES)]
    ours = tower(folders[text, spelling])
    for pixels, expected in zip(images, oracle_features(text, images), strict=True):
        torch.testing.assert_close(ours.embed(pixels), expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("text", TEXTS)
def test_all_spellings_are_the_same_tower(folders: dict[tuple[str, str], Path], text: str) -> None:
    pixels = image(3, 4)
    first, *others = (tower(folders[text, spelling]).embed(pixels) for spelling in SPELLINGS)
    assert all(torch.equal(first, other) for other in others)
    assert len({str(read_model_config(folders[text, spelling]).vision) for spelling in SPELLINGS}) == 1


@pytest.mark.parametrize("text", TEXTS)
def test_features_in_bf16_are_near(folders: dict[tuple[str, str], Path], text: str) -> None:
    pixels = image(3, 5)
    (expected,) = oracle_features(text, [pixels])
    found = tower(folders[text, "published"], torch.bfloat16).embed(pixels)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_has_the_same_bits_with_any_threads(
    folders: dict[tuple[str, str], Path], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, pixels = tower(folders["mistral4", "published"], dtype), image(6, 11)
    found = []
    try:
        for threads, rows in ((1, 2048), (2, 2048), (3, 100), (2, 7)):
            native.set_threads(threads)
            monkeypatch.setattr("cierzo.engine.model.vision.MLP_ROWS", rows)
            found.append(ours.embed(pixels))
    finally:
        native.set_threads(0)
    assert all(torch.equal(found[0], other) for other in found[1:])


def step(model: Decoder, pool: KVPool, sequence: Sequence, tokens: list[int], features: Tensor) -> Tensor:
    """Logits of a sequence's next tokens, in one step; features: of all its image tokens so far."""
    start, end = sequence.computed, sequence.computed + len(tokens)
    slots = torch.arange(start, end)
    table = torch.arange(NUM_BLOCKS).int()[None]
    queries, none = make_queries([(len(tokens), end, 0)], table), make_queries([], table)
    ids = torch.tensor(tokens)
    places = (ids == IMAGE).nonzero()[:, 0]
    ready = features[len(features) - len(places) :]
    rows = StepRows(ids, slots, slots, len(tokens), queries, none, image_rows=places, image_embeddings=ready)
    sequence.computed = end
    return model.logits(rows, pool)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [None, 1, 9])
def test_logits_are_those_of_transformers(folders: dict[tuple[str, str], Path], text: str, cut: int | None) -> None:
    """Images first, between and last, of odd sizes; whole, and in chunks that end inside an image."""
    sizes = [(2, 3), (1, 5), (3, 2)]
    images = [image(*size, seed=number) for number, size in enumerate(sizes)]
    parts = [image_tokens(*size) for size in sizes]
    tokens = [*parts[0], 40, 41, *parts[1], 42, 43, 44, *parts[2]]
    model = load(folders[text, "published"])
    assert model.tower is not None
    features = torch.cat([model.tower.embed(pixels) for pixels in images])
    layout = read_model_config(folders[text, "published"]).cache_layout(BLOCK_TOKENS, "float32")
    pool = KVPool(layout, NUM_BLOCKS, "cpu")
    sequence, found, done = Sequence([]), [], 0
    for begin in range(0, len(tokens), cut or len(tokens)):
        chunk = tokens[begin : begin + (cut or len(tokens))]
        done += chunk.count(IMAGE)
        found.append(step(model, pool, sequence, chunk, features[:done]))
    expected = oracle_logits(text, tokens, images)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-3, atol=1e-4)
    without = torch.cat(found) - oracle_logits(text, tokens, [one.flip(0) for one in images])
    assert without.abs().max() > 0.05  # images matter


def test_an_image_in_stages_has_the_same_bits(folders: dict[tuple[str, str], Path]) -> None:
    """A stage a layer, those of two images in turn."""
    ours, both = tower(folders["mistral4", "published"]), (image(3, 4), image(5, 2, seed=1))
    first, second = (list(one) for one in zip(*zip(*map(ours.stages, both), strict=True), strict=True))
    assert first[:-1] == second[:-1] == [None] * (ours.config.num_layers - 1)
    for found, pixels in zip((first[-1], second[-1]), both, strict=True):
        assert found is not None
        assert torch.equal(found, ours.embed(pixels))


def test_text_only_has_no_tower(folders: dict[tuple[str, str], Path], caplog: pytest.LogCaptureFixture) -> None:
    for spelling in SPELLINGS:
        caplog.clear()
        folder = folders["mistral4", spelling]
        assert load(folder, text_only=True).tower is None
        (told,) = (record.getMessage() for record in caplog.records)
        assert told.startswith(f"{folder}: images are not served: 33 tensors, ")


@pytest.mark.parametrize("more", ["vision_tower.ln_post.weight", "multi_modal_projector.linear_1.bias"])
def test_what_has_no_place_in_the_tower_is_refused(tmp_path: Path, more: str) -> None:
    folder = write_folder(tmp_path, "mistral")
    weights = load_file(folder / "model.safetensors") | {more: torch.zeros(48)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {more} has no place in this model"):
        load(folder)
    assert load(folder, text_only=True).tower is None


def test_ids_and_sizes_are_told(folders: dict[tuple[str, str], Path]) -> None:
    config = read_model_config(folders["mistral", "native"]).vision
    assert config is not None
    assert (config.patch, config.merge, config.unit_px, config.max_side_px) == (14, 2, 28, 1540)
    assert (config.image_token_id, config.break_token_id, config.end_token_id) == (IMAGE, BREAK, END)


@pytest.mark.parametrize("shape", [(28, 30, 3), (28, 28), (0, 28, 3), (28, 28, 4), (3, 28, 28)])
def test_pixels_of_another_shape_are_refused(folders: dict[tuple[str, str], Path], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[rows \* 28, columns \* 28, 3\]"):
        tower(folders["mistral", "published"]).embed(torch.zeros(shape))
