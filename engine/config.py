"""Settings: what a user may say (`EngineOptions`), and what the engine runs with (`EngineConfig`).

`resolve()` is the only way from one to the other: afterwards there is no "auto" and no None, and each part
gets its own section.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cierzo.cache.config import CacheConfig
from cierzo.cache.layout import CacheLayout, plan_capacity
from cierzo.engine import device_memory
from cierzo.engine.cost.cards import find_device
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.weights import NumberFormats
from cierzo.engine.environment import cache_dir, check_environment, default_instruction_set
from cierzo.engine.errors import ConfigError, refusal
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.host import available_memory_bytes, usable_cpus
from cierzo.engine.kv_room import AUTO_KV_BYTES, longest_request, plan_kv
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.number_choice import PLACE, activations_format, head_format, listed, weights_format
from cierzo.engine.profiles import Profile, ProfileName, choose
from cierzo.engine.settings import require
from cierzo.engine.weights.vision_shapes import planned_model_config
from cierzo.kernels.config import InstructionSet, KernelsConfig
from cierzo.kernels.cpu import MAX_THREADS
from cierzo.kernels.formats.number_formats import FormatName
from cierzo.scheduler.config import SchedulerConfig

KV_BYTE_FORMAT = {"cpu": "int8", "cuda": "fp8"}  # the format of cached values that has a byte each
BLOCK_TOKENS = {"cpu": 32, "cuda": 64}  # a GPU's attention takes 64 tokens at a time, with one look into the table


# Beyond every use, and little enough for the arrays that are made of these numbers at the start.
MAX_COUNT = 1 << 20
Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Amount = Annotated[float, Meta(gt=0)]


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an engine; None leaves the choice to `resolve`. The descriptions are the command line's help."""

    model: str
    profile: Annotated[
        ProfileName,
        Meta(description="what settings that are not given are chosen for; docs/architecture.md has the reasons"),
    ] = "balanced"
    device: Annotated[
        str,
        Meta(
            description="where the model runs: cpu, cuda, or simulated:NAME for a card that is not here (h100, "
            "h200, 4xh100, a device file): nothing is computed then, tokens are made up; auto: the CPU"
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], Meta(description="weights, activations, KV; auto: bfloat16")
    ] = "auto"
    weights: Annotated[
        Literal["auto", FormatName],
        Meta(
            description=f"number format of the weights; auto: that of dtype. On a CPU {listed('cpu')}; on "
            f"a GPU {listed('cuda')}. lm_head keeps 8 bits at least"
        ),
    ] = "auto"
    activations: Annotated[
        Literal["auto", "bf16", "fp8"],
        Meta(
            description="number format of what fp8 weights are multiplied with; auto: that of dtype; fp8 on a GPU "
            "alone, by the checkpoint's scales, or row by row where it has none"
        ),
    ] = "auto"
    head: Annotated[
        Literal["auto", "fp8"],
        Meta(description="number format of lm_head; auto: int8 on a CPU, else that of dtype; fp8 on a GPU alone"),
    ] = "auto"
    kv_dtype: Annotated[
        Literal["auto", "bf16", "fp8", "int8"],
        Meta(description="number format of the KV cache; auto: that of dtype; fp8 on GPUs, int8 on CPUs"),
    ] = "auto"
    tokenizer: Annotated[
        Literal["auto", "mistral", "tokenizers"],
        Meta(description="mistral: tekken.json, by mistral-common; tokenizers: tokenizer.json; auto: the first"),
    ] = "auto"
    text_only: Annotated[
        bool, Meta(description="take no images: a checkpoint's vision tower is left aside, and takes no memory")
    ] = False
    threads: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_THREADS)] | None,
        Meta(description="CPU threads of the core; default: all usable ones"),
    ] = None
    pin_threads: Annotated[bool, Meta(description="keep each of them on a CPU of its own")] = False
    instruction_set: Annotated[
        InstructionSet,
        Meta(description="of the CPU kernels; auto: the best there is; reference: plain torch instead of them"),
    ] = "auto"
    max_model_len: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="longest prompt + output, tokens; default: what model and KV budget hold, at most 262144"),
    ] = None
    kv_cache_gib: Annotated[
        Amount | None,
        Meta(description="KV cache, GiB; default: a quarter of the free memory, at most 8, no more than is of use"),
    ] = None
    block_tokens: Annotated[
        Count | None, Meta(description="tokens per KV block; default: 64 on a GPU, else 32")
    ] = None
    prefix_caching: Annotated[bool, Meta(description="reuse the KV blocks of equal prompt beginnings")] = True
    budget_tokens: Annotated[
        Count | None, Meta(description="tokens computed in one step, at most; default: the profile's")
    ] = None
    max_chunk_tokens: Annotated[
        Count | None,
        Meta(description="tokens of one prompt in one step while others wait, at most; default: the profile's"),
    ] = None
    max_step_ms: Annotated[
        Annotated[float, Meta(ge=0, le=1e9)] | None,
        Meta(
            description="prompt chunks are shortened so that a step should take at most so long, by what was "
            "learned from the first steps; 0: cut by tokens alone; default: the profile's"
        ),
    ] = None
    overlap: Annotated[
        Literal["auto", "on", "off"],
        Meta(description="begin a step before the one before has ended; auto: where a GPU would wait otherwise"),
    ] = "auto"
    max_running: Annotated[
        Count | None,
        Meta(description="sequences that run at once, no more than budget_tokens; default: the profile's"),
    ] = None
    graph_sequences: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_COUNT)] | None,
        Meta(description="sequences of the largest decode step recorded as a CUDA graph; default: the profile's"),
    ] = None
    max_waiting: Annotated[Count, Meta(description="sequences that wait, at most; further ones are refused")] = 4096
    priority_aging_s: Annotated[
        Amount, Meta(description="seconds of waiting that one level of priority is worth")
    ] = 30.0
    image_cache_tokens: Annotated[Count, Meta(description="embeddings of images kept, in image tokens")] = 16_384
    expert_statistics: Annotated[
        bool, Meta(description="count which experts the tokens choose; costs about 0.05 ms of a step")
    ] = False
    softmax_scale: Annotated[
        Amount | None, Meta(description="attention's softmax scale; default: (query-key width)^-0.5")
    ] = None
    flight_folder: Annotated[
        str | None,
        Meta(
            description="folder where a server's core writes down what it does of late, and where that is kept "
            'when it dies (cierzo replay); default: flights/ in the cache folder; "": nowhere'
        ),
    ] = None
    record_prompts: Annotated[
        bool, Meta(description="write down token ids too, of prompts and answers; else ids of requests and lengths")
    ] = False
    runner: Annotated[
        Literal["model", "fake"], Meta(description="fake: deterministic tokens without a model, for load tests")
    ] = "model"
    kernels: KernelsConfig = KernelsConfig()
    frontend: FrontendConfig = FrontendConfig()


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resolved settings, one section per part; crosses to the core process as it is."""

    checkpoint: str
    name: str
    device: str
    dtype: str
    weights: str
    activations: str
    head: str
    threads: int
    pin_threads: bool
    overlap: bool
    graph_sequences: int
    runner: str
    profile: str
    card: Device | None  # that is simulated
    expert_statistics: bool
    model: ModelConfig
    layout: CacheLayout
    cache: CacheConfig
    scheduler: SchedulerConfig
    kernels: KernelsConfig
    frontend: FrontendConfig
    flight_folder: str = ""  # "": nothing is recorded
    record_prompts: bool = False
    tokenizer: str = "auto"  # until it is loaded

    def describe(self) -> str:
        """The resolved settings and the capacity plan, as printed at start."""
        threads, tower = "pinned threads" if self.pin_threads else "threads", self.model.vision
        rows = [
            ("model", f"{self.name} ({self.model.architecture}, {self.model.num_layers} layers)"),
            ("profile", self.profile),
            ("runner", f"{self.runner} on {self.device}, {self.dtype}, {self.threads} {threads}"),
            (
                "number formats",
                f"weights {self.weights}, activations {self.activations}, head {self.head}, "
                f"KV cache {self.layout.dtype}",
            ),
            ("max_model_len", f"{self.scheduler.max_model_len:,} tokens"),
            (
                "step",
                f"{self.scheduler.budget_tokens:,} tokens, chunks of {self.scheduler.max_chunk_tokens:,} "
                f"beside others, {self.scheduler.max_running:,} running, {self.scheduler.max_waiting:,} waiting",
            ),
            (
                "step time",
                "prompt chunks are shortened so that a step should take at most "
                f"{1e3 * self.scheduler.max_step_s:,.6g} ms (--max-step-ms); "
                + ("learned from the first steps" if self.card is None else "predicted")
                if self.scheduler.max_step_s
                else "no target (--max-step-ms): chunks are cut by tokens alone",
            ),
            ("vision tower", "none" if tower is None else f"images of up to {tower.max_side_px:,} px a side"),
            ("prefix cache", "on" if self.cache.prefix_caching else "off"),
            ("steps", "overlapped" if self.overlap else "one by one"),
        ]
        if self.flight_folder:
            what = "with token ids" if self.record_prompts else "ids and lengths"
            rows.append(("flight record", f"{self.flight_folder} ({what})"))
        if self.model.moe is not None:
            rows.append(("experts", "counted" if self.expert_statistics else "not counted"))
        if self.card is not None:
            rows.append(("simulation", f"{self.card.describe()}; nothing is computed, tokens are made up"))
        lines = [f"{key:<14} {value}" for key, value in rows]
        capacity = plan_capacity(self.layout, self.cache.num_blocks, self.scheduler.max_model_len)
        return "\n".join([*lines, str(capacity)])


def resolve(options: EngineOptions) -> EngineConfig:
    """Turn options into a whole configuration.

    Raises ConfigError naming field, limit and value, or CheckpointError where config.json is at fault.
    """
    check_environment()
    options = require(options)
    card = _card(options)
    kind = card.kind if card is not None else "cuda" if options.device == "cuda" else "cpu"
    profile = choose(options, kind)
    _require_running(options, profile)
    options = msgspec.structs.replace(options, **msgspec.structs.asdict(profile))
    path, model = _model(options, card)
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    block_tokens = options.block_tokens or BLOCK_TOKENS[kind]
    layout = model.cache_layout(block_tokens, _kv_dtype(options, kind, dtype))
    weights, activations = weights_format(options, kind, dtype), activations_format(options, kind, dtype)
    head = head_format(options, kind, weights, dtype)
    _require_rate(card, dtype, weights, activations)
    num_blocks, max_model_len = plan_kv(
        model,
        layout,
        _kv_room_bytes(options, kind, card, model, layout),
        max_model_len=options.max_model_len,
        kv_cache_gib=options.kv_cache_gib,
        max_running=profile.max_running,
        on_gpu=kind == "cuda",
    )
    return EngineConfig(
        checkpoint=str(path),
        name=path.name,
        device="cpu" if options.device == "auto" else options.device,
        dtype=dtype,
        weights=weights,
        activations=activations,
        head=head,
        threads=options.threads or min(usable_cpus(), MAX_THREADS),
        pin_threads=options.pin_threads,
        overlap=kind == "cuda" if options.overlap == "auto" else options.overlap == "on",
        graph_sequences=profile.graph_sequences,
        runner=options.runner if card is None else "simulated",
        profile=options.profile,
        card=card,
        expert_statistics=_expert_statistics(options, model, card),
        model=model,
        layout=layout,
        cache=CacheConfig(
            block_tokens=block_tokens,
            num_blocks=num_blocks,
            prefix_caching=options.prefix_caching,
            hash_key=secrets.token_hex(16),
        ),
        scheduler=_limits(options, profile, max_model_len, model),
        kernels=_kernels(options),
        flight_folder=_flight_folder(options),
        record_prompts=options.record_prompts,
        tokenizer=options.tokenizer,
        frontend=_frontend(options),
    )


def _frontend(options: EngineOptions) -> FrontendConfig:
    """The front end's section: what it admits, the core's queue must take."""
    limits, most = options.frontend, options.max_waiting
    if limits.core_stall_s >= limits.core_hang_s:
        why = "core_hang_s: a core is killed after it has counted as stalled"
        raise refusal("core_stall_s", f"less than {limits.core_hang_s:g}", limits.core_stall_s, why)
    if limits.max_open_samples > max(most, FrontendConfig().max_open_samples):
        why = "max_waiting: what the front end takes, the core must take"
        raise refusal("max_open_samples", f"at most {most}", limits.max_open_samples, why)
    return msgspec.structs.replace(
        limits, max_open_samples=min(limits.max_open_samples, most), max_samples=min(limits.max_samples, most)
    )


def _limits(options: EngineOptions, profile: Profile, max_model_len: int, model: ModelConfig) -> SchedulerConfig:
    """The scheduler's section."""
    return SchedulerConfig(
        budget_tokens=profile.budget_tokens,
        max_chunk_tokens=min(profile.max_chunk_tokens, profile.budget_tokens),
        max_step_s=profile.max_step_ms / 1e3,
        max_running=min(profile.max_running, profile.budget_tokens),
        max_waiting=options.max_waiting,
        max_model_len=max_model_len,
        priority_aging_s=options.priority_aging_s,
        image_cache_tokens=options.image_cache_tokens,
        image_stages=1 if model.vision is None else model.vision.num_layers,
    )


def _require_rate(card: Device | None, dtype: str, weights: str, activations: str) -> None:
    """Raise ConfigError for a simulated card that does not tell how fast it computes with these."""
    if card is None:
        return
    plain, on_gpu = "bf16" if dtype == "bfloat16" else dtype, card.kind == "cuda"
    formats = NumberFormats(weights=weights, plain=plain, activations=activations, on_gpu=on_gpu)
    if (rate := formats.rate(weights)) not in card.operations_per_s:
        told = ", ".join(card.operations_per_s)
        raise refusal("device", f"one whose operations_per_s tells {rate}", card.name, f"it tells {told}")


def _require_running(options: EngineOptions, profile: Profile) -> None:
    """Raise ConfigError if more sequences are wanted at once than a step has tokens."""
    if options.max_running is not None and options.max_running > profile.budget_tokens:
        why = "budget_tokens: each of them takes one token of a step"
        raise refusal("max_running", f"at most {profile.budget_tokens}", options.max_running, why)


def _model(options: EngineOptions, card: Device | None) -> tuple[Path, ModelConfig]:
    """The checkpoint's folder and what its config says; on a simulated card also a model by name alone."""
    named = planned_model_config(options.model, options.text_only)
    if named is not None and card is None and not os.path.isdir(options.model):
        why = "a model by its name alone runs on simulated GPUs"
        raise refusal("checkpoint", "the folder of a checkpoint", options.model, why)
    model = named if card is not None else None
    if model is None:
        path = checkpoint_path(options.model)
        model = read_model_config(path, options.text_only)
    else:
        path = Path(options.model).resolve()
    if options.softmax_scale is not None:
        model = msgspec.structs.replace(model, softmax_scale_override=options.softmax_scale)
    return path, model


def checkpoint_path(checkpoint: str) -> Path:
    """The whole path of a checkpoint's folder. Raises ConfigError where there is no folder, in the same words for
    every command, and for a name that the front end could not tell the core."""
    if not os.path.isdir(checkpoint):
        raise refusal("checkpoint", "the folder of a checkpoint", checkpoint)
    path = Path(checkpoint).resolve()
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise refusal("checkpoint", "a folder whose path is text in UTF-8", checkpoint) from None
    return path


def _card(options: EngineOptions) -> Device | None:
    """The simulated one. Raises ConfigError for a device that there is not."""
    prefix, _, name = options.device.partition(":")
    if prefix == "simulated":
        return find_device(name)
    if options.device not in ("auto", "cpu", "cuda"):
        raise refusal("device", "auto, cpu, cuda or simulated:NAME", options.device)
    return None


def _expert_statistics(options: EngineOptions, model: ModelConfig, card: Device | None) -> bool:
    """Whether to count experts: where there are some that choose."""
    if options.expert_statistics and (model.moe is None or options.runner != "model" or card is not None):
        without = f"{Path(options.model).name} ({model.architecture})"
        if model.moe is not None:
            without = "the fake runner" if card is None else "a simulated card"
        raise refusal("expert_statistics", False, True, f"{without} has no experts")
    return options.expert_statistics


def _flight_folder(options: EngineOptions) -> str:
    """Where flight records go: a whole path, "" for nowhere, as for a user without a home."""
    if options.flight_folder is not None:
        return os.path.abspath(options.flight_folder) if options.flight_folder else ""
    try:
        return str(cache_dir() / "flights")
    except ConfigError:
        return ""


def _kv_dtype(options: EngineOptions, kind: str, dtype: str) -> str:
    """The cache's number format. Of those with a byte each kind of device has kernels for one: GPUs convert e4m3 in
    one instruction, CPUs multiply int8. On a CPU the plain-torch reference, asked for by name, reads FP8 too."""
    if options.kv_dtype == "auto":
        return dtype
    if options.kv_dtype == "bf16":
        if dtype != "bfloat16":
            raise refusal("kv_dtype", "auto", "bf16", f"dtype is {dtype}")
        return dtype
    right = KV_BYTE_FORMAT[kind]
    if options.kv_dtype != right and (kind == "cuda" or _kernels(options).instruction_set != "reference"):
        limit = f"one of auto, {'bf16, ' * (dtype == 'bfloat16')}{right}"
        raise refusal("kv_dtype", limit, options.kv_dtype, f"{options.kv_dtype} has no kernels {PLACE[kind]}")
    return options.kv_dtype


def _kv_room_bytes(
    options: EngineOptions, kind: str, card: Device | None, model: ModelConfig, layout: CacheLayout
) -> int:
    """Memory that the KV cache may take: of a GPU, what the weights leave. Without a driver to ask, the core says
    that there is no GPU."""
    if card is None and kind == "cpu":
        return available_memory_bytes()
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    weights = weights_format(options, kind, dtype)
    free = device_memory.free_bytes() if card is None else card.memory_bytes
    if free is None:
        return AUTO_KV_BYTES
    limits = device_memory.StepLimits(
        budget_tokens=options.budget_tokens or 0,
        max_running=options.max_running or 0,
        graph_sequences=options.graph_sequences or 0,
        max_model_len=longest_request(model.max_position_embeddings, options.max_model_len),
        image_cache_tokens=options.image_cache_tokens,
    )
    cards = 1 if card is None else card.cards
    head = head_format(options, kind, weights, dtype)
    return device_memory.kv_room_bytes(model, weights, free, limits, layout.bytes_per_token, cards, head)


def _kernels(options: EngineOptions) -> KernelsConfig:
    """The kernels' section; its "auto" is left to `bind`, which knows the CPU."""
    wanted = options.instruction_set
    if wanted == "auto":
        wanted = options.kernels.instruction_set
    if wanted == "auto":
        wanted = default_instruction_set()
    return msgspec.structs.replace(options.kernels, instruction_set=wanted)
