"""Seconds of a step, from the work in it: the price that chunks are cut by, and how it is learned from steps.

A chunk of n prompt tokens from position s on has n rows and sees n s + n (n + 1) / 2 pairs of a row and a key. With
multi-head latent attention it first multiplies out all s + n tokens of its context, whatever n is: `context_pairs`
says for how many pairs a token of that counts.
"""

from __future__ import annotations

import math
import sys

import msgspec

LEAST_CHUNK = 16  # tokens
FIRST_ROWS = 64  # of the chunks of a step beside others, before any was measured
SEEN_ENOUGH = 8  # steps before a price is told
FORGET = 0.98  # what a learned step still counts for when the next one has been learned
DECODE_STRIDE = 4  # of priced steps that only decode, which are much alike, one in so many is learned from
LEARN_EVERY_S = 0.002  # of priced steps: learning takes about 43 us, which is much of a step of a tenth of this
SWEEPS = 6
FEATURES = 8  # of a step that its seconds are a sum over


class StepWork(msgspec.Struct, frozen=True, gc=False):
    """Work of a step. decode_context: tokens of context that its decode rows read. rows, pairs, context: of all its
    chunks, the pairs of a row and a key that it sees and the tokens of context that the chunks attend to.
    embeddings, embedding_pairs: of images that are made, their image tokens, and the squares of these; of one that
    is made in part, this part."""

    sequences: int = 0
    decode_context: int = 0
    rows: int = 0
    pairs: float = 0.0
    context: int = 0
    embeddings: float = 0.0
    embedding_pairs: float = 0.0


class StepCost(msgspec.Struct, frozen=True, gc=False):
    """Seconds of a step as a sum: of any step; of one with a chunk in it; of each sequence; of each token of
    context that a decode row reads; of each row of a chunk; of each pair of such a row and a key that it sees.

    most_rows: of a step's chunks together, beside others; nobody knows yet what more would take. embedding_s,
    embedding_pair_s: of an image in the tower, times its image tokens and times their square; most_embeddings: as
    most_rows.
    """

    step_s: float
    prompt_s: float
    sequence_s: float
    decode_context_s: float
    row_s: float
    pair_s: float
    context_pairs: float = 0.0
    most_rows: int = sys.maxsize
    embedding_s: float = 0.0
    embedding_pair_s: float = 0.0
    most_embeddings: int = sys.maxsize

    def seconds(self, work: StepWork) -> float:
        """Predict a step."""
        rows = work.rows
        chunks_s = (
            self.prompt_s + rows * self.row_s + (work.pairs + self.context_pairs * work.context) * self.pair_s
            if rows
            else 0.0
        )
        decodes_s = work.sequences * self.sequence_s + work.decode_context * self.decode_context_s
        return self.step_s + decodes_s + chunks_s + self.images_s(work.embeddings, work.embedding_pairs)

    def images_s(self, embeddings: float, pairs: float) -> float:
        """Predict the tower's time for images."""
        return embeddings * self.embedding_s + pairs * self.embedding_pair_s

    def image_s(self, num_embeddings: int) -> float:
        """Predict the tower's time for an image."""
        return self.images_s(num_embeddings, num_embeddings**2)

    def chunk_s(self, start: int, count: int) -> float:
        """Predict what a chunk adds to a step that has one already."""
        pairs = count * (start + (count + 1) / 2) + self.context_pairs * (start + count)
        return self.sequence_s + count * self.row_s + pairs * self.pair_s

    def most_tokens(self, start: int, seconds: float) -> int:
        """Tokens of the largest chunk from `start` on that adds no more than `seconds`: 0 where none does.

        chunk_s is a n^2 + b n + c: this is the floor of where it crosses `seconds`.
        """
        left = seconds - self.sequence_s - self.context_pairs * start * self.pair_s
        if left <= 0:
            return 0
        slope = self.row_s + self.pair_s * (start + 0.5 + self.context_pairs)
        divisor = slope + math.sqrt(slope * slope + 2 * self.pair_s * left)
        return sys.maxsize if divisor * sys.maxsize <= 2 * left else int(2 * left / divisor)

    def least_tokens(self, start: int) -> int:
        """Tokens of the smallest chunk worth a step: its own rows take as long as what its context costs whatever
        its size, so that cutting never more than doubles the time of a prompt."""
        fixed_s = self.context_pairs * start * self.pair_s
        own_s = self.row_s + self.pair_s * start
        return max(LEAST_CHUNK, math.ceil(fixed_s / own_s)) if own_s else LEAST_CHUNK

    def prompt_seconds(self, start: int, end: int) -> float:
        """Predict the least that a prompt's tokens from `start` to `end` take, alone and uncut."""
        return self.step_s + self.prompt_s + self.chunk_s(start, end - start)


class CostLearner:
    """Learns a machine's StepCost from the steps that it has taken; the same measurements give the same price.

    Least squares of the relative error, with coefficients of at least 0, over steps that count less the longer ago
    they were. The error is relative to what was measured or predicted, whichever is longer: no outlier, long or
    short, has one of more than 1.

    Until enough steps were seen the price is 0. What keeps steps to the target then, and later where a price was
    learned from few chunks, is a slow start: a step's chunks have no more rows than would fit if each took as
    long as those of a step that was seen, and at most twice as many as that.
    """

    def __init__(self, context_pairs: float = 0.0, target_s: float = 0.0) -> None:
        """target_s: the longest that a step beside others should take; 0: no matter."""
        most_rows = FIRST_ROWS if target_s else sys.maxsize
        most_embeddings = 1 if target_s else sys.maxsize
        self.cost = StepCost(
            0.0, 0.0, 0.0, 0.0, 0.0, 0.0, context_pairs, most_rows, most_embeddings=most_embeddings
        )
        self._context_pairs, self._target_s = context_pairs, target_s
        self._products = [[0.0] * FEATURES for _ in range(FEATURES)]  # sums of products of two features
        self._sums = [0.0] * FEATURES  # of products of a feature and the seconds
        # in the order in which coefficients are found: what one explains, no later one has to
        # step, row, pair, sequence, decode context, prompt, embedding, pair of these
        self._found = [0.0] * FEATURES
        self._seen = self._decodes = 0
        self._passed_s = 0.0  # of steps that nothing was learned from

    @property
    def is_priced(self) -> bool:
        """Whether enough steps were seen."""
        return self._seen >= SEEN_ENOUGH

    def observe(self, work: StepWork, seconds: float) -> bool:
        """Learn from a step that took `seconds`; whether the price has changed."""
        if seconds <= 0.0:
            return False
        if not (work.rows or work.embeddings):
            self._decodes += 1
            if self._decodes % DECODE_STRIDE and self.is_priced:
                return False
        self._passed_s += seconds
        if self._passed_s < LEARN_EVERY_S and self.is_priced:
            return False
        self._passed_s = 0.0
        scale = max(seconds, self.cost.seconds(work))
        pairs = work.pairs + self._context_pairs * work.context
        features = (
            *(1.0, work.rows, pairs, work.sequences, work.decode_context, float(work.rows > 0)),
            *(work.embeddings, work.embedding_pairs),
        )
        self._take([feature / scale for feature in features], seconds / scale)
        self._seen += 1
        most_rows = self._most(self.cost.most_rows, work.rows, seconds)
        most_embeddings = self._most(self.cost.most_embeddings, work.embeddings, seconds)
        if self.is_priced:
            step, row, pair, sequence, context, prompt, embedding, embedding_pair = self._found
            chunks = step, prompt, sequence, context, row, pair, self._context_pairs, most_rows
            self.cost = StepCost(*chunks, embedding, embedding_pair, most_embeddings)
        elif (most_rows, most_embeddings) != (self.cost.most_rows, self.cost.most_embeddings):
            self.cost = msgspec.structs.replace(self.cost, most_rows=most_rows, most_embeddings=most_embeddings)
        else:
            return False
        return True

    def _most(self, most: int, rows: float, seconds: float) -> int:
        """Rows or embeddings that the next steps may have, of `most` so far, after one of so many: by the row a
        larger step is no slower."""
        target_s = self._target_s
        if not rows or not target_s:
            return most
        within = int(rows * min(2.0, target_s / seconds))
        if seconds > target_s and rows <= most and not self.is_priced:
            return max(LEAST_CHUNK, within)
        return max(most, within)

    def _take(self, features: list[float], target: float) -> None:
        """Add a step, then improve one coefficient after the other, several times."""
        sums, found = self._sums, self._found
        for index, (mine, row) in enumerate(zip(features, self._products, strict=True)):
            sums[index] = sums[index] * FORGET + mine * target
            self._products[index] = [old * FORGET + mine * other for old, other in zip(row, features, strict=True)]
        for _ in range(SWEEPS):
            for index, row in enumerate(self._products):
                own = row[index]
                if own > sys.float_info.min:
                    rest = sums[index] - sum(map(float.__mul__, row, found)) + own * found[index]
                    found[index] = max(0.0, rest / own)
