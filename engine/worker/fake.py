"""A runner without a model: the next token is a function of what it reads back through the block table.

It writes a word per token into a "cache" of numpy, at the batch's cache slots, as a model writes keys and values.
A word mixes the token, its position and its form, and where an image stands its digest and which of its embeddings
it is, so that a wrong block, a stale entry, a wrong position, another image or a prompt token that was computed as
a generated one changes what follows. No torch here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from cierzo.cache.config import CacheConfig
from cierzo.engine.config import EngineConfig, EngineOptions
from cierzo.engine.model.config import GqaConfig, ModelConfig
from cierzo.engine.model.rope_config import RopeConfig
from cierzo.engine.worker.batch import Batch, Segments
from cierzo.engine.worker.grammars import Constraint, await_masks, follow_all
from cierzo.engine.worker.images import Embeddings
from cierzo.engine.worker.masks import NOTHING_LEFT, Masks
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.images import Image
from cierzo.scheduler.plan import (
    Admission,
    GrammarState,
    RequestKey,
    SeqPlan,
    StepPlan,
    StepResult,
    TokenLogprobs,
    packed_entry,
)

Words = NDArray[np.uint64]
Script = Callable[[RequestKey, int], int]  # (request, index in its output) -> token id

_ONE = np.uint64(1)


def mix(words: Words) -> Words:
    """A 64-bit finaliser, elementwise (splitmix64; Steele, Lea, Flood, OOPSLA 2014)."""
    words = (words + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def fake_config(
    scheduler: SchedulerConfig, cache: CacheConfig, *, vocab_size: int = 32_000, eos_token_ids: tuple[int, ...] = ()
) -> EngineConfig:
    """A configuration without a checkpoint: limits as given, around a model of one narrow layer."""
    model = ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        mlp_width=8,
        max_position_embeddings=max(scheduler.max_model_len, 1 << 18),
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention=GqaConfig(num_kv_heads=1, head_dim=8),
        moe=None,
        rope=RopeConfig(dim=8, theta=10_000.0, interleaved=False, scaling=None),
        query_scaling=None,
        bos_token_id=None,
        eos_token_ids=eos_token_ids,
    )
    options = EngineOptions(model="fake")
    return EngineConfig(
        checkpoint="",
        name="fake",
        device="cpu",
        dtype="float32",
        weights="float32",
        activations="float32",
        head="float32",
        threads=1,
        pin_threads=False,
        overlap=False,
        graph_sequences=0,
        runner="fake",
        profile="balanced",
        card=None,
        expert_statistics=False,
        model=model,
        layout=model.cache_layout(cache.block_tokens, "float32"),
        cache=cache,
        scheduler=scheduler,
        kernels=options.kernels,
        frontend=options.frontend,
    )


class FakeRunner:
    """A `Runner` for tests and load. Of the sampling parameters it honours seed, greedy temperature, masks and
    numbers of logprobs alone.

    `reads` "context": the next token depends on every token of the context, read anew (for tests; cost grows with
    the context). "last": on the last token alone (for benchmarks; constant cost). `script` overrides the tokens.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_blocks: int,
        block_tokens: int,
        max_running: int,
        reads: Literal["context", "last"] = "context",
        script: Script | None = None,
        image_stages: int = 1,
    ) -> None:
        self._image_stages = image_stages
        self.experts = None  # it has none
        self._vocab_size = np.uint64(vocab_size)
        self._block_tokens = block_tokens
        self._reads = reads
        self._script = script
        self._cache = np.zeros(num_blocks * block_tokens, np.uint64)
        self._seeds = np.zeros(max_running, np.uint64)
        self._num_logprobs: list[int | None] = [None] * max_running
        self._chosen = np.zeros(max_running, np.int64)  # the last token of every slot
        self._masked: dict[int, tuple[Admission, list[int]]] = {}  # by slot, of who has masks; and its output
        self._late_slots: set[int] = set()  # for which the last step chose nothing
        self._results: deque[StepResult] = deque()
        self.towers: list[bytes] = []  # digests of the images that were made
        self._embeddings = Embeddings(self._embed)

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        """Write the step's tokens to the cache and choose the next ones."""
        if plan.kept is not None:
            self._embeddings.keep(plan.kept)
        for image, stages in plan.begun:
            self._embeddings.advance(image, stages)
        for seq in plan.seqs:
            if seq.admission is not None:
                self._admit(seq)
        batch.token_ids[batch.pending_rows] = self._chosen[batch.pending_slots]
        self._write(batch)
        slots, contexts = self._ends(batch)
        words = self._words(batch, slots, contexts)
        words = mix(words ^ self._seeds[slots] ^ mix(contexts.astype(np.uint64)))
        result = self._choose(plan, batch, words)
        if batch.num_expanded:  # prompts, of which some may be scored
            scored = {at: self._score(seq, batch) for at, seq in enumerate(plan.seqs) if seq.scoring is not None}
            result = msgspec.structs.replace(result, prompt_logprobs=scored)
        self._results.append(result)

    def collect(self) -> StepResult:
        """The result of the step launched first of those not collected."""
        return self._results.popleft()

    def reset(self) -> None:
        """Forget what was launched and not collected."""
        self._results.clear()

    def describe(self) -> str:
        """Describe what runs, as printed at start."""
        return "fake runner    tokens are made up; no model is loaded"

    def _admit(self, seq: SeqPlan) -> None:
        assert seq.admission is not None
        sampling = seq.admission.sampling
        words = mix(np.array([sampling.seed or 0, seq.key[1]], np.uint64))
        drawn = (words << np.array([0, 1], np.uint64)).sum()
        self._seeds[seq.slot] = drawn if sampling.temperature else 0  # a greedy answer depends on no seed
        self._num_logprobs[seq.slot] = sampling.logprobs
        self._masked.pop(seq.slot, None)
        if seq.admission.constraint is not None:
            seq.admission.constraint.admit(seq.admission.output_token_ids)
        if Masks.of(seq.admission) is not None or seq.admission.constraint is not None:
            self._masked[seq.slot] = seq.admission, [*seq.admission.output_token_ids]

    def _embed(self, image: Image) -> Iterator[Words | None]:
        """Words in the place of an image's embeddings: of its digest, and of their number."""
        for _ in range(self._image_stages - 1):
            yield None
        self.towers.append(image.digest)
        digest = np.frombuffer(blake2b(image.digest, digest_size=8).digest(), np.uint64)
        yield mix(digest + np.arange(image.num_embeddings, dtype=np.uint64))

    def _write(self, batch: Batch) -> None:
        words = mix(batch.token_ids.astype(np.uint64)) + mix(batch.positions.astype(np.uint64) << _ONE)
        if batch.image_parts:
            parts = [self._embeddings.of(image)[first:last] for image, first, last in batch.image_parts]
            words[batch.image_rows] ^= np.concatenate(parts)
        words[: batch.num_expanded] += _ONE  # the form belongs to the token
        self._cache[batch.cache_slots] = mix(words)

    def _score(self, seq: SeqPlan, batch: Batch) -> list[msgspec.Raw]:
        """Entries of a prompt: a token's log-probability depends on all that its row depends on, and on itself."""
        assert seq.scoring is not None
        start, token_ids, count = seq.scoring.start, seq.scoring.token_ids, seq.scoring.count
        contexts = np.arange(start + 1, start + 1 + len(token_ids), dtype=np.int32)
        slots = np.full(len(token_ids), seq.slot, np.int32)
        words = self._words(batch, slots, contexts)
        values = (mix(words ^ np.array(token_ids, np.uint64)) % np.uint64(4096)).astype(np.float64) / -256
        vocab_size = int(self._vocab_size)
        return [
            packed_entry(made_up_logprobs(token, count, vocab_size, value))
            for token, value in zip(token_ids, values.tolist(), strict=True)
        ]

    def _ends(self, batch: Batch) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Block table row and context length of every sampling row, by the segment that it ends."""
        rows, expanded = batch.sample_rows, batch.num_expanded
        slots = np.empty(len(rows), np.int32)
        contexts = np.empty(len(rows), np.int32)
        for group, first, chosen in (
            (batch.expanded, 0, rows < expanded),
            (batch.absorbed, expanded, rows >= expanded),
        ):
            index = _segment_that_ends(group, rows[chosen] - first)
            slots[chosen] = group.table_rows[index]
            contexts[chosen] = group.context_lengths[index]
        return slots, contexts

    def _words(self, batch: Batch, slots: NDArray[np.int32], contexts: NDArray[np.int32]) -> Words:
        """A word for each context, of a slot's sequence and a number of tokens, made of what it holds."""
        read = self._read_last if self._reads == "last" else self._read
        return read(batch, slots, contexts)

    def _read_last(self, batch: Batch, slots: NDArray[np.int32], contexts: NDArray[np.int32]) -> Words:
        blocks, offsets = np.divmod(contexts - 1, self._block_tokens)
        return self._cache[batch.block_tables[slots, blocks].astype(np.int64) * self._block_tokens + offsets]

    def _read(self, batch: Batch, slots: NDArray[np.int32], contexts: NDArray[np.int32]) -> Words:
        sums = np.empty(len(slots), np.uint64)
        pages = self._cache.reshape(-1, self._block_tokens)
        for row, (slot, context) in enumerate(zip(slots.tolist(), contexts.tolist(), strict=True)):
            blocks = batch.block_tables[slot, : -(-context // self._block_tokens)]
            words = pages[blocks].reshape(-1)[:context]
            sums[row] = (words * (mix(np.arange(context, dtype=np.uint64)) | _ONE)).sum()
        return sums

    def _choose(self, plan: StepPlan, batch: Batch, words: Words) -> StepResult:
        """The step's result; `words` holds one for each row that samples, made of all that its token depends on."""
        tokens: list[int] = (words % self._vocab_size).astype(np.int64).tolist()
        if self._script is not None:
            sampling = [plan.seqs[index] for index in batch.sample_seqs]
            tokens = [self._script(seq.key, _output_index(seq)) for seq in sampling]
        failures, grammars = dict[int, str](), dict[int, GrammarState]()
        late_slots, self._late_slots = self._late_slots, set()
        if self._masked:
            failures, grammars = self._mask(plan, batch, tokens, late_slots)
        late = frozenset[int]()
        if self._late_slots:
            late = frozenset(index for index in batch.sample_seqs if plan.seqs[index].slot in self._late_slots)
        token_ids: list[list[int]] = [[] for _ in plan.seqs]
        logprobs: list[list[TokenLogprobs] | None] | None = None
        for index, token in zip(batch.sample_seqs, tokens, strict=True):
            token_ids[index] = [token]
            self._chosen[plan.seqs[index].slot] = token
            count = self._num_logprobs[plan.seqs[index].slot]
            if count is not None:
                if logprobs is None:
                    logprobs = [None] * len(plan.seqs)
                logprobs[index] = [made_up_logprobs(token, count, int(self._vocab_size))]
        return StepResult(token_ids, logprobs, failures, grammars=grammars, late=late)

    def _mask(
        self, plan: StepPlan, batch: Batch, tokens: list[int], late_slots: set[int]
    ) -> tuple[dict[int, str], dict[int, GrammarState]]:
        """Put other tokens in the place of those that masks forbid; by sequence, why it can have none, and what its
        grammar says of its output then. late_slots: those that the step before chose nothing for.

        Outputs are taken from the plans, as a step may come again. Masks are made anew each time: only tests ask
        for any.
        """
        failures, grammars = dict[int, str](), dict[int, GrammarState]()
        pending = {*batch.pending_slots.tolist()}
        last = batch.token_ids[batch.sample_rows].tolist()
        for row, index in enumerate(batch.sample_seqs):
            seq = plan.seqs[index]
            if seq.slot not in self._masked:
                continue
            admission, output = self._masked[seq.slot]
            if count := _output_index(seq):
                output[count - 1 :] = [last[row]]
            else:
                output.clear()
            constraint: Constraint | None = admission.constraint
            if constraint is not None:
                is_behind_late = seq.slot in late_slots & pending
                if not is_behind_late:
                    constraint.admit((*output,))
                    await_masks([constraint])
                if is_behind_late or not constraint.settle() or constraint.state == "ended":
                    self._late_slots.add(seq.slot)
                    continue
                if constraint.error:
                    failures[index] = constraint.error
                    continue
            masks = Masks(admission.sampling.allowed_token_ids, admission.banned, admission.thinking, output)
            token = _permitted(masks, constraint, tokens[row], int(self._vocab_size))
            if token is None:
                beside = f" of those that the grammar permits {constraint.place}" if constraint is not None else ""
                failures[index] = f"{NOTHING_LEFT}{beside}"
                continue
            tokens[row] = token
            if constraint is not None:
                if follow_all([(constraint, token)]):
                    self._late_slots.add(seq.slot)
                elif constraint.error:
                    failures[index] = constraint.error
                grammars[index] = constraint.state
        return failures, grammars


def _permitted(masks: Masks, constraint: Constraint | None, token: int, vocab_size: int) -> int | None:
    """The token, or the next one behind it that may be chosen."""
    forced = masks.forced(pending=False)
    if forced is not None:
        return forced.token_id
    candidates: Sequence[int] = masks.allowed.tolist() or range(vocab_size)
    if constraint is not None:
        held = np.unpackbits(constraint.mask.view(np.uint8), bitorder="little")[:vocab_size]
        bound = np.flatnonzero(held)
        candidates = (np.intersect1d(bound, masks.allowed) if masks.allowed.size else bound).tolist()
    if not candidates:
        return None
    banned = {*masks.banned(pending=False)[0].tolist()}
    first = candidates.index(token) if token in candidates else token % len(candidates)
    behind = (candidates[(first + step) % len(candidates)] for step in range(len(candidates)))
    return next((one for one in behind if one not in banned), None)


def made_up_logprobs(token: int, count: int, vocab_size: int, logprob: float = -0.5) -> TokenLogprobs:
    """Numbers that are recognisable and fall: the token first, its neighbours after it."""
    top = [(token + rank) % vocab_size for rank in range(min(count, vocab_size))]
    return TokenLogprobs(token, logprob, top, [logprob - rank for rank in range(len(top))])


def _segment_that_ends(group: Segments, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    ends = group.query_starts[1:] - 1
    index = np.searchsorted(ends, rows)
    assert np.array_equal(ends[index], rows), f"sampling rows {rows} are no ends of segments {ends}"
    return index


def _output_index(seq: SeqPlan) -> int:
    return seq.start + len(seq.token_ids) - seq.num_prompt_tokens
