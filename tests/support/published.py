"""Small random models in the formats that Mistral publishes, and the same weights in plain float32.

Nothing of the engine takes part but the shapes: names, scales, codes and the order of rows are written out here
once more, from the formats' descriptions. `plain` holds what a reader must get out of `stored`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cierzo.engine.weights.shapes import Shape, Small3Shape, Small4Shape

SMALL4 = Small4Shape(
    vocab_size=192,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_experts=5,
    experts_per_token=2,
    expert_width=48,
)
SMALL3 = Small3Shape(
    vocab_size=192, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=96
)


class Ministral3Shape(Small3Shape):
    """A dense model with YaRN, the queries from position 8 on scaled: a dozen tokens go beyond it."""

    def config(self, dtype: str) -> dict[str, object]:
        """config.json."""
        rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8}
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
        own = {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"]}
        parameters = {"rope_parameters": rope | {"llama_4_scaling_beta": 0.5}, "max_position_embeddings": 128}
        return Small3Shape.config(self, dtype) | own | parameters


MINISTRAL3 = Ministral3Shape(
    vocab_size=192, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=96
)
FP8_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "weight_block_size": None,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
}
FP8_PARAMS = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
NVFP4_PARAMS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"},
            "input_activations": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": "local"},
        }
    },
    "ignore": ["lm_head"],
}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
NATIVE = {
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate": "gate",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.shared_experts.gate_proj": "shared_experts.w1",
    "mlp.shared_experts.down_proj": "shared_experts.w2",
    "mlp.shared_experts.up_proj": "shared_experts.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


class Published:
    """One model in one format. `stored`, `config`: what is written; `plain`: the values, under the models' names.

    power_of_two: of all scales, so that bfloat16 holds code * scale.
    """

    def __init__(self, shape: Shape, name: str, *, power_of_two: bool = False, seed: int = 0) -> None:
        self.shape, self.name = shape, name
        self.native = name.startswith("native")
        self.power_of_two = power_of_two
        self.random = torch.Generator().manual_seed(seed)
        self.stored: dict[str, Tensor] = {}
        self.plain: dict[str, Tensor] = {}
        self.base = shape.config("float32")
        add = {"fp8": self._fp8, "nvfp4": self._nvfp4}.get(name.rpartition("-")[2], self._as_it_is)
        for parameter, sizes in shape.tensors():
            self._add(parameter, sizes, add)
        self._add_vision()
        self.config = self._params() if self.native else self._config()

    def write(self, folder: Path) -> Path:
        """The checkpoint."""
        folder.mkdir(exist_ok=True)
        save_file(self.stored, folder / ("consolidated.safetensors" if self.native else "model.safetensors"))
        (folder / ("params.json" if self.native else "config.json")).write_text(json.dumps(self.config))
        return folder

    def write_plain(self, folder: Path, dtype: torch.dtype) -> Path:
        """The same weights in Hugging Face's layout, not quantised; bfloat16 only if it can hold them."""
        folder.mkdir(exist_ok=True)
        values = {name: tensor.to(dtype) for name, tensor in self.plain.items()}
        assert all(torch.equal(values[name].float(), tensor) for name, tensor in self.plain.items())
        save_file(values, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.base))
        return folder

    # ---- how a matrix is stored: (name, n, k) -> its values, float32

    def _as_it_is(self, name: str, n: int, k: int) -> Tensor:
        values = self._normal(n, k).bfloat16()
        self.stored[f"{name}.weight"] = values
        return values.float()

    def _fp8(self, name: str, n: int, k: int) -> Tensor:
        codes, scale, values = self._fp8_values(n, k)
        endings = ("qscale_weight", "qscale_act") if self.native else ("weight_scale_inv", "activation_scale")
        self.stored[f"{name}.weight"] = codes
        self.stored[f"{name}.{endings[0]}"] = scale
        self.stored[f"{name}.{endings[1]}"] = torch.tensor(0.5).bfloat16()
        return values

    def _fp8_values(self, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = self._scale(2.0**-12)
        codes = (self._normal(n, k) / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes, scale, (codes.double() * scale.double()).float()

    def _nvfp4(self, name: str, n: int, k: int) -> Tensor:
        if "experts" not in name:
            return self._as_it_is(name, n, k)
        packed = torch.randint(0, 256, (n, k // 2), generator=self.random, dtype=torch.uint8)
        scales = torch.randint(0x60, 0x7F, (n, k // 16), generator=self.random, dtype=torch.uint8)
        divisor = self._scale(4096.0).float()
        self.stored[f"{name}.weight_packed"] = packed
        self.stored[f"{name}.weight_scale"] = scales.view(torch.float8_e4m3fn)
        self.stored[f"{name}.weight_global_scale"] = divisor[None]
        scale_dtype = torch.bfloat16 if "shared" in name else torch.float32
        self.stored[f"{name}.input_global_scale"] = torch.tensor([7.0], dtype=scale_dtype)
        columns = torch.stack([packed % 16, packed // 16], 2).flatten(1)
        values = torch.tensor(E2M1, dtype=torch.float64)[columns.long()].unflatten(1, (-1, 16))
        return (values * scales.view(torch.float8_e4m3fn).double()[..., None] / divisor.double()).flatten(1).float()

    # ---- what is stored so

    def _add(self, parameter: str, sizes: tuple[int, ...], add: Callable[[str, int, int], Tensor]) -> None:
        stem = parameter.removesuffix(".weight")
        if len(sizes) == 3:
            self._add_experts(parameter, sizes)
            return
        name = self._spelled(stem)
        if len(sizes) == 1:
            values = torch.rand(sizes, generator=self.random).bfloat16() + 0.5
            self.stored[f"{name}.weight"] = values
            self.plain[parameter] = values.float()
            return
        kept = stem.endswith(("embed_tokens", "lm_head", "mlp.gate"))
        values = (self._as_it_is if kept else add)(name, *sizes)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(stem.rpartition(".")[2])
        if self.native and heads is not None:
            values = halves_of_pairs(values, self.base[heads])  # type: ignore[arg-type]
        self.plain[parameter] = values

    def _add_experts(self, parameter: str, sizes: tuple[int, ...]) -> None:
        """[E,n,k]: fused in Hugging Face's layout, where gate and up share a scale; else each with its own."""
        count, n, k = sizes
        if self.native:
            parts = ("w1", "w3") if parameter.endswith("gate_up_proj") else ("w2",)
            add = {"fp8": self._fp8, "nvfp4": self._nvfp4}.get(self.name.rpartition("-")[2], self._as_it_is)
            layer = parameter.split(".")[2]
            experts = [
                [add(f"layers.{layer}.experts.{expert}.{part}", n // len(parts), k) for part in parts]
                for expert in range(count)
            ]
            self.plain[parameter] = torch.stack([torch.cat(matrices) for matrices in experts])
            return
        name = self._spelled(parameter)
        if self.name == "hf":
            values = self._normal(count * n, k).view(count, n, k).bfloat16()
            self.stored[name], self.plain[parameter] = values, values.float()
            return
        codes, scales, values = zip(*(self._fp8_values(n, k) for _ in range(count)), strict=True)
        self.stored[name] = torch.stack([one.view(torch.uint8) for one in codes]).view(torch.float8_e4m3fn)
        self.stored[f"{name}_scale_inv"] = torch.stack(scales).view(count, 1, 1)
        self.stored[f"{name}_activation_scale"] = torch.full((count,), 0.5).bfloat16()
        self.plain[parameter] = torch.stack(values)

    def _add_vision(self) -> None:
        names = (
            ("vision_encoder.ln_pre.weight", "patch_merger.merging_layer.weight", "pre_mm_projector_norm.weight")
            if self.native
            else ("vision_tower.ln_pre.weight", "multi_modal_projector.norm.weight")
        )
        self.stored |= {name: torch.ones(3, dtype=torch.bfloat16) for name in names}

    def _spelled(self, stem: str) -> str:
        if not self.native:
            return f"language_model.{stem}"
        outer = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
        if stem in outer:
            return outer[stem]
        _, _, layer, inner = stem.split(".", 3)
        return f"layers.{layer}.{NATIVE[inner]}"

    def _normal(self, n: int, k: int) -> Tensor:
        return torch.randn(n, k, generator=self.random) * (0.8 / math.sqrt(k))

    def _scale(self, near: float) -> Tensor:
        """0-d bfloat16, near or twice that; another one each time."""
        share = torch.rand((), generator=self.random)
        return (near * (2.0 ** (share > 0.5) if self.power_of_two else 1 + share)).bfloat16()

    def _config(self) -> dict[str, Any]:
        inner = dict(self.base)
        quantised = {} if self.name == "hf" else {"quantization_config": FP8_CONFIG}
        return {"model_type": "mistral3", "text_config": inner, "tie_word_embeddings": False, **quantised}

    def _params(self) -> dict[str, Any]:
        base: Any = self.base
        params: dict[str, Any] = {
            "dim": base["hidden_size"],
            "n_layers": base["num_hidden_layers"],
            "head_dim": base["head_dim"],
            "hidden_dim": base["intermediate_size"],
            "n_heads": base["num_attention_heads"],
            "n_kv_heads": base["num_key_value_heads"],
            "rope_theta": base["rope_parameters"]["rope_theta"],
            "norm_eps": base["rms_norm_eps"],
            "vocab_size": base["vocab_size"],
            "tied_embeddings": False,
            "max_position_embeddings": base["max_position_embeddings"],
            "vision_encoder": {"hidden_size": 1024},
        }
        if isinstance(self.shape, Ministral3Shape):
            rope = base["rope_parameters"]
            original = {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
            params["llama_4_scaling"] = {**original, "beta": rope["llama_4_scaling_beta"]}
            params["yarn"] = {**original, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1}
        if isinstance(self.shape, Small4Shape):
            params |= {
                name: base[name]
                for name in base
                if name.startswith(("q_lora", "kv_lora", "qk_nope", "qk_rope", "v_h"))
            }
            params["llama_4_scaling"] = {"original_max_position_embeddings": 8192, "beta": 0.1}
            params["yarn"] = {
                "original_max_position_embeddings": 8192,
                "factor": 128,
                "apply_scale": False,
                "beta": 32,
                "alpha": 1,
            }
            params["moe"] = {
                "expert_parallel": 1,
                "route_every_n": 1,
                "first_k_dense_replace": 0,
                "num_experts": base["n_routed_experts"],
                "num_experts_per_tok": base["num_experts_per_tok"],
                "num_expert_groups": 1,
                "num_expert_groups_per_tok": 1,
                "routed_scale": 1.0,
                "expert_hidden_dim": base["moe_intermediate_size"],
                "num_shared_experts": 1,
            }
        scheme = {"native-fp8": FP8_PARAMS, "native-nvfp4": NVFP4_PARAMS}.get(self.name)
        return params if scheme is None else params | {"quantization": scheme}


def halves_of_pairs(values: Tensor, heads: int) -> Tensor:
    """Rows in the order of rotary pairs (2i, 2i+1) -> (i, i + d/2), head by head and row by row."""
    return torch.stack([values[row] for row in _pair_rows(len(values), heads)])


def _pair_rows(rows: int, heads: int) -> Iterator[int]:
    width = rows // heads
    for head in range(heads):
        yield from (head * width + 2 * pair for pair in range(width // 2))
        yield from (head * width + 2 * pair + 1 for pair in range(width // 2))
