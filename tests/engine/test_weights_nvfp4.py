"""Loading NVFP4 checkpoints' tensors, against their definition in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.weights.quantised import Nvfp4Matrix, StoredParameter, pack_parameter
from cierzo.kernels.formats.definition import unpack
from cierzo.kernels.formats.packed import PackedMatrix, empty_packed, packed_bytes, view_packed
from cierzo.kernels.pack import pack

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


class Checkpoint:
    """Random codes and scales by name, and their weights as compressed-tensors defines them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(0)

    def add(self, name: str, n: int, k: int, divisor: float) -> Tensor:
        codes = torch.randint(0, 256, (n, k // 2), generator=self.random, dtype=torch.uint8)
        scales = torch.randint(0, 0x7F, (n, k // 16), generator=self.random, dtype=torch.uint8)
        self.tensors[f"{name}.weight_packed"] = codes
        self.tensors[f"{name}.weight_scale"] = scales.view(torch.float8_e4m3fn)
        self.tensors[f"{name}.weight_global_scale"] = torch.tensor([divisor])
        columns = torch.stack([codes % 16, codes // 16], 2).flatten(1)
        values = torch.tensor(VALUES, dtype=torch.float64)[columns.long()].unflatten(1, (-1, 16))
        return (values * scales.view(torch.float8_e4m3fn).double()[..., None] / divisor).flatten(1)

    def read(self, name: str) -> Nvfp4Matrix:
        endings = ("weight_packed", "weight_scale", "weight_global_scale")
        return Nvfp4Matrix(name, *(self.tensors[f"{name}.{ending}"] for ending in endings))


def load(experts: list[list[Nvfp4Matrix]], dtype: torch.dtype, paired: bool = False) -> PackedMatrix:
    parameter = StoredParameter(tuple(map(tuple, experts)), True, dtype, torch.device("cpu"))
    data = empty_packed(len(experts) * packed_bytes("nvfp4", *parameter.shape[1:], paired))
    pack_parameter(parameter, "nvfp4", paired, data)
    return view_packed("nvfp4", parameter.shape, dtype, paired, data)


@pytest.mark.parametrize(("width", "k"), [(16, 32), (5, 48), (37, 16), (64, 96)])
def test_codes_and_scales_are_kept(width: int, k: int) -> None:
    checkpoint, experts, expected = Checkpoint(), [], []
    for expert in range(3):
        gate, up = (checkpoint.add(f"{expert}.{w}", width, k, 3.7 + expert + len(w)) for w in ("w1", "w03"))
        experts.append([checkpoint.read(f"{expert}.w1"), checkpoint.read(f"{expert}.w03")])
        expected.append(torch.cat([gate, up]))
    for paired in (False, True):
        packed = load(experts, torch.bfloat16, paired)
        assert packed.shape == (3, 2 * width, k)
        assert packed.dtype == torch.bfloat16
        torch.testing.assert_close(unpack(packed, torch.float64), torch.stack(expected), rtol=2e-7, atol=0)


def test_packing_the_loaded_weights_changes_nothing() -> None:
    """Where a row's largest weight has the largest code and scale, as quantisers see to it."""
    checkpoint = Checkpoint()
    checkpoint.add("w", 40, 64, 1.0)
    checkpoint.tensors["w.weight_packed"][:, 8 * 3] = 0x77  # 6, 6
    checkpoint.tensors["w.weight_scale"].view(torch.uint8)[:, 3] = 0x7E  # 448
    checkpoint.tensors["w.weight_packed"][:, ::8] |= 0x07  # a 6 in each group, else a smaller scale would do
    packed = load([[checkpoint.read("w")]], torch.float32)
    assert torch.equal(unpack(pack(unpack(packed), "nvfp4")), unpack(packed))


def test_what_does_not_fit_is_named() -> None:
    checkpoint = Checkpoint()
    for name in "ab":
        checkpoint.add(name, 8, 32, 1.0)
    scales = checkpoint.tensors["a.weight_scale"].view(torch.uint8)
    for code in (0x7F, 0x81):
        scales[3, 1] = code
        with pytest.raises(CheckpointError, match="a: a scale is NaN or negative"):
            checkpoint.read("a").values(torch.float32)
        with pytest.raises(CheckpointError, match="a: a scale is NaN or negative"):
            load([[checkpoint.read("a")]], torch.float32)
    for divisor in (0.0, -1.0, math.nan, math.inf):
        checkpoint.tensors["b.weight_global_scale"] = torch.tensor([divisor])
        with pytest.raises(CheckpointError, match="b: global scale"):
            load([[checkpoint.read("b")]], torch.float32)
