"""Format of a checkpoint folder: whose files and names it has, and how its matrices are stored. No torch here.

    layout    config         tensors                          names
    hf        config.json    model*.safetensors               model.layers.0.self_attn.o_proj.weight
    native    params.json    consolidated*.safetensors        layers.0.attention.wo.weight

    scheme        stored as                                                        in layout
    plain         floating-point tensors                                           hf, native
    fp8           e4m3, one scale a tensor, or a block: weight = code * scale      hf, native
    nvfp4         compressed-tensors' nvfp4-pack-quantized, of experts alone       native
    mxfp4         e2m1 and powers of two, of experts alone, as gpt-oss names them  hf
    compressed    compressed-tensors' formats (engine/quantisation.py)             hf, native

Adapters (LoRA and its kin) are found and named, and not applied: PEFT writes `adapter_config.json` and
`adapter_model.safetensors`, Mistral's own fine-tuning `lora.safetensors`. Without a word, whoever keeps them beside
the base model would take its answers for the adapter's.

Sources: the published formats of Mistral Small 4 and Small 3; transformers' FineGrainedFP8Config; vLLM's
transformers_utils/configs/mistral.py; compressed-tensors' QuantizationConfig.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cierzo.engine.errors import CheckpointError, size
from cierzo.engine.fields import Fields, read_json
from cierzo.engine.quantisation import COMPRESSED, Quantisation, WeightGroup, described, read_compressed, read_fp8

_log = logging.getLogger(__name__)

Layout = Literal["hf", "native"]
Scheme = Literal["plain", "fp8", "nvfp4", "mxfp4", "compressed"]
CONFIG_NAME = "config.json"
PARAMS_NAME = "params.json"
_FILE_STEM: dict[Layout, str] = {"hf": "model", "native": "consolidated"}
_LAYOUT_TEXT = {"hf": "Hugging Face", "native": "Mistral-native"}
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_REMEDY = "merge it into its base model first (PEFT: merge_and_unload)"
TEXT_ONLY = "--text-only serves the text model alone"
UNREADABLE = ("pytorch_model*.bin", "consolidated*.pth", "*.gguf")  # files of weights in other formats
_ADAPTER_PATTERNS = (ADAPTER_CONFIG_NAME, "adapter*.safetensors", "adapter*.bin", "lora*.safetensors")


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """Layout and scheme of a folder; `str()` is what `cierzo info` prints."""

    layout: Layout
    scheme: Scheme
    quantisation: Quantisation = field(default=Quantisation(()))

    @property
    def config_name(self) -> str:
        """The file that says what the model is."""
        return CONFIG_NAME if self.layout == "hf" else PARAMS_NAME

    @property
    def stem(self) -> str:
        """The beginning of the names of the tensors' files."""
        return _FILE_STEM[self.layout]

    def __str__(self) -> str:
        return f"{_LAYOUT_TEXT[self.layout]}, {self._scheme_text()}"

    def _scheme_text(self) -> str:
        match self.scheme:
            case "plain":
                return "not quantised"
            case "nvfp4":
                return f"NVFP4 ({COMPRESSED}), experts only"
            case "mxfp4":
                return "MXFP4, experts only"
            case "compressed":
                return f"{described(self.quantisation.groups)} ({COMPRESSED})"
        return described(self.quantisation.groups)


_FP8 = Quantisation((WeightGroup("fp8"),))
_MXFP4_EXPERTS = WeightGroup("mxfp4", bits=4, strategy="group", rows=1, columns=32)
_NVFP4 = Quantisation((WeightGroup("nvfp4", bits=4, strategy="tensor_group", rows=1, columns=16),))
# Formats that Mistral publishes checkpoints in, by the names that `cierzo make-checkpoint` knows them by.
PUBLISHED_FORMATS: Mapping[str, CheckpointFormat] = {
    "hf": CheckpointFormat("hf", "plain"),
    "hf-fp8": CheckpointFormat("hf", "fp8", _FP8),
    "native": CheckpointFormat("native", "plain"),
    "native-fp8": CheckpointFormat("native", "fp8", _FP8),
    "native-nvfp4": CheckpointFormat("native", "nvfp4", _NVFP4),
}


def find_layout(folder: Path) -> Layout:
    """Which of the two layouts is read in a folder: Hugging Face's wherever it is whole.

    The base repository of Small 4 holds both, with the same weights; its config.json and model*.safetensors are
    then read. Raises nothing: what is missing is told by who reads it.
    """
    has_config, has_params = ((folder / name).is_file() for name in (CONFIG_NAME, PARAMS_NAME))
    if not has_params:
        return "hf"
    if has_config and _has_tensors(folder, "hf"):
        if _has_tensors(folder, "native"):
            _log.info("%s holds %s and %s: %s is read", folder, CONFIG_NAME, PARAMS_NAME, CONFIG_NAME)
        return "hf"
    return "native" if not has_config or _has_tensors(folder, "native") else "hf"


def found_layouts(folder: Path) -> tuple[str, ...]:
    """Titles of the layouts that a folder holds whole, a config and tensors; the one that is read comes first."""
    names: dict[Layout, str] = {"hf": CONFIG_NAME, "native": PARAMS_NAME}
    found = [layout for layout, name in names.items() if (folder / name).is_file() and _has_tensors(folder, layout)]
    return tuple(_LAYOUT_TEXT[layout] for layout in found)


def find_format(folder: Path) -> CheckpointFormat:
    """Layout and scheme of a folder, from its config.json or params.json alone.

    Raises CheckpointError naming field, limit and value where the file is missing or malformed, or declares
    weights of any other kind; also where the folder holds an adapter alone.
    """
    layout = find_layout(folder)
    if layout == "native":
        return _native_format(Fields(read_json(folder / PARAMS_NAME), file=PARAMS_NAME))
    if not (folder / CONFIG_NAME).exists():
        refuse_lone_adapter(folder)
        _refuse_without_config(folder)
    outer = Fields(read_json(folder / CONFIG_NAME))
    outer.only("transformers_weights", (None,), default=None)  # has transformers read another file than model.*
    sections = [outer, outer.section("text_config")] if outer.has("text_config") else [outer]
    declared = [_hf_format(section.section("quantization_config")) for section in sections if _declares(section)]
    if len(declared) == 2 and declared[0] != declared[1]:
        raise sections[1].error("quantization_config", str(declared[1]), f"the same as outside ({declared[0]})")
    return declared[0] if declared else CheckpointFormat(layout, "plain")


def _refuse_without_config(folder: Path) -> None:
    """Raise CheckpointError for a folder without either config: what it holds instead, if that is known."""
    if not folder.is_dir() or (folder / CONFIG_NAME).is_symlink():
        return  # no folder, or a link to nothing: their reader tells
    found = sorted(path.name for pattern in UNREADABLE for path in folder.glob(pattern))
    hint = "" if any(folder.iterdir()) else ": it is empty"
    if found:
        hint = f"; {found[0]} is of a format that is not read: it must be converted to safetensors, with its config"
    raise CheckpointError(
        f"{folder} is no checkpoint: it has neither {CONFIG_NAME} nor {PARAMS_NAME}{hint}", field=CONFIG_NAME
    )


def _has_tensors(folder: Path, layout: Layout) -> bool:
    stem = _FILE_STEM[layout]
    return any(any(folder.glob(name)) for name in (f"{stem}*.safetensors", f"{stem}.safetensors.index.json"))


def _declares(fields: Fields) -> bool:
    value = fields.get("quantization_config", None)
    return value is not None and value != {}


def _hf_format(fields: Fields) -> CheckpointFormat:
    fields.only("quant_method", ("fp8", COMPRESSED, "mxfp4"))
    match fields.get("quant_method"):
        case "fp8":
            return CheckpointFormat("hf", "fp8", read_fp8(fields))
        case "mxfp4":
            return CheckpointFormat("hf", "mxfp4", Quantisation((_MXFP4_EXPERTS,)))
    return CheckpointFormat("hf", "compressed", read_compressed(fields))


def _native_format(params: Fields) -> CheckpointFormat:
    """`quantization`, or `quantization_config`: published params.json have either, or the same in both."""
    names = [name for name in ("quantization", "quantization_config") if params.has(name)]
    if not names:
        return CheckpointFormat("native", "plain")
    if len(names) == 2 and params.get(names[0]) != params.get(names[1]):
        raise params.error(names[1], params.get(names[1]), "the same as quantization")
    fields = params.section(names[0])
    if fields.has("qformat_weight"):
        fields.only("qformat_weight", ("fp8_e4m3",))
        fields.only("qscheme_act", ("TENSOR", None), default=None)
        return CheckpointFormat("native", "fp8", _FP8)
    found = read_compressed(fields)
    alone = all(group.storage == "nvfp4" for group in found.groups)
    return CheckpointFormat("native", "nvfp4" if alone else "compressed", found)


def left_aside(num_tensors: int, num_bytes: int) -> str:
    """Say of a vision tower, which no image reaches, that it is not used."""
    return f"images are not served: {num_tensors:,} tensors, {size(num_bytes)}, are left aside"


def adapter_files(folder: Path) -> tuple[str, ...]:
    """The names of the adapter's files in a folder; empty where there is none."""
    found = {path.name for pattern in _ADAPTER_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return tuple(sorted(found))


def refuse_lone_adapter(folder: Path) -> None:
    """Raise CheckpointError if a folder, which holds no model, holds an adapter: what it is, and of which base."""
    files = adapter_files(folder)
    if not files:
        return
    base = None
    if ADAPTER_CONFIG_NAME in files:
        fields = Fields(read_json(folder / ADAPTER_CONFIG_NAME), file=ADAPTER_CONFIG_NAME)
        base = fields.get("base_model_name_or_path", None)
    of_base = "" if base is None else f" of the base model {base}"
    raise CheckpointError(
        f"{folder} holds an adapter{of_base} ({', '.join(files)}) and no model of its own: {ADAPTER_REMEDY}",
        field=files[0],
        limit="a whole model",
        value=base,
    )
