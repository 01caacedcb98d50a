"""Random checkpoints in the shape of Mistral Small 4 or Small 3, for tests and benchmarks.

Prompts are token ids, unless a tokenizer is written too. Their output means nothing, and costs what the real one
costs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cierzo.engine.errors import refusal
from cierzo.engine.weights.folder import new_folder
from cierzo.engine.weights.published import check_format, config_file, random_pieces, tensor_plans
from cierzo.engine.weights.shapes import shape_of
from cierzo.engine.weights.vision_shapes import vision_shape_of
from cierzo.engine.weights.writer import write_json, write_tensors

_MAX_SEED = 2**63 - 1  # as a request's
_STORED = {"bfloat16": "BF16", "float32": "F32"}


def make_checkpoint(
    path: Path | str,
    *,
    like: str,
    scale: str | float = "tiny",
    dtype: str = "bfloat16",
    checkpoint_format: str = "hf",
    seed: int = 0,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: bool = False,
    tokenizer: Callable[[int], bytes] | None = None,
    vision: bool = False,
    vision_scale: str | float | None = None,
) -> Path:
    """Write a random checkpoint folder at `path`, whole or not at all, and return `path`.

    like, scale: "small4" or "small3"; "tiny", "mini", "full" or a factor in (0, 1] (`shape_of` says how it scales).
    dtype: "bfloat16" or "float32", as stored where not quantised. checkpoint_format: "hf", "hf-fp8", "native",
    "native-fp8" or "native-nvfp4" (`published` says what they are). seed: of the weights, which are normal with
    standard deviation 0.02; norm weights are 1. A tensor's values depend on the seed and its name alone, not on
    shards or other tensors.
    max_shard_bytes: size limit of one safetensors file. overwrite: replace an existing checkpoint folder.
    progress: show a bar. tokenizer: makes the tekken.json of a vocabulary of so many tokens. vision: with a tower,
    under the names that Small 3.1 and Small 4 are published with, of `vision_scale` or, by default, of the text's.

    Raises ConfigError for an unknown like, scale, dtype, format or seed, or a format that does not fit the others;
    CheckpointError, with the numbers, when the disk has no room, and when `path` exists and `overwrite` is false.
    """
    path = Path(path)
    shape = shape_of(like, scale)
    if dtype not in _STORED:
        raise refusal("dtype", "bfloat16 or float32", dtype)
    if not 0 <= seed <= _MAX_SEED:
        raise refusal("seed", f"an integer from 0 to {_MAX_SEED}", seed)
    format = check_format(checkpoint_format, shape, dtype)
    tower = vision_shape_of(scale if vision_scale is None else vision_scale) if vision else None
    plans = tensor_plans(shape, format, _STORED[dtype], tower)
    config = shape.config(dtype)
    tekken = None if tokenizer is None else tokenizer(shape.vocab_size)
    with new_folder(path, overwrite=overwrite, num_bytes=sum(plan.num_bytes for plan in plans)) as folder:
        write_json(folder / format.config_name, config_file(shape, format, dtype, tower))
        if tekken is not None:
            (folder / "tekken.json").write_bytes(tekken)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(
            folder / "generation_config.json", {name: config[name] for name in ids if config[name] is not None}
        )
        write_tensors(
            folder,
            plans,
            lambda plan: random_pieces(plan, seed),
            stem=format.stem,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
            label=f"writing {path.name}",
        )
    return path
