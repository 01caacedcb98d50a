"""Small random models that compressed-tensors itself compresses, and decompresses again.

Its compressors pack every matrix, its `QuantizationConfig` writes the config, and `plain` holds what it makes of
the packed matrices: nothing of the engine takes part but the shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import published
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
from safetensors.torch import save_file
from torch import Tensor

from cierzo.engine.parameters import Parameter, as_tensor
from cierzo.engine.weights.shapes import Shape, Small3Shape

SMALL4 = replace(published.SMALL4, q_lora_rank=64, expert_width=64)
SMALL3 = Small3Shape(
    vocab_size=192, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=256
)
FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float"}
STATIC_FP8 = {**FP8, "strategy": "tensor", "dynamic": False}
TOKEN = {"strategy": "token", "dynamic": True}
# Name -> format, arguments of the weights, arguments of the activations.
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "fp8-static": ("float-quantized", {**FP8, "strategy": "tensor"}, STATIC_FP8),
    "fp8-dynamic": ("float-quantized", {**FP8, "strategy": "channel"}, {**FP8, **TOKEN}),
    "fp8-weights": ("naive-quantized", {**FP8, "strategy": "channel"}, None),
    "fp8-block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [128, 128]}, {**FP8, **TOKEN}),
    "fp8-small-block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [20, 24]}, None),
    "fp8-group": ("float-quantized", {**FP8, "strategy": "group", "group_size": 32}, None),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, **TOKEN}),
    "w8a8-static": (
        "int-quantized",
        {"num_bits": 8, "strategy": "tensor"},
        {"num_bits": 8, "strategy": "tensor", "dynamic": False},
    ),
    "w8a8-asymmetric": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, None),
    "w8a16": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, None),
    "w4a16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "w4a16-128": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}, None),
    "w4a16-channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, None),
    "w4a16-asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        None,
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {**FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
        {**FP4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        None,
    ),
}


class Compressed:
    """A model whose matrices are compressed. `stored`, `config`: what is written; `plain`: what compressed-tensors
    makes of it, in the dtype that it makes.

    scheme: of all matrices, or of the targets that name them. scale_dtype: of scales that are numbers of their own.
    """

    def __init__(
        self,
        shape: Shape,
        scheme: str | Mapping[str, str],
        *,
        scale_dtype: torch.dtype = torch.float32,
        ignore: tuple[str, ...] = ("lm_head",),
        seed: int = 0,
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.scale_dtype = scale_dtype
        self.stored: dict[str, Tensor] = {}
        self.plain: dict[str, Tensor] = {}
        self.base: dict[str, Any] = dict(shape.config("float32"))
        of_targets = {"Linear": scheme} if isinstance(scheme, str) else dict(scheme)
        self.schemes = {target: make_scheme(name, target) for target, name in of_targets.items()}
        for name, sizes in shape.tensors():
            self._add(name, sizes)
        formats = {str(one.format) for one in self.schemes.values()}
        config = QuantizationConfig(
            config_groups={f"group_{number}": one for number, one in enumerate(self.schemes.values())},
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status="compressed",
            ignore=list(ignore),
        )
        self.config: dict[str, Any] = {**self.base, "quantization_config": json.loads(config.model_dump_json())}

    @property
    def quantisation(self) -> dict[str, Any]:
        """The quantization_config, to be changed."""
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    def write(self, folder: Path) -> Path:
        """The checkpoint."""
        folder.mkdir(exist_ok=True)
        save_file(self.stored, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    def write_plain(self, folder: Path, dtype: torch.dtype) -> Path:
        """Weights as compressed-tensors decompressed them, in the layout of transformers."""
        folder.mkdir(exist_ok=True)
        values = {name: tensor.to(dtype).contiguous() for name, tensor in self.plain.items()}
        save_file(values, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.base))
        return folder

    def _add(self, name: str, sizes: tuple[int, ...]) -> None:
        stem = name.removesuffix(".weight")
        if len(sizes) == 3:
            parts = ("gate_proj", "up_proj") if stem.endswith("gate_up_proj") else ("down_proj",)
            outer, _, _ = stem.rpartition(".")
            experts = [
                [self._matrix(f"{outer}.{expert}.{part}", sizes[1] // len(parts), sizes[2]) for part in parts]
                for expert in range(sizes[0])
            ]
            self.plain[name] = torch.stack([torch.cat(matrices) for matrices in experts])
        elif len(sizes) == 1:
            self._keep(name, torch.rand(sizes, generator=self.random) + 0.5)
        elif stem.endswith(("embed_tokens", "lm_head", "mlp.gate")):
            self._keep(name, self._normal(*sizes))
        else:
            self.plain[name] = self._matrix(stem, *sizes)

    def _keep(self, name: str, values: Tensor) -> None:
        self.stored[name] = values.bfloat16()
        self.plain[name] = self.stored[name].float()

    def _matrix(self, module: str, n: int, k: int) -> Tensor:
        """Compress a matrix, and give what becomes of it; one that no target names is kept."""
        last = module.rpartition(".")[2]
        scheme = next((one for target, one in self.schemes.items() if target in ("Linear", f"re:.*{last}$")), None)
        if scheme is None:
            self._keep(f"{module}.weight", self._normal(n, k))
            return self.plain.pop(f"{module}.weight")
        compressed, values = compress(self._normal(n, k), scheme, self.scale_dtype)
        if scheme.input_activations is not None and str(scheme.format) == "nvfp4-pack-quantized":
            dtype = torch.bfloat16 if "shared" in module else torch.float32
            compressed["input_global_scale"] = torch.tensor([7.0], dtype=dtype)
        elif scheme.input_activations is not None and not scheme.input_activations.dynamic:
            compressed["input_scale"] = torch.rand(1, generator=self.random) + 0.25
        self.stored |= {f"{module}.{ending}": tensor.contiguous() for ending, tensor in compressed.items()}
        return values

    def _normal(self, n: int, k: int) -> Tensor:
        """Values whose rows and columns differ in size, so that a scale in the wrong place shows."""
        values = torch.randn(n, k, generator=self.random) * 0.05
        return values * torch.exp2(torch.randint(-2, 3, (n, 1), generator=self.random).float())


def assert_same(found: dict[str, Parameter], model: Compressed) -> None:
    """Bit for bit, in the dtype that compressed-tensors decompresses to."""
    assert found.keys() == model.plain.keys()
    for key, wanted in model.plain.items():
        assert torch.equal(as_tensor(found[key]).to(wanted.dtype), wanted), key


def make_scheme(name: str, target: str = "Linear") -> QuantizationScheme:
    """The scheme of this name, for a target."""
    format, weights, activations = SCHEMES[name]
    return QuantizationScheme(
        targets=[target],
        weights=QuantizationArgs(**weights),
        input_activations=None if activations is None else QuantizationArgs(**activations),
        format=format,
    )


def compress(
    weight: Tensor, scheme: QuantizationScheme, scale_dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that compressed-tensors stores of a weight, and the weight that it decompresses them to."""
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    args = scheme.weights
    low, high = _extremes(weight, args)
    whole = generate_gparam(weight.min(), weight.max()) if args.strategy == "tensor_group" else None
    scale, zero_point = calculate_qparams(low, high, args, global_scale=whole)
    if args.scale_dtype is None:
        scale = scale.to(scale_dtype)
    state = {"weight": weight, "weight_scale": scale}
    if not args.symmetric:
        state["weight_zero_point"] = zero_point
    if whole is not None:
        state["weight_global_scale"] = whole
    compressed = compressor.compress(state, scheme)
    return compressed, compressor.decompress(compressed, scheme)["weight"].detach()


def _extremes(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """The least and the greatest value under each scale."""
    match args.strategy:
        case "tensor":
            return weight.min().reshape(1), weight.max().reshape(1)
        case "channel":
            return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "block":
            rows, columns = args.block_structure
            padded = maybe_pad_tensor_for_block_quant(weight, (rows, columns))
            blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
            return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(1, (-1, args.group_size))
    return groups.amin(2), groups.amax(2)
