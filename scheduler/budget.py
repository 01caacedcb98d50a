"""Budget of a step: tokens and predicted seconds that are left, and what it has taken on."""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Iterable, Sequence

from cierzo.scheduler import policy
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.cost import LEAST_CHUNK, StepCost, StepWork
from cierzo.scheduler.images import EmbeddingBook, Lacking
from cierzo.scheduler.plan import RequestKey, SeqPlan


class StepBudget:
    """The budget of one step: first its decode rows, then one chunk after the other.

    Tokens are a cap. Where a price is known and a target set, predicted seconds count too. A step's first chunk is
    at least one that is worth it, so that the prompt that came first always advances; the others fill what is left.
    An image that has to be made is work of the chunk with the first row that needs it. Where there is no time for
    it, the chunk ends before it; the first chunk of a step, if it begins with one, has it made whatever that takes.
    """

    __slots__ = (
        *("tokens", "seqs", "num_prompts", "_num_decodes", "_limits", "_cost", "_seconds"),
        *("_sequences", "_decode_context", "_rows", "_rows_left", "_pairs", "_context", "_images", "_book"),
    )

    def __init__(
        self,
        limits: SchedulerConfig,
        cost: StepCost | None,
        decodes: Iterable[SeqPlan],
        decode_context: int,
        num_prompts: int,
        book: EmbeddingBook,
    ) -> None:
        """decode_context: tokens that the decode rows read. num_prompts: running sequences that get chunks. book:
        asked whether there is room for an image."""
        self.seqs = [*decodes]  # of the step, so far
        self._num_decodes = num_decodes = len(self.seqs)
        self.tokens = limits.budget_tokens - num_decodes
        self.num_prompts = num_prompts
        self._limits, self._cost = limits, cost
        self._sequences, self._decode_context = num_decodes, decode_context
        self._rows = self._context = 0
        self._pairs = 0.0
        self._images: list[tuple[int, int]] = []  # that are made: index in `seqs`, embeddings
        self._book = book
        self._seconds, self._rows_left = math.inf, sys.maxsize
        if cost is not None and limits.max_step_s:
            self._rows_left = cost.most_rows
            self._seconds = limits.max_step_s - cost.seconds(self.work()) - cost.prompt_s

    @property
    def is_spent(self) -> bool:
        """Whether nothing more fits."""
        has_time = self._seconds > 0 and self._rows_left >= LEAST_CHUNK
        return self.tokens == 0 or (self._rows > 0 and not has_time)

    def chunk(
        self,
        start: int,
        num_missing: int,
        *,
        contended: bool,
        num_waiting: int,
        admitted: bool,
        lacking: Sequence[Lacking] = (),
    ) -> int:
        """Take a prompt's next chunk, from `start` on: its tokens, 0 where there is no time for it.

        contended: other sequences run or wait. num_waiting: of these, those that wait. admitted: it begins in this
        step, and must get a token, unless that needs an image. lacking: images that have to be made for it.
        """
        limits, cost = self._limits, self._cost
        count = policy.chunk_tokens(num_missing, self.tokens, limits.max_chunk_tokens, contended)
        is_timed, seconds = cost is not None and self._seconds < math.inf, math.inf
        if cost is not None and is_timed:
            is_cut = num_missing > limits.max_chunk_tokens and self.num_prompts + num_waiting > 1
            seconds = self._seconds / 2 if is_cut else self._seconds
            most = cost.most_tokens(start, seconds)
            if not self._rows:
                most = max(most, cost.least_tokens(start))
            elif admitted:
                most = max(most, LEAST_CHUNK)
            if contended:
                most = min(most, self._rows_left)
            if most < LEAST_CHUNK:
                most = 0
            count = min(count, most)
        made: list[int] = []
        for image in lacking:
            if image.first >= count:
                break
            count = self._with_image(image, made, start, count, seconds, contended)
        if is_timed and count == num_missing - 1 > 1:
            count -= 1  # a single token would be a decode row, which no budget of time cuts
        if cost is not None and count:
            self._seconds -= cost.chunk_s(start, count) + sum(map(cost.image_s, made))
        self.tokens -= count
        if count:
            self._images += [(len(self.seqs), embeddings) for embeddings in made]
            self._sequences += 1
            self._rows += count
            self._rows_left -= count
            self._pairs += count * (start + (count + 1) / 2)
            self._context += start + count
        return count

    def _with_image(
        self, image: Lacking, made: list[int], start: int, count: int, seconds: float, contended: bool
    ) -> int:
        """Tokens that a chunk of `count` has with one more image, which is appended to `made`; or before it."""
        cost, embeddings = self._cost, image.num_embeddings
        if not self._book.has_room(sum(made), embeddings):
            return image.first
        is_first = not (self._rows or image.first)
        if cost is not None and seconds < math.inf:
            before = sum(made) + sum(others for _, others in self._images)
            if contended and before and before + embeddings > cost.most_embeddings:
                return image.first
            most = cost.most_tokens(start, seconds - sum(map(cost.image_s, [*made, embeddings])))
            if is_first:
                most = max(most, cost.least_tokens(start))
            if most <= image.first:
                return image.first
            count = min(count, most)
        made.append(embeddings)
        return count

    def withdraw(self, keys: Container[RequestKey]) -> None:
        """Take sequences out of the step again."""
        kept = []
        for index, seq in enumerate(self.seqs):
            if seq.key not in keys:
                kept.append(seq)
                continue
            start, count = seq.start, len(seq.token_ids)
            self.tokens += count
            self._sequences -= 1
            if index < self._num_decodes:
                self._decode_context -= start + 1
                continue
            self._seconds += self._cost.chunk_s(start, count) if self._cost is not None else 0.0
            self._rows -= count
            self._rows_left += count
            self._pairs -= count * (start + (count + 1) / 2)
            self._context -= start + count
        left = [index for index, seq in enumerate(self.seqs) if seq.key not in keys]
        if self._cost is not None:
            self._seconds += sum(self._cost.image_s(made) for index, made in self._images if index not in left)
        self._images = [(left.index(index), made) for index, made in self._images if index in left]
        self._num_decodes -= sum(seq.key in keys for seq in self.seqs[: self._num_decodes])
        self.seqs = kept

    def work(self) -> StepWork:
        """All that the step has taken on."""
        made = [embeddings for _, embeddings in self._images]
        images = sum(made), float(sum(one * one for one in made))
        return StepWork(self._sequences, self._decode_context, self._rows, self._pairs, self._context, *images)
