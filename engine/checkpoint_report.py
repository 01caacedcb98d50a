"""Report of a checkpoint's folder before its weights are loaded: what is in it, what it needs, what is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cierzo.engine.errors import CheckpointError
from cierzo.engine.requirements import Needs, needs_of
from cierzo.engine.text.facts import Words, read_words
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.weights.info import CheckpointInfo, SpecsOf, as_text, examine


class CheckpointReport(msgspec.Struct, frozen=True, kw_only=True):
    """A folder as `cierzo info` tells of it; `str()` is what it prints. notes: what a server would warn of.
    refused: why it cannot be served, in the words that loading it would give."""

    checkpoint: CheckpointInfo
    words: Words
    needs: Needs | None
    notes: tuple[str, ...]
    refused: tuple[str, ...]

    def __str__(self) -> str:
        model = self.checkpoint.model
        rows = [*self.checkpoint.rows(), *self.words.rows(None if model is None else model.vocab_size)]
        rows += [] if self.needs is None else self.needs.rows()
        said = [*(f"note: {note}" for note in self.notes), *(f"refused: {reason}" for reason in self.refused)]
        return "\n".join([as_text(rows), *said])


def report(
    folder: Path, specs_of: SpecsOf | None = None, tokenizer: str = "auto", text_only: bool = False
) -> CheckpointReport:
    """Read config, headers and tokenizer files, and make the tokenizer and the chats as a server would.

    specs_of: with it, tensors are compared with the architecture. tokenizer, text_only: the engine's settings.
    """
    checkpoint, wrong = examine(folder, specs_of, text_only)
    model = checkpoint.model
    words, notes = read_words(folder, tokenizer), list[str]()
    try:
        prompts = PromptEncoder.load(folder, tokenizer, None if model is None else model.vocab_size)
    except CheckpointError as error:
        told = {one.field for one in wrong}  # a config.json that both of them read
        wrong += [] if error.field in told else [error]
    else:
        notes = prompts.notes()
        words = msgspec.structs.replace(words, efforts=prompts.efforts or ())
        if prompts.template is None:
            words = msgspec.structs.replace(words, chat="", abilities=())
    return CheckpointReport(
        checkpoint=checkpoint,
        words=words,
        needs=None if model is None else needs_of(folder, model),
        notes=tuple(notes),
        refused=tuple(error.message for error in wrong),
    )
