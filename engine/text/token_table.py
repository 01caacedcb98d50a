"""The vocabulary as grammars see it: the bytes of each token, and llguidance's tokenizer made of them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cierzo.engine.messages import Vocabulary
from cierzo.engine.text import vocabulary as words

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_kept: dict[int, tuple[Vocabulary, LLTokenizer]] = {}  # by the id of the table, which lives as long


@lru_cache(maxsize=1)
def token_table(vocabulary: words.Vocabulary, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Vocabulary:
    """The table of a tokenizer's vocabulary, as long as the model's. Takes a tenth of a second for 131,072 tokens;
    the last one is kept, as several ask for it."""
    controls = {*vocabulary.special_ids.values(), *getattr(vocabulary, "control_ids", {}).values()}
    return Vocabulary(
        tokens=[vocabulary.token_bytes(token_id) for token_id in range(vocab_size)],
        control_ids=sorted(token_id for token_id in controls if token_id < vocab_size),
        eos_token_ids=[*eos_token_ids],
    )


def grammar_tokenizer(table: Vocabulary) -> LLTokenizer:
    """llguidance's tokenizer of a table, whose masks are as long as its `tokens`. For 131,072 tokens it takes half
    a second, all of it with the interpreter's lock: nothing else of the process goes on. And 50 MB.

    The last one is kept for whoever asks for it again: its users only read it. A control token is in no text: a
    grammar has it by its id, as in `<[5]>`. A token without bytes that is none is
    in no mask. Raises ValueError for a table without a token that ends an answer.
    """
    from llguidance import LLTokenizer

    if not table.eos_token_ids:
        raise ValueError("grammars need a token that ends an answer")
    if (kept := _kept.get(id(table))) is not None:
        return kept[1]
    tokens: Any = _Tokens(table)
    tokenizer = LLTokenizer(tokens, n_vocab=len(table.tokens), eos_token=table.eos_token_ids)
    _kept.clear()
    _kept[id(table)] = table, tokenizer
    return tokenizer


class _Tokens:
    """A table as llguidance's TokenizerWrapper has it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, table: Vocabulary) -> None:
        self.eos_token_id = table.eos_token_ids[0]
        self.special_token_ids = sorted({*table.control_ids, *table.eos_token_ids})
        self.tokens = [*table.tokens]
        for token_id in self.special_token_ids:
            self.tokens[token_id] = b"<[%d]>" % token_id  # its name, which nothing looks for

    def __call__(self, text: str) -> list[int]:
        """Encode nothing: our grammars force no tokens (`no_forcing`), so that each spelling of a text will do."""
        raise NotImplementedError
