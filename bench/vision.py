"""`python -m cierzo.bench.vision`: the vision tower's time for an image, beside transformers' in the same run.

Both see the same images with the same random weights, in turn, so that a machine that is busy for a while is so for
both; what each gives is compared. Text models are left out: an image's embeddings are what is measured.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import msgspec
import torch
from torch import Tensor

from cierzo.bench.campaign.table import grid_of, text
from cierzo.bench.context import resident_gb
from cierzo.bench.report import Recording, progress, run_benchmark
from cierzo.engine.errors import ConfigError
from cierzo.engine.fields import Fields
from cierzo.engine.model import vision
from cierzo.engine.model.config_json import parse_config
from cierzo.engine.options import positive
from cierzo.engine.parameters import MatrixRequest, Parameters, PlainMatrices, as_tensor
from cierzo.engine.weights.shapes import shape_of
from cierzo.engine.weights.vision_shapes import VisionShape, vision_shape_of
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.cpu.tensors import as_packed
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.registry import bind

PROGRAM = "cierzo.bench.vision"
SIZES = ("640x480", "1024x1024", "1540x1540")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
See = Callable[[Tensor], Tensor]  # pixels [height, width, 3] -> embeddings [tokens, text's width]


class ImageRow(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that an image takes, ours and transformers', each run's. error: root mean square of what differs,
    relative to transformers' embeddings."""

    width: int
    height: int
    tokens: int
    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]
    error: float
    resident_gb: float

    @property
    def megapixels(self) -> float:
        """Size of the image."""
        return self.width * self.height / 1e6

    @property
    def ratio(self) -> float:
        """How many times as fast ours is, by medians."""
        return median(self.theirs_s) / median(self.ours_s)


class Packed(PlainMatrices):
    """Gives matrices in the order of the CPU kernels, if there are any."""

    def matrix(self, request: MatrixRequest) -> Matrix:
        """See MatrixSource."""
        values = as_tensor(request.make())
        return as_packed(values, request.paired).packed if native.available() else values


def measure(ours: See, theirs: See, width: int, height: int, repeats: int) -> ImageRow:
    """Measure a random image, `repeats` times by each in turn, after one that warms up and is compared."""
    pixels = torch.randn(height, width, 3, generator=torch.Generator().manual_seed(width))
    expected, found = theirs(pixels).float(), ours(pixels).float()
    error = ((found - expected).square().mean() / expected.square().mean()).sqrt()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for see, taken in zip((ours, theirs), seconds, strict=True):
            begin = time.perf_counter()
            see(pixels)
            taken.append(time.perf_counter() - begin)
    return ImageRow(
        width=width,
        height=height,
        tokens=len(expected),
        ours_s=tuple(seconds[0]),
        theirs_s=tuple(seconds[1]),
        error=float(error),
        resident_gb=resident_gb(),
    )


def towers(shape: VisionShape, text_width: int, dtype: torch.dtype) -> tuple[See, See]:
    """Our tower and transformers', with the same random weights."""
    outer = shape.around(shape_of("small4", "tiny").config("bfloat16") | {"hidden_size": text_width})
    config = parse_config(Fields(outer))
    assert config.vision is not None
    random, weights = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name, spec in vision.specs(config.vision, text_width).items():
        values = torch.randn(spec.shape, generator=random) / math.prod(spec.shape[1:]) ** 0.5
        weights[name] = (values if len(spec.shape) > 1 else torch.ones(spec.shape)).to(dtype)  # norms are vectors
    tower = vision.build(config, Parameters(weights, Packed()))
    assert tower is not None
    return tower.embed, _transformers(outer, weights, dtype)


def _transformers(outer: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> See:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("needs transformers beside cierzo: pip install cierzo[test]", field="theirs") from error
    config = transformers.Mistral3Config.from_dict(outer)
    with torch.device("meta"):
        model: Any = transformers.models.mistral3.Mistral3Model(config)
    for part in ("vision_tower", "multi_modal_projector"):
        inner = {name.removeprefix(f"{part}."): one for name, one in weights.items() if name.startswith(part)}
        getattr(model, part).load_state_dict(inner, assign=True)
    # buffers that follow from the config are no part of the weights
    tower = type(model.vision_tower)(config.vision_config).to(dtype)
    tower.load_state_dict(model.vision_tower.state_dict(), assign=True)
    model.vision_tower = tower
    model.eval().requires_grad_(False)

    @torch.inference_mode()
    def see(pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[:2]])
        (found,) = model.get_image_features(pixels.permute(2, 0, 1)[None].to(dtype), sizes).pooler_output
        return found

    return see


def table(rows: Sequence[ImageRow]) -> str:
    """The rows as text, by medians."""
    grid = [
        {
            "image": f"{row.width}x{row.height}",
            "tokens": f"{row.tokens:,}",
            "s": f"{median(row.ours_s):.2f}",
            "s/megapixel": f"{median(row.ours_s) / row.megapixels:.2f}",
            "transformers s": f"{median(row.theirs_s):.2f}",
            "s/megapixel by it": f"{median(row.theirs_s) / row.megapixels:.2f}",
            "times as fast": f"{row.ratio:.2f}",
            "differs by": f"{row.error:.1e}",
        }
        for row in rows
    ]
    return text(grid_of("", grid))


def image_size(word: str) -> tuple[int, int]:
    """ "640x480" -> width and height, up to whole tokens of 28 pixels."""
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", word)
    sides = [-(-int(side) // 28) * 28 for side in found.groups()] if found else [0]
    if not all(0 < side <= 1540 for side in sides):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT of 1 to 1540 pixels, got {word!r}")
    return sides[0], sides[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write JSON if asked; exit status 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0], allow_abbrev=False)
    sizes = [image_size(word) for word in SIZES]
    parser.add_argument("--sizes", type=image_size, nargs="+", default=sizes, metavar="WxH", help="in pixels")
    parser.add_argument("--scale", choices=("tiny", "mini", "full"), default="full", help="of the tower")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of weights and activations")
    parser.add_argument("--threads", type=positive, default=None, metavar="N", help="of both; default: torch's")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="runs of each image")
    return run_benchmark(parser, _run, argv)


def _run(arguments: argparse.Namespace) -> int:
    report = Recording("vision", arguments.json, ["python", "-m", PROGRAM, *sys.argv[1:]])
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bind(KernelsConfig(), "cpu")
    text_width = shape_of("small4", arguments.scale).hidden_size
    ours, theirs = towers(vision_shape_of(arguments.scale), text_width, DTYPES[arguments.dtype])
    sizes = progress(arguments.sizes, desc="images")
    rows = [measure(ours, theirs, width, height, arguments.repeats) for width, height in sizes]
    print(table(rows))
    report.write(vars(arguments) | {"json": None}, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
