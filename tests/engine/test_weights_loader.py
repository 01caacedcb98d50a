"""Loading accounts for every tensor, and the ranks' slices are the whole."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import ParameterSpec, as_tensor
from cierzo.engine.weights.loader import load_parameters, rank_ranges
from cierzo.engine.weights.reader import CheckpointReader

EXPERTS, WIDTH, HIDDEN = 4, 6, 8
LAYER = "model.layers.0."
SPECS = {
    "model.embed_tokens.weight": ParameterSpec((10, HIDDEN)),
    LAYER + "self_attn.q_b_proj.weight": ParameterSpec((12, HIDDEN), shard_axis=0),
    LAYER + "self_attn.o_proj.weight": ParameterSpec((HIDDEN, 12), shard_axis=1),
    LAYER + "mlp.experts.gate_up_proj": ParameterSpec((EXPERTS, 2 * WIDTH, HIDDEN), shard_axis=1, sections=2),
    LAYER + "mlp.experts.down_proj": ParameterSpec((EXPERTS, HIDDEN, WIDTH), shard_axis=2),
    "lm_head.weight": ParameterSpec((10, HIDDEN), shard_axis=0),
}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(spec.shape, generator=generator).to(dtype) for name, spec in SPECS.items()}


def one_by_one(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same checkpoint, each expert's matrices apart."""
    stored = dict(stored)
    gate_up, down = (stored.pop(f"{LAYER}mlp.experts.{name}") for name in ("gate_up_proj", "down_proj"))
    for expert in range(EXPERTS):
        matrices = {"gate": gate_up[expert, :WIDTH], "up": gate_up[expert, WIDTH:], "down": down[expert]}
        for name, matrix in matrices.items():
            stored[f"{LAYER}mlp.experts.{expert}.{name}_proj.weight"] = matrix.contiguous()
    return stored


def checkpoint(folder: Path, stored: dict[str, Tensor]) -> Path:
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def load(folder: Path, specs: dict[str, ParameterSpec] = SPECS, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    with CheckpointReader(folder) as reader:
        found = load_parameters(reader, specs, dtype=torch.float32, device="cpu", rank=rank, world=world)
        return {name: as_tensor(parameter) for name, parameter in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_loads_what_is_stored_without_copying_it(tmp_path: Path) -> None:
    stored = tensors()
    found = load(checkpoint(tmp_path, stored))
    assert_same(found, stored)
    mapped = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tmp_path) in line
    ]
    for tensor in found.values():
        address = tensor.data_ptr()
        assert any(int(low, 16) <= address < int(high, 16) for low, high in mapped)


def test_casts_to_the_dtype_asked_for(tmp_path: Path) -> None:
    stored = tensors(torch.bfloat16)
    found = load(checkpoint(tmp_path, stored))
    assert_same(found, {name: tensor.float() for name, tensor in stored.items()})


@pytest.mark.parametrize(
    ("text", "head"),
    [("model.", ""), ("language_model.model.", "language_model."), ("model.language_model.", "")],
)
def test_prefixes_of_multimodal_checkpoints(tmp_path: Path, text: str, head: str) -> None:
    stored = tensors()
    renamed = {
        (text + name.removeprefix("model.") if name.startswith("model.") else head + name): tensor
        for name, tensor in stored.items()
    }
    assert_same(load(checkpoint(tmp_path, renamed)), stored)


def test_vision_tensors_are_left_aside_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = tensors()
    more = ("vision_tower.ln_pre.weight", "model.multi_modal_projector.norm.weight")
    folder = checkpoint(tmp_path, stored | {name: torch.ones(1) for name in more})
    assert_same(load(folder), stored)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{folder}: images are not served: 2 tensors, 8 bytes, are left aside"


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    stored = tensors()
    assert_same(
        load(checkpoint(tmp_path, stored | {LAYER + "self_attn.rotary_emb.inv_freq": torch.ones(4)})), stored
    )


def test_experts_stored_one_by_one_are_stacked(tmp_path: Path) -> None:
    stored = tensors()
    assert_same(load(checkpoint(tmp_path, one_by_one(stored))), stored)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_slices_are_the_whole(tmp_path: Path, apart: bool, world: int) -> None:
    stored = tensors()
    specs = SPECS | {"lm_head.weight": ParameterSpec((10, HIDDEN), shard_axis=0 if world == 2 else None)}
    folder = checkpoint(tmp_path, one_by_one(stored) if apart else stored)
    ranks = [load(folder, specs, rank, world) for rank in range(world)]
    for name, spec in specs.items():
        pieces = [rank[name] for rank in ranks]
        assert all(piece.is_contiguous() for piece in pieces)
        if spec.shard_axis is None:
            assert all(torch.equal(piece, stored[name]) for piece in pieces)
            continue
        sections = [piece.chunk(spec.sections, spec.shard_axis) for piece in pieces]
        joined = [torch.cat(section, spec.shard_axis) for section in zip(*sections, strict=True)]
        assert torch.equal(torch.cat(joined, spec.shard_axis), stored[name]), name


@pytest.mark.parametrize("apart", [False, True])
def test_experts_can_be_divided_whole(tmp_path: Path, apart: bool) -> None:
    stored = tensors()
    name = LAYER + "mlp.experts.gate_up_proj"
    specs = SPECS | {name: ParameterSpec(SPECS[name].shape, shard_axis=0)}
    folder = checkpoint(tmp_path, one_by_one(stored) if apart else stored)
    assert torch.equal(load(folder, specs, rank=1, world=2)[name], stored[name][2:])


def test_a_rank_takes_its_share_of_every_section() -> None:
    spec = ParameterSpec((16, 3), shard_axis=0, sections=2)
    assert rank_ranges(spec, 1, 2) == [(4, 8), (12, 16)]
    with pytest.raises(ValueError, match="no integer"):
        rank_ranges(spec, 0, 3)
    with pytest.raises(ValueError, match="rank 2"):
        rank_ranges(spec, 2, 2)


WRONG: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({"lm_head.weight": None}, "tensor lm_head.weight is missing"),
    "two missing": (
        {"lm_head.weight": None, "model.embed_tokens.weight": None},
        r"tensor model.embed_tokens.weight is missing \(and 1 more\)",
    ),
    "left over": ({"model.norm.bias": torch.ones(2)}, "tensor model.norm.bias has no place in this model"),
    "misshapen": (
        {"lm_head.weight": torch.ones(HIDDEN, 10)},
        r"lm_head.weight: shape \[8, 10\], expected \[10, 8\]",
    ),
    "integers": (
        {"lm_head.weight": torch.ones(10, HIDDEN, dtype=torch.int32)},
        "lm_head.weight: dtype I32, expected one of F64, F32, F16, BF16",
    ),
    "two spellings": (
        {"language_model.lm_head.weight": torch.ones(10, HIDDEN)},
        "lm_head.weight and .*lm_head.weight are the same parameter",
    ),
}
WRONG_APART: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": (
        {LAYER + "mlp.experts.2.up_proj.weight": None},
        f"{LAYER}mlp.experts.gate_up_proj: part 1 of expert 2 is missing",
    ),
    "one too many": (
        {LAYER + "mlp.experts.4.down_proj.weight": torch.ones(HIDDEN, WIDTH)},
        "experts.4.down_proj.weight: there are 4 experts only",
    ),
    "misshapen": (
        {LAYER + "mlp.experts.1.gate_proj.weight": torch.ones(WIDTH + 1, HIDDEN)},
        r"experts.1.gate_proj.weight: shape \[7, 8\], expected \[6, 8\]",
    ),
    "fused as well": (
        {LAYER + "mlp.experts.down_proj": torch.ones(EXPERTS, HIDDEN, WIDTH)},
        r"experts.0.down_proj.weight has no place in this model \(and 3 more\)",
    ),
}


@pytest.mark.parametrize(
    ("apart", "case"), [*((False, case) for case in WRONG), *((True, case) for case in WRONG_APART)]
)
def test_a_wrong_tensor_is_refused_by_name(tmp_path: Path, apart: bool, case: str) -> None:
    changes, message = (WRONG_APART if apart else WRONG)[case]
    stored = (one_by_one(tensors()) if apart else tensors()) | changes
    folder = checkpoint(tmp_path, {name: tensor for name, tensor in stored.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_tied_embeddings_have_no_head_to_load(tmp_path: Path) -> None:
    stored = tensors()
    specs = {name: spec for name, spec in SPECS.items() if name != "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has no place"):
        load(checkpoint(tmp_path, stored), specs)


def test_a_tied_parameter_is_left_out_unless_it_has_values_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Many checkpoints keep the head beside the embeddings that it is tied to, some by mistake another one."""
    stored, name = tensors(), "model.embed_tokens.weight"
    specs = SPECS | {"lm_head.weight": ParameterSpec((10, HIDDEN), shard_axis=0, tied_to=name)}
    expected = {key: stored[key] for key in specs if key != "lm_head.weight"}
    assert_same(load(checkpoint(tmp_path, expected), specs), expected)
    stored["lm_head.weight"] = stored[name].clone()
    assert_same(load(checkpoint(tmp_path, stored), specs), expected)
    assert "tie_word_embeddings" not in caplog.text
    stored["lm_head.weight"][9, 7] += 1
    assert_same(load(checkpoint(tmp_path, stored), specs), stored)
    assert_same(
        load(tmp_path, specs, rank=1, world=2),
        load(tmp_path, SPECS, rank=1, world=2),
    )
    assert "ties lm_head.weight to model.embed_tokens.weight (tie_word_embeddings)" in caplog.text
    with pytest.raises(CheckpointError, match=r"tensor model\.embed_tokens\.weight is missing"):
        load(checkpoint(tmp_path, {key: tensor for key, tensor in stored.items() if key != name}), specs)


def test_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    stored = tensors()
    with CheckpointReader(checkpoint(tmp_path, one_by_one(stored))) as reader:
        load_parameters(
            reader,
            SPECS,
            dtype=torch.float32,
            device="cpu",
            progress=lambda done, total: seen.append((done, total)),
        )
    total_bytes = sum(tensor.nbytes for tensor in stored.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total_bytes, total_bytes)


def test_ctrl_c_in_the_middle_leaves_nothing_open(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tensors())
    before = os.listdir("/proc/self/fd")

    def interrupt(done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), CheckpointReader(folder) as reader:
        load_parameters(reader, SPECS, dtype=torch.float32, device="cpu", progress=interrupt)
    assert os.listdir("/proc/self/fd") == before
    assert str(folder) not in Path("/proc/self/maps").read_text()
