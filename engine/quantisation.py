"""Quantisation that a checkpoint declares: which matrices are stored how. No torch here.

    declared by                                   storage of a matrix X
    quant_method fp8 (transformers)               e4m3; scales of matrices, or of blocks (weight_block_size)
    qformat_weight fp8_e4m3 (Mistral)             e4m3; one scale a matrix
    quant_method mxfp4 (transformers)             experts: X_blocks of e2m1 pairs, X_scales of powers of two
    compressed-tensors, each group's format:
        float-quantized                           e4m3; scales of matrices, rows, blocks or groups of columns
        int-quantized, naive-quantized            int8, the same
        pack-quantized                            X.weight_packed: int32 words of 4- or 8-bit integers
        nvfp4-pack-quantized                      X.weight_packed: e2m1 pairs, e4m3 scales of 16, a divisor
        mxfp4-pack-quantized                      X.weight_packed: e2m1 pairs, powers of two for 32

Sources: compressed-tensors 0.20 (`QuantizationConfig`, its compressors, `utils/match.py`); transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from cierzo.engine.fields import Fields

Storage = Literal["fp8", "int8", "packed", "nvfp4", "mxfp4"]
Strategy = Literal["tensor", "channel", "block", "group", "tensor_group"]
COMPRESSED = "compressed-tensors"

# Format of a config group -> storage of its matrices, by type of their codes.
_STORAGE: dict[str, dict[str, Storage]] = {
    "float-quantized": {"float": "fp8"},
    "int-quantized": {"int": "int8"},
    "naive-quantized": {"float": "fp8", "int": "int8"},
    "pack-quantized": {"int": "packed"},
    "nvfp4-pack-quantized": {"float": "nvfp4"},
    "mxfp4-pack-quantized": {"float": "mxfp4"},
}
_MIXED = "mixed-precision"  # each group names its own
_BITS: dict[Storage, tuple[int, ...]] = {
    "fp8": (8,),
    "int8": (8, 4),
    "packed": (4, 8),
    "nvfp4": (4,),
    "mxfp4": (4,),
}
_GROUP: dict[Storage, int] = {"nvfp4": 16, "mxfp4": 32}
_STRATEGIES: dict[Storage, tuple[str, ...]] = {
    "fp8": ("tensor", "channel", "block", "group"),
    "int8": ("tensor", "channel", "group"),
    "packed": ("tensor", "channel", "group"),
    "nvfp4": ("tensor_group",),
    "mxfp4": ("group",),
}
# Number format that keeps codes and scales as they are, where a user chooses it, and on which devices.
_KEPT: dict[Storage, tuple[str, str]] = {
    "fp8": ("fp8", "on a GPU"),
    "packed": ("int4", "on a CPU, which rounds their scales to 16 bits"),
    "nvfp4": ("nvfp4", "on a CPU, and on a GPU for experts"),
    "mxfp4": ("nvfp4", "on a CPU, and on a GPU for experts"),
}
_INT4_GROUP = 32  # of kernels/formats/int4.py, which finds any grid that a group lies on


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """Storage of the matrices that `targets` name.

    targets: names of modules, "re:" and a regular expression, or a class ("Linear"). bits: of a code.
    columns: that share a scale; 0: all of a row. rows: that share one; 0: all. zero_points: codes have one, as
    scales are stored. activations: what the quantiser meant to do with activations, as text; "": nothing.
    """

    storage: Storage
    targets: tuple[str, ...] = ("Linear", "Embedding")
    bits: int = 8
    strategy: Strategy = "tensor"
    rows: int = 0
    columns: int = 0
    zero_points: bool = False
    activations: str = ""

    def __str__(self) -> str:
        name = f"INT{self.bits}" if self.storage in ("int8", "packed") else self.storage.upper()
        if self.storage in ("nvfp4", "mxfp4"):
            return name
        shared = {
            "tensor": "one scale a matrix",
            "channel": "one scale a row",
            "block": f"one scale a block of {self.rows} x {self.columns}",
        }
        zero = " and zero points" if self.zero_points else ""
        return f"{name}, {shared.get(self.strategy, f'one scale for {self.columns} columns')}{zero}"

    @property
    def kept(self) -> str:
        """The setting that serves the stored values, and where; "" where there is none."""
        if self.storage == "packed" and (self.bits != 4 or self.zero_points or self.columns % _INT4_GROUP):
            return ""
        return "--weights {} {}".format(*_KEPT[self.storage]) if self.storage in _KEPT else ""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Groups of a checkpoint's quantised matrices, and what else it declares.

    kv_cache: what it would store keys and values in, as text; "": nothing.
    """

    groups: tuple[WeightGroup, ...]
    kv_cache: str = ""

    def group_of(self, *names: str) -> WeightGroup | None:
        """The group of a module that goes by any of these names; None if no target names it.

        A name has precedence over a regular expression, and this one over a class, as in compressed-tensors.
        """
        targets = [(target, group) for group in self.groups for target in group.targets]
        for matches in (_is_name, _is_pattern_of, _is_class_of):
            for target, group in sorted(targets, key=lambda one: one[0]):
                if any(matches(target, name) for name in names):
                    return group
        return None

    def notes(self) -> list[str]:
        """Sentences that say how such weights are served, for the log and `cierzo info`."""
        if not self.groups:
            return []
        found = []
        kept = sorted({f"{group}: served as it is stored with {group.kept}" for group in self.groups if group.kept})
        found += kept or ["no setting of --weights serves these weights as they are stored"]
        found[-1] += "; otherwise each matrix is converted exactly, then rounded once to the format that is served"
        meant = sorted({group.activations for group in self.groups if group.activations})
        if meant:
            done = "activations have 16 bits on a GPU, and 8 bits within a CPU's products, scaled as they come"
            but = "; --activations fp8 on a GPU has them in FP8, where matrices are FP8" if self._has_fp8 else ""
            found.append(f"made for activations in {', '.join(meant)}, which is NOT done: {done}{but}")
        if self.kv_cache:
            found.append(
                f"made for keys and values in {self.kv_cache}, which is NOT done: --kv-dtype says what they are"
            )
        return found

    @property
    def _has_fp8(self) -> bool:
        return any(group.storage == "fp8" for group in self.groups)


def _is_name(target: str, name: str) -> bool:
    return target == name


def _is_pattern_of(target: str, name: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None


def _is_class_of(target: str, name: str) -> bool:
    """Whether a module of this name is of a class: every matrix is a Linear, but for the embedding."""
    return target == ("Embedding" if name.endswith(("embed_tokens", "tok_embeddings")) else "Linear")


def read_fp8(fields: Fields) -> Quantisation:
    """transformers' `fp8`. Where `modules_to_not_convert` applies, tensors' dtypes say. Raises CheckpointError."""
    fields.only("quant_method", ("fp8",))
    fields.only("activation_scheme", ("static", "dynamic"))
    fields.only("fmt", ("e4m3", None), default=None)
    activations = f"FP8 ({fields.get('activation_scheme')})"
    if not fields.has("weight_block_size"):
        return Quantisation((WeightGroup("fp8", activations=activations),))
    rows, columns = _block(fields, "weight_block_size")
    return Quantisation(
        (WeightGroup("fp8", strategy="block", rows=rows, columns=columns, activations=activations),)
    )


def read_compressed(fields: Fields) -> Quantisation:
    """compressed-tensors' quantization_config. `ignore` is not read: the tensors say which matrices are quantised.

    Raises CheckpointError naming field, limit and value for anything else than the storages above: sparse weights,
    rotations (transforms), other formats, a model whose quantisation is not finished.
    """
    fields.only("quant_method", (COMPRESSED,))
    fields.only("quantization_status", ("compressed", "frozen", None), default=None)
    _refuse_sections(fields)
    known = (*_STORAGE, _MIXED)
    fields.only("format", known)
    sections = fields.section("config_groups")
    names: list[str] = list(fields.get("config_groups"))
    if not names:
        raise fields.error("config_groups", names, "one group or more")
    groups = tuple(_group(sections.section(name), fields) for name in names)
    return Quantisation(groups, _kv_cache(fields))


def _refuse_sections(fields: Fields) -> None:
    for name in ("sparsity_config", "moe_sparsity_config", "transform_config"):
        value = fields.get(name, None)
        if value not in (None, {}) and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise fields.error(name, value, "null, {} or format dense (others unsupported)")


def _kv_cache(fields: Fields) -> str:
    return _title(fields.section("kv_cache_scheme")) if fields.has("kv_cache_scheme") else ""


def _group(group: Fields, outer: Fields) -> WeightGroup:
    """Read a group of config_groups. The format is its own, or the whole model's."""
    holder = group if group.has("format") else outer
    holder.only("format", tuple(_STORAGE))
    weights = group.section("weights")
    weights.only("dynamic", (False, None), default=None)
    group.only("output_activations", (None,), default=None)
    storages = _STORAGE[holder.get("format")]
    weights.only("type", tuple(storages))
    storage = storages[weights.get("type")]
    weights.only("num_bits", _BITS[storage])
    weights.only("actorder", (None, False, "weight", "static"), default=None)  # "group" needs weight_g_idx
    strategy, rows, columns = _shared(weights, storage)
    symmetric = weights.boolean("symmetric", default=True)
    if not symmetric and storage in ("nvfp4", "mxfp4", "fp8"):
        raise weights.error("symmetric", symmetric, "true for floating-point codes (others unsupported)")
    activations = _title(group.section("input_activations")) if group.has("input_activations") else ""
    targets = _targets(group)
    bits = weights.integer("num_bits")
    return WeightGroup(storage, targets, bits, strategy, rows, columns, not symmetric, activations)


def _targets(group: Fields) -> tuple[str, ...]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets or not all(isinstance(one, str) for one in targets):
        raise group.error("targets", targets, "a list of names, classes and regular expressions")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise group.error("targets", target, f"a regular expression after re: ({error})") from None
    return tuple(targets)


def _shared(weights: Fields, storage: Storage) -> tuple[Strategy, int, int]:
    """Strategy, and rows and columns that share a scale (0: all), inferred as compressed-tensors infers them."""
    size = weights.get("group_size", None)
    fixed = _GROUP.get(storage)
    if fixed is not None:
        weights.only("group_size", (fixed,))
        weights.only("strategy", (*_STRATEGIES[storage], None), default=None)
        return ("tensor_group" if storage == "nvfp4" else "group"), 1, fixed
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    weights.only("strategy", (*_STRATEGIES[storage], None), default=None)
    strategy = cast(Strategy, weights.get("strategy", None) or default)
    if strategy == "group":
        return strategy, 1, weights.integer("group_size")
    if strategy == "block":
        return (strategy, *_block(weights, "block_structure"))
    return strategy, (1 if strategy == "channel" else 0), 0


def _block(fields: Fields, name: str) -> tuple[int, int]:
    """[rows, columns], or "128x128" as older files have it."""
    value: Any = fields.get(name)
    sizes = value.split("x") if isinstance(value, str) else value
    found = [int(str(size)) for size in sizes if str(size).isdecimal()] if isinstance(sizes, list) else []
    if len(found) != 2 or len(sizes) != 2 or min(found) < 1:
        raise fields.error(name, value, "[rows, columns], such as [128, 128]")
    return found[0], found[1]


def _title(arguments: Fields) -> str:
    """A quantisation of activations or of the cache, as text: "FP8 (dynamic)"."""
    arguments.only("type", ("float", "int"), default="int")
    kind = "FP" if arguments.get("type", "int") == "float" else "INT"
    how = "dynamic" if arguments.get("dynamic", False) else "static"
    return f"{kind}{arguments.integer('num_bits', default=8)} ({how})"


def described(groups: Iterable[WeightGroup]) -> str:
    """All groups, as text."""
    return "; ".join(dict.fromkeys(str(group) for group in groups))
