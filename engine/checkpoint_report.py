"""Report of a checkpoint's folder before anything is loaded: what is in it, what it needs, what is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cierzo.engine.requirements import Needs, needs_of
from cierzo.engine.text.facts import Words, read_words
from cierzo.engine.weights.info import CheckpointInfo, SpecsOf, as_text, examine


class CheckpointReport(msgspec.Struct, frozen=True, kw_only=True):
    """A folder as `cierzo info` tells of it; `str()` is what it prints. refused: why it cannot be served, in the
    words that loading it would give."""

    checkpoint: CheckpointInfo
    words: Words
    needs: Needs | None
    refused: tuple[str, ...]

    def __str__(self) -> str:
        model = self.checkpoint.model
        rows = [*self.checkpoint.rows(), *self.words.rows(None if model is None else model.vocab_size)]
        rows += [] if self.needs is None else self.needs.rows()
        return "\n".join([as_text(rows), *(f"refused: {reason}" for reason in self.refused)])


def report(folder: Path, specs_of: SpecsOf | None = None) -> CheckpointReport:
    """Read config, headers and tokenizer files. specs_of: with it, tensors are compared with the architecture."""
    checkpoint, wrong = examine(folder, specs_of)
    model = checkpoint.model
    words, wrong_words = read_words(folder, None if model is None else model.vocab_size)
    return CheckpointReport(
        checkpoint=checkpoint,
        words=words,
        needs=None if model is None else needs_of(folder, model),
        refused=tuple(error.message for error in (*wrong, *wrong_words)),
    )
