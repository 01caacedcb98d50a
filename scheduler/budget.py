"""Budget of a step: tokens and predicted seconds that are left, and what it has taken on."""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Iterable, Sequence

from cierzo.scheduler import policy
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.cost import LEAST_CHUNK, StepCost, StepWork
from cierzo.scheduler.images import EmbeddingBook, Image, MissingImage
from cierzo.scheduler.plan import RequestKey, SeqPlan

NO_SEQUENCE = -1  # in the place of an index


class StepBudget:
    """The budget of one step: first its decode rows, then one chunk after the other.

    Tokens are a cap. Where a price is known and a target set, predicted seconds count too. A step's first chunk is
    at least one that is worth it, so that the prompt that came first always advances; the others fill what is left.
    An image that has to be made is work of the chunk with the first row that needs it. Where there is no time for
    it, the chunk ends before it, and beside decode rows the step takes as many of its stages as there is time for,
    the first one that it finds at least one. Where nobody decodes, that one is made whatever it takes.
    """

    __slots__ = (
        *("tokens", "seqs", "num_prompts", "_num_decodes", "_limits", "_cost", "_seconds"),
        *(
            "_sequences",
            "_decode_context",
            "_rows",
            "_rows_left",
            "_pairs",
            "_context",
            "_images",
            "_book",
            "begun",
        ),
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
        self._images: list[tuple[int, float, float]] = []  # that are made: index in `seqs`, embeddings, their pairs
        self.begun: tuple[Image, int] | None = None  # behind the last chunk: an image, and stages of it
        self._book = book
        self._seconds, self._rows_left = math.inf, sys.maxsize
        if cost is not None and limits.max_step_s:
            self._rows_left = cost.most_rows
            self._seconds = limits.max_step_s - cost.seconds(self.work()) - cost.prompt_s

    @property
    def is_spent(self) -> bool:
        """Whether nothing more fits."""
        has_time = self._seconds > 0 and self._rows_left >= LEAST_CHUNK
        return self.tokens == 0 or (self._has_work and not has_time)

    def chunk(
        self,
        start: int,
        num_missing: int,
        *,
        contended: bool,
        num_waiting: int,
        admitted: bool,
        lacking: Sequence[MissingImage] = (),
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
            if not self._has_work:
                most = max(most, cost.least_tokens(start))
            elif admitted:
                most = max(most, LEAST_CHUNK)
            if contended:
                most = min(most, self._rows_left)
            if most < LEAST_CHUNK:
                most = 0
            count = min(count, most)
        made: list[MissingImage] = []
        self.begun = None
        for image in lacking:
            if image.first >= count:
                break
            is_shared = self.num_prompts + num_waiting > 1
            count = self._with_image(image, made, start, count, seconds, contended, is_shared)
        if is_timed and count == num_missing - 1 > 1:
            count -= 1  # a single token would be a decode row, which no budget of time cuts
        if cost is not None and count:
            self._seconds -= cost.chunk_s(start, count)
        self.tokens -= count
        if count:
            for one in made:
                self._make(one, len(self.seqs), one.stages)
            self._sequences += 1
            self._rows += count
            self._rows_left -= count
            self._pairs += count * (start + (count + 1) / 2)
            self._context += start + count
        return count

    def _with_image(
        self,
        image: MissingImage,
        made: list[MissingImage],
        start: int,
        count: int,
        seconds: float,
        contended: bool,
        is_shared: bool,
    ) -> int:
        """Tokens that a chunk of `count` has with one more image, which is appended to `made`; or before it, when
        some of it may be `begun`."""
        cost, embeddings = self._cost, image.image.num_embeddings
        if not self._book.has_room(made, image):
            return image.first
        if cost is not None and seconds < math.inf:
            is_first, in_stages = not (self._has_work or image.first), self._num_decodes > 0 and image.stages > 1
            image_s = image.share * cost.image_s(embeddings)
            left_s = seconds - sum(one.share * cost.image_s(one.image.num_embeddings) for one in made)
            before = sum(one.size for one in made) + sum(size for _, size, _ in self._images)
            room = cost.most_embeddings - before if contended else math.inf
            is_small = image.size <= room or not (before or in_stages)
            most = cost.most_tokens(start, left_s - image_s) if is_small else 0
            if most <= image.first and in_stages:
                left_s -= cost.chunk_s(start, image.first) if image.first else 0.0
                by_time = left_s / (1 + is_shared) / image_s if image_s else 1.0
                stages = int(image.stages * min(by_time, room / image.size, 1.0))
                self._begin(image, max(stages, int(is_first)))
                return image.first
            if is_first:
                most = max(most, cost.least_tokens(start))
            if most <= image.first:
                return image.first
            count = min(count, most)
        made.append(image)
        return count

    def _begin(self, image: MissingImage, stages: int) -> None:
        """Take on some stages of an image that no row of the step needs."""
        if stages > 0:
            self.begun = image.image, stages
            self._make(image, NO_SEQUENCE, stages)

    def _make(self, image: MissingImage, index: int, stages: int) -> None:
        """Take on stages of an image. index: in `seqs`, of the sequence that needs it."""
        share, embeddings = image.share * stages / image.stages, image.image.num_embeddings
        self._images.append((index, share * embeddings, share * embeddings**2))
        self._seconds -= 0.0 if self._cost is None else share * self._cost.image_s(embeddings)

    @property
    def _has_work(self) -> bool:
        """Whether it has work beside its decode rows."""
        return self._rows > 0 or bool(self._images)

    def withdraw(self, keys: Container[RequestKey]) -> None:
        """Take sequences out of the step again."""
        kept, places = list[SeqPlan](), {NO_SEQUENCE: NO_SEQUENCE}
        for index, seq in enumerate(self.seqs):
            if seq.key not in keys:
                places[index] = len(kept)
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
        if self._cost is not None:
            gone = [(size, pairs) for index, size, pairs in self._images if index not in places]
            self._seconds += sum(self._cost.images_s(*one) for one in gone)
        self._images = [(places[index], size, pairs) for index, size, pairs in self._images if index in places]
        self._book.withdraw(keys)
        self._num_decodes -= sum(seq.key in keys for seq in self.seqs[: self._num_decodes])
        self.seqs = kept

    def work(self) -> StepWork:
        """All that the step has taken on."""
        text = self._sequences, self._decode_context, self._rows, self._pairs, self._context
        if not self._images:
            return StepWork(*text)
        return StepWork(*text, sum(size for _, size, _ in self._images), sum(pairs for _, _, pairs in self._images))
