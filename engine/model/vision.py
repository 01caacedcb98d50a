"""The tower that turns an image into embeddings for the text model: Pixtral's, a patch merger, a projector.

    patches = norm(conv(pixels));  h = x + attention(norm(x));  x' = h + mlp(norm'(h))
    embeddings = w2(gelu(w1(merge(norm(x_last)))))

Patches of one image see one another, and no other image's: images go one by one, so that what comes of one does not
depend on those beside it. Every rank holds the whole tower. Letters: T patches of an image, H heads of width d.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cierzo.engine.model.config import ModelConfig, VisionConfig
from cierzo.engine.parameters import MatrixRequest, Parameter, Parameters, ParameterSpec, as_tensor
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops import linear, norm, rope, vision

TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."
MLP_ROWS = (
    2048  # patches that the MLP, the widest of a layer, takes at a time; each has the same bits in any company
)


@dataclass(frozen=True, slots=True, eq=False)
class TowerLayer:
    """A layer's weights. norm, mlp_norm [D]; qkv [3D,D], queries above keys above values; output [D,D]; gate_up
    [2F,D], the gate above; down [D,F]."""

    norm: Tensor
    qkv: Matrix
    output: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True, eq=False)
class Projector:
    """Weights of what follows the tower. norm [D]; merge [D, D merge^2]; first [N,D], second [N,N], N being the
    text's width."""

    norm: Tensor
    merge: Matrix
    first: Matrix
    second: Matrix


class VisionTower:
    """A tower on one rank, ready to run. Parameters are used where they lie and never written."""

    def __init__(
        self, config: VisionConfig, patches: Matrix, first_norm: Tensor, layers: list[TowerLayer], after: Projector
    ) -> None:
        """patches: [D, 3 patch^2], a pixel's channel before its place."""
        self.config = config
        self._patches = patches
        self._first_norm = first_norm
        self._layers = layers
        self._projector = after
        self._inv_freq = rope.default_inv_freq(config.head_dim, config.rope_theta).to(first_norm.device)

    def embed(self, pixels: Tensor) -> Tensor:
        """An image's embeddings, a row for each of its merged tokens, row by row -> [height * width, text's width].

        pixels: fp32 [height * unit, width * unit, 3], normalised, unit being `config.unit_px`; carried to the
        tower's device and dtype. Raises ValueError for another shape.
        """
        *_, embeddings = self.stages(pixels)
        assert embeddings is not None, "the last stage gives them"
        return embeddings

    @torch.inference_mode()
    def stages(self, pixels: Tensor) -> Iterator[Tensor | None]:
        """Embed an image bit by bit, for who has other work meanwhile: a stage for each layer, None, but for the
        last one, which gives the embeddings, as `embed` does. Stages of several images may take turns."""
        unit, patch = self.config.unit_px, self.config.patch
        if (
            pixels.dim() != 3
            or pixels.shape[2] != 3
            or not pixels.numel()
            or any(s % unit for s in pixels.shape[:2])
        ):
            raise ValueError(f"pixels are {list(pixels.shape)}, must be [rows * {unit}, columns * {unit}, 3]")
        rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
        pixels = pixels.to(self._first_norm.device, self._first_norm.dtype)
        cut = pixels.view(rows, patch, columns, patch, 3).permute(0, 2, 4, 1, 3).reshape(rows * columns, -1)
        residual = norm.rms_norm(linear.linear(cut, self._patches), self._first_norm, self.config.norm_eps)
        tables, (*before, last) = self._tables(rows, columns), self._layers
        x: Tensor | None = None
        for layer in before:
            x = self._layer(layer, x, residual, *tables)
            yield None
        yield self._project(self._layer(last, x, residual, *tables), residual, rows, columns)

    def _tables(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """cos and sin of each patch, fp32 [T,d/2]: even frequencies turn by its row, odd ones by its column."""
        device = self._inv_freq.device
        down = torch.arange(rows, device=device).repeat_interleave(columns)
        across = torch.arange(columns, device=device).repeat(rows)
        halves = rope.rope_tables(down, self._inv_freq[0::2]), rope.rope_tables(across, self._inv_freq[1::2])
        cos, sin = (torch.cat(pair, dim=1) for pair in zip(*halves, strict=True))
        return cos, sin

    def _layer(self, layer: TowerLayer, x: Tensor | None, residual: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Add x to the residual and run a layer, but for the addition of its result [T,D]."""
        heads, eps = self.config.num_heads, self.config.norm_eps
        normed = (
            norm.rms_norm(residual, layer.norm, eps)
            if x is None
            else norm.add_rms_norm(x, residual, layer.norm, eps)
        )
        qkv = linear.linear(normed, layer.qkv).unflatten(1, (3 * heads, -1))
        rope.apply_rope(qkv[:, : 2 * heads], cos, sin, interleaved=False)
        q, keys, values = qkv.split(heads, dim=1)
        attended = vision.image_attention(q, keys, values, self.config.head_dim**-0.5)
        x = linear.linear(attended.flatten(1), layer.output)
        normed = norm.add_rms_norm(x, residual, layer.mlp_norm, eps)
        pieces = [linear.gated_mlp(piece, layer.gate_up, layer.down) for piece in normed.split(MLP_ROWS)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _project(self, x: Tensor, residual: Tensor, rows: int, columns: int) -> Tensor:
        """Patches [T,D] -> embeddings of merged tokens. The values of the patches that become one lie channel by
        channel."""
        after, side = self._projector, self.config.merge
        normed = norm.add_rms_norm(x, residual, after.norm, self.config.projector_norm_eps)
        grid = normed.view(rows // side, side, columns // side, side, -1).permute(0, 2, 4, 1, 3)
        merged = linear.linear(grid.reshape(rows * columns // side**2, -1), after.merge)
        return linear.linear(vision.gelu(linear.linear(merged, after.first)), after.second)


def specs(config: VisionConfig, text_width: int) -> dict[str, ParameterSpec]:
    """Parameters of tower and projector, as Mistral 3 is published with them."""
    hidden, width, heads = config.hidden_size, config.mlp_width, config.num_heads
    one, square = ParameterSpec((hidden,)), ParameterSpec((hidden, hidden))
    turned, wide = ParameterSpec((hidden, hidden), rotated_heads=heads), ParameterSpec((width, hidden))
    layer = {
        "attention_norm.weight": one,
        "attention.q_proj.weight": turned,
        "attention.k_proj.weight": turned,
        "attention.v_proj.weight": square,
        "attention.o_proj.weight": square,
        "ffn_norm.weight": one,
        "feed_forward.gate_proj.weight": wide,
        "feed_forward.up_proj.weight": wide,
        "feed_forward.down_proj.weight": ParameterSpec((hidden, width)),
    }
    found = {
        TOWER + "patch_conv.weight": ParameterSpec((hidden, 3, config.patch, config.patch)),
        TOWER + "ln_pre.weight": one,
    }
    for number in range(config.num_layers):
        found |= {f"{TOWER}transformer.layers.{number}.{name}": spec for name, spec in layer.items()}
    return found | {
        PROJECTOR + "norm.weight": one,
        PROJECTOR + "patch_merger.merging_layer.weight": ParameterSpec((hidden, hidden * config.merge**2)),
        PROJECTOR + "linear_1.weight": ParameterSpec((text_width, hidden)),
        PROJECTOR + "linear_2.weight": ParameterSpec((text_width, text_width)),
    }


def build(config: ModelConfig, parameters: Parameters) -> VisionTower | None:
    """The tower of a model that has one."""
    if config.vision is None:
        return None
    own, after = parameters.within(TOWER), parameters.within(PROJECTOR)
    layers = [
        _tower_layer(own.within(f"transformer.layers.{number}.")) for number in range(config.vision.num_layers)
    ]
    projector = Projector(
        after["norm.weight"],
        after.matrix("patch_merger.merging_layer.weight", role="vision"),
        after.matrix("linear_1.weight", role="vision"),
        after.matrix("linear_2.weight", role="vision"),
    )
    return VisionTower(config.vision, _patches(own), own["ln_pre.weight"], layers, projector)


def _tower_layer(own: Parameters) -> TowerLayer:
    return TowerLayer(
        norm=own["attention_norm.weight"],
        qkv=own.matrix(*(f"attention.{name}_proj.weight" for name in "qkv"), role="vision"),
        output=own.matrix("attention.o_proj.weight", role="vision"),
        mlp_norm=own["ffn_norm.weight"],
        gate_up=own.matrix(
            *(f"feed_forward.{name}_proj.weight" for name in ("gate", "up")), paired=True, role="vision"
        ),
        down=own.matrix("feed_forward.down_proj.weight", role="vision"),
    )


def _patches(own: Parameters) -> Matrix:
    """The convolution, whose kernels do not overlap, as a product."""
    stored = own.stored("patch_conv.weight")
    shape = (stored.shape[0], stored.shape[1] * stored.shape[2] * stored.shape[3])
    return own.derived(MatrixRequest("patch_conv", shape, partial(_flat, stored), role="vision", parts=(stored,)))


def _flat(stored: Parameter) -> Tensor:
    return as_tensor(stored).flatten(1)
