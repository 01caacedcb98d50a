"""`ModelRunner`: a batch through the model and the sampler. Owns cache tensors and sampler state."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cierzo.cache.pool import DTYPES, KVPool
from cierzo.engine.config import EngineConfig
from cierzo.engine.environment import cache_dir
from cierzo.engine.errors import ConfigError
from cierzo.engine.model.build import build_model, parameter_specs
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.parameters import MatrixSource, Parameter, PlainMatrices
from cierzo.engine.weights.ahead import ReadAhead, ReadFirst
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.matrices import DeviceMatrices, PackedMatrices
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.choosing import Choosing
from cierzo.engine.worker.experts import ExpertCounter
from cierzo.engine.worker.graphs import DecodeGraphs, Model, cuda_recorder
from cierzo.engine.worker.images import Embeddings
from cierzo.engine.worker.progress import loading_progress
from cierzo.engine.worker.sampling import NOT_FINITE, Sampled, Sampler
from cierzo.engine.worker.scoring import Scorer, Scores
from cierzo.engine.worker.staging import Staging
from cierzo.engine.worker.step_rows import DeviceRows, rows_in_place
from cierzo.kernels.cpu import native
from cierzo.kernels.fault import watching
from cierzo.kernels.formats.packed import PLAIN_FORMATS
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import KernelChoiceError, bind
from cierzo.scheduler.images import Image
from cierzo.scheduler.plan import PENDING, StepPlan, StepResult, TokenLogprobs

if TYPE_CHECKING:
    from cierzo.engine.worker.warm import Compilation

log = logging.getLogger(__name__)

# Pixels, fp32 [H unit, W unit, 3] -> None for each stage but the last one, which gives embeddings [H W, hidden].
Tower = Callable[[Tensor], Iterator[Tensor | None]]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was launched: how many sequences its plan has, which of them sample, their slots, and the
    functions that wait for their tokens, that count the step's experts, if they are counted, and that wait for
    prompts' scores."""

    number: int
    num_seqs: int
    sample_seqs: list[int]
    slots: list[int]
    sampled: Callable[[], Sampled]
    count_experts: Callable[[], None] | None
    scores: Scores
    choosing: Choosing | None = None  # where some have a grammar


class ModelRunner:
    """Runs a model on one device. The forward pass goes in `launch`; sampling and reading back in `collect`.

    staged: batches are copied to the device in one piece, instead of being read where they lie. graphs: for decode
    steps; needs `staged`, whose block tables stay where they are. overlap: a step may be launched before the one
    before is collected; else its tokens are chosen in `collect`. experts: counts those of every step collected.
    tower: sees the images of prompts, each alone, so that its bits depend on nothing else; None: there are none.
    """

    def __init__(
        self,
        model: Model,
        kv: KVPool,
        max_running: int,
        device: torch.device | str = "cpu",
        description: str = "",
        *,
        staged: DeviceRows | None = None,
        graphs: DecodeGraphs | None = None,
        overlap: bool = False,
        experts: ExpertCounter | None = None,
        tower: Tower | None = None,
    ) -> None:
        self.experts = experts
        self._tower = tower
        self._embeddings = Embeddings(self._embed)
        self._overlap = overlap
        self._model = model
        self._kv = kv
        self._staged = staged
        self._graphs = graphs
        self._staging = None if staged is None else Staging(torch.device(device))
        self._max_running = max_running
        later = None if staged is None else Staging(torch.device(device))
        self._pixels = None if staged is None else Staging(torch.device(device))
        self._sampler = Sampler(max_running, device, self._staging, later)
        self._scorer = Scorer(None if staged is None else Staging(torch.device(device)))
        self._steps: deque[_Step] = deque()
        self._description = description

    @classmethod
    def of(
        cls, config: EngineConfig, model: Model, kv: KVPool, description: str = "", tower: Tower | None = None
    ) -> ModelRunner:
        """The runner of a model on the configuration's device."""
        device, limits, staged, graphs = torch.device(config.device), config.scheduler, None, None
        by_name = config.kernels.implementations
        host_reads = any(by_name.get(name) == "torch" for name in ("mla_decode", "gqa_decode"))
        if device.type != "cpu":
            staged = DeviceRows(device)
        if staged is not None and config.graph_sequences and not host_reads:
            graphs = DecodeGraphs(
                model,
                kv,
                max_running=min(config.graph_sequences, limits.max_running),
                max_model_len=limits.max_model_len,
                cached_tokens=config.cache.num_blocks * config.cache.block_tokens,
                device=device,
                record=cuda_recorder(),
            )
        return cls(
            model,
            kv,
            limits.max_running,
            device,
            description,
            staged=staged,
            graphs=graphs,
            overlap=config.overlap,
            experts=ExpertCounter.of(config.model) if config.expert_statistics else None,
            tower=tower,
        )

    def prepare(self, config: EngineConfig, compilation: Compilation) -> None:
        """On a GPU, load what was compiled and record decode steps: no later step compiles or records.

        `describe` tells how long it took. Raises CompileError, LaunchError, DeviceFault, MemoryError.
        """
        from cierzo.engine.worker import warm  # Triton: no CPU needs it

        lines = [compilation.finish()]
        if self._graphs is not None:
            blocks = -(-config.scheduler.max_model_len // config.cache.block_tokens)
            lines.append(warm.record_steps(partial(self.record, blocks), len(self._graphs)))
        self._description = "\n".join([self._description, *lines])

    def record(self, blocks: int, done: Callable[[], object] = lambda: None) -> None:
        """Record the steps that are replayed. blocks: of the longest sequence. done: called after each."""
        if self._graphs is not None and self._staged is not None:
            experts = None if self.experts is None else (len(self.experts.layers), self.experts.top_k)
            self._graphs.record_all(self._staged.tables(self._max_running, blocks), experts, done)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, batch: Batch) -> None:
        """Forward pass of the whole batch; logits of the rows that sample, and of no others.

        Raises DeviceFault for a CUDA error, MemoryError for a device that is full; so does `collect`.
        """
        with watching(f"step {plan.step}"):
            self._launch(plan, batch)

    def _launch(self, plan: StepPlan, batch: Batch) -> None:
        if plan.kept is not None:
            self._embeddings.keep(plan.kept)
        for image, stages in plan.begun:
            self._embeddings.advance(image, stages)
        for seq in plan.seqs:
            if seq.admission is not None:
                self._sampler.admit(seq.slot, seq.key[1], seq.admission)
        # Rows lie prompts first, samples in the order of the plan: the same where every row is a decode.
        every = batch.num_expanded == 0 and len(batch.sample_rows) == len(batch.token_ids)
        rows, sample_rows = self._rows(batch)
        scores: Scores = dict
        if batch.num_expanded and any(seq.scoring is not None for seq in plan.seqs):
            head = self._model.head(rows, self._kv)
            scores = self._scorer.launch(plan.seqs, batch, head)
            logits = head(sample_rows)
        elif self._graphs is not None and self._graphs.fits(rows):
            logits = self._graphs.logits(rows)
            logits = logits if every else logits[sample_rows]
        else:
            logits = self._model.logits(rows, self._kv, None if every else sample_rows)
        self._steps.append(self._sample(plan, batch, logits, self._counting(rows), scores))

    def _rows(self, batch: Batch) -> tuple[StepRows, Tensor]:
        """The step's rows, with a place for their experts if those are counted, and the rows that sample."""
        if self._staged is not None:
            rows, sample_rows = self._staged.load(batch, self._sampler.chosen)
        else:
            if len(batch.pending_rows):
                batch.token_ids[batch.pending_rows] = self._sampler.chosen.numpy()[batch.pending_slots]
            rows, sample_rows = rows_in_place(batch)
        if self.experts is not None:
            shape = (len(self.experts.layers), len(batch.token_ids), self.experts.top_k)
            rows = replace(rows, expert_ids=rows.token_ids.new_empty(shape))
        if batch.image_parts:
            parts = [self._embeddings.of(image)[first:last] for image, first, last in batch.image_parts]
            rows = replace(rows, image_embeddings=torch.cat(parts))
        return rows, sample_rows

    def _embed(self, image: Image) -> Iterator[Tensor | None]:
        """Take an image through the tower's stages, the first of which reads the pixels: their staging has other
        images' by the next. Raises ValueError for a model that takes no images."""
        if self._tower is None:
            raise ValueError("the model takes no images")
        pixels = image.pixels
        values = np.frombuffer(pixels.data, np.float32)
        flat = torch.from_numpy(values) if self._pixels is None else self._pixels.to_device([values])[0]
        return self._tower(flat.view(pixels.rows * pixels.unit, pixels.columns * pixels.unit, 3))

    def _counting(self, rows: StepRows) -> Callable[[], None] | None:
        """Begin to bring a step's experts to the host; the function waits for them and counts them."""
        counter, expert_ids = self.experts, rows.expert_ids
        if counter is None or expert_ids is None:
            return None
        arrived = self._staging.to_host([expert_ids]) if self._staging else lambda: [expert_ids.numpy()]
        return lambda: counter.add(arrived()[0], "prefill" if rows.num_expanded else "decode")

    @torch.inference_mode()
    def collect(self) -> StepResult:
        """Tokens by sequence of the plan, when they are there."""
        step = self._steps.popleft()
        with watching(f"results of step {step.number}"):
            sampled = step.sampled()
            if step.count_experts is not None:
                step.count_experts()
            scores = step.scores()
        sampled.remember()
        grammars = {step.sample_seqs[row]: one.state for row, (one, _) in sampled.constraints.items()}
        late = frozenset(step.sample_seqs[row] for row in sampled.late)
        if self._steps and (following := self._steps[0].choosing) is not None:
            following.finish({step.slots[row] for row in sampled.late})
        token_ids: list[list[int]] = [[] for _ in range(step.num_seqs)]
        for index, token_id in zip(step.sample_seqs, sampled.token_ids, strict=True):
            token_ids[index] = [token_id]
        logprobs: list[list[TokenLogprobs] | None] | None = None
        if sampled.logprobs is not None:
            logprobs = [None] * step.num_seqs
            for index, entry in zip(step.sample_seqs, sampled.logprobs, strict=True):
                logprobs[index] = entry
        failures = {step.sample_seqs[row]: reason for row, reason in sampled.failures.items()}
        failures |= {index: NOT_FINITE for index, entries in scores.items() if entries is None}
        scored = {index: one for index, one in scores.items() if one}
        return StepResult(token_ids, logprobs, failures, scored, grammars, late)

    def _sample(
        self, plan: StepPlan, batch: Batch, logits: Tensor, count_experts: Callable[[], None] | None, scores: Scores
    ) -> _Step:
        """Choose the step's tokens: at once if the next step may be launched before they are collected."""
        sampling = [plan.seqs[index] for index in batch.sample_seqs]
        slots = [seq.slot for seq in sampling]
        positions = [seq.start + len(seq.token_ids) for seq in sampling]
        sampled: Callable[[], Sampled] = Sampled([]).itself
        choosing = None
        pending = set[int]()
        if self._overlap:
            pending = {row for row, seq in enumerate(sampling) if seq.token_ids[-1] == PENDING}
        if constraints := self._sampler.constraints(slots):
            choosing = Choosing(self._sampler, logits, slots, positions, pending, constraints)
            sampled = choosing.sampled if self._overlap else choosing.all
            if self._overlap:
                choosing.begin()
        elif slots and self._overlap:
            sampled = self._sampler.launch(logits, slots, positions, pending)
        elif slots:
            sampled = partial(self._sampler.sample, logits, slots, positions)
        facts = plan.step, len(plan.seqs), batch.sample_seqs, slots
        return _Step(*facts, sampled, count_experts, scores, choosing)

    def reset(self) -> None:
        """Forget what was launched and not collected, once the device has done it: the device reads memory that the
        next steps write."""
        self._steps.clear()
        if self._staging is not None:
            with watching("reset"):
                self._staging.settle()

    def describe(self) -> str:
        """The kernels in force, as printed at start."""
        return self._description


def load_runner(config: EngineConfig) -> ModelRunner:
    """A runner of the checkpoint's model, which compiles nothing any more. Raises CheckpointError, ConfigError,
    CompileError, LaunchError, DeviceFault, MemoryError."""
    compilations: list[Compilation] = []

    def begin(parameters: Mapping[str, Parameter]) -> None:
        from cierzo.engine.worker import launches, warm  # Triton: no CPU needs it

        compilations.append(warm.Compilation(config, partial(launches.weights_on_meta, config, parameters)))

    start, on_cpu = time.perf_counter(), torch.device(config.device).type == "cpu"
    with watching("loading"):
        model, kv, description = load_model(config, None if on_cpu else begin)
        if not on_cpu:
            description += f"\nweights loaded in {time.perf_counter() - start:.1f} s"
        tower = None if model.tower is None else model.tower.stages
        runner = ModelRunner.of(config, model, kv, description, tower)
    for compilation in compilations:
        runner.prepare(config, compilation)
    return runner


def load_model(
    config: EngineConfig, begin: Callable[[Mapping[str, Parameter]], None] | None = None
) -> tuple[Decoder, KVPool, str]:
    """Bind the kernels, load the checkpoint, allocate the cache -> also the table of kernels, as text.

    begin: called with the parameters before any of their values is read. What takes more than seconds shows its
    progress (progress.py). Raises CheckpointError, ConfigError.
    """
    torch.set_num_threads(config.threads)
    dtype, device = DTYPES[config.dtype], torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch finds no GPU here", field="device", limit="cpu", value="cuda")
    try:
        table = bind(config.kernels, config.device)
    except KernelChoiceError as error:
        raise ConfigError(str(error), field="kernels") from error
    try:
        native.set_threads(config.threads, config.pin_threads)
    except native.NativeError as error:
        raise ConfigError(f"pin_threads: {error}", field="pin_threads") from error
    specs = parameter_specs(config.model)
    with ExitStack() as stack:
        reader = stack.enter_context(CheckpointReader(Path(config.checkpoint)))
        progress = stack.enter_context(loading_progress())
        parameters = load_parameters(reader, specs, dtype=dtype, device="cpu", progress=progress)

        if begin is not None:
            begin(parameters)

        def build(matrices: MatrixSource, ahead: ReadAhead | None = None) -> Decoder:
            if ahead is not None:
                matrices = ReadFirst(matrices, stack.enter_context(ahead), reader, at_once=device.type == "cuda")
            return build_model(config.model, parameters, device=device, dtype=dtype, matrices=matrices)

        if table.uses_native:
            matrices = PackedMatrices(reader, config.weights, dtype, cache_dir())
            model = build(matrices, ReadAhead(parameters, reader))
            log.info("weights: %s", matrices.fill(progress))
        elif device.type == "cuda":
            source = DeviceMatrices(config.weights, dtype, device, config.activations, config.head)
            model = build(source, ReadAhead(parameters, reader, progress=progress))
        elif config.weights == PLAIN_FORMATS[dtype]:
            model = build(PlainMatrices())
        else:
            limit = f"{PLAIN_FORMATS[dtype]} without the native kernels"
            raise ConfigError(
                f"weights must be {limit}, got {config.weights}", field="weights", limit=limit, value=config.weights
            )
    return model, make_pool(config), table.describe()


def make_pool(config: EngineConfig) -> KVPool:
    """The cache's tensors. On a GPU they have one block more than the cache manager knows of: padding of recorded
    steps is written there."""
    spare_blocks = 0 if config.device == "cpu" else 1
    return KVPool(config.layout, config.cache.num_blocks + spare_blocks, config.device)
