"""A checkpoint's tekken.json, read by mistral-common: text to token ids, and the bytes of each token id."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from cierzo.engine.checkpoint_file import require_file
from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.text.spellings import pattern_of
from cierzo.engine.text.unicode import refuse_surrogates
from cierzo.engine.text.vocabulary import TEKKEN_FILE

BEGIN, END, SUFFIX, PREFIX = "<s>", "</s>", "[SUFFIX]", "[PREFIX]"
ROLES = {"bos_token": BEGIN, "eos_token": END, "pad_token": "<pad>", "unk_token": "<unk>"}
# mistral-common encodes a suffix behind this character and cuts off its tokens: so a suffix begins in mid-word.
BEFORE_SUFFIX, CUT_TOKENS = "\u263a", 2
MAX_REASON_CHARS = 300  # of what is wrong with a file, which may quote all of it


class TekkenVocabulary:
    """The Tekkenizer `inner` as a `Vocabulary`. No text becomes a control token: those are not among the tokens
    that it looks for in a text. `version`: such as "v15". `num_tokens`: control tokens, fillers among them, and all
    others."""

    strip_leading_space = False
    lost_bytes = b""  # it has a token for every byte

    def __init__(self, inner: Tekkenizer) -> None:
        self.inner = inner
        self.version: str = inner.version.value
        self.kind = f"tekken {self.version}"
        self.num_tokens = inner.n_words
        num_special = inner.num_special_tokens
        self.special_ids: Mapping[str, int] = {
            inner.id_to_piece(token_id): token_id for token_id in range(num_special)
        }
        self.control_ids: Mapping[str, int] = self.special_ids
        self.eos_token_id = self.special_ids.get(END)
        self.eos_token = "" if self.eos_token_id is None else END
        self.spellings = {role: text for role, text in ROLES.items() if text in self.special_ids}
        self._spelled = re.compile(f"({pattern_of(self.special_ids)})")
        self._begin = [self.special_ids[BEGIN]] if BEGIN in self.special_ids else []
        self._bytes = [inner.id_to_byte_piece(token_id) for token_id in range(self.num_tokens)]
        self.longest_token_bytes: int | None = max(map(len, self._bytes))

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text behind <s>, which a text cannot spell. Raises InvalidRequest for what is no
        Unicode text."""
        refuse_surrogates("text", text)
        return self._begin + self.encode_piece(text)

    def encode_piece(self, text: str) -> list[int]:
        """Token ids of a text alone. Raises InvalidRequest for a run of spaces too long to be cut into words."""
        try:
            return self.inner.encode(text, bos=False, eos=False)
        except ValueError as error:  # of the regular expression that cuts: its stack is limited
            raise InvalidRequest(
                f"the text cannot be cut into words: {str(error)[:MAX_REASON_CHARS]}",
                field="text",
                limit="no run of about a million spaces",
            ) from error

    def encode_spelled(self, text: str, *, alone: bool) -> list[int]:
        """Token ids of a text whose spellings of control tokens are those tokens; `alone`, or behind <s>, unless it
        begins with that itself."""
        refuse_surrogates("text", text)
        ids: list[int] = []
        for number, piece in enumerate(self._spelled.split(text)):
            ids += [self.special_ids[piece]] if number % 2 else self.encode_piece(piece) if piece else []
        return ids if alone or ids[:1] == self._begin else self._begin + ids

    def encode_middle(self, text: str, suffix: str) -> list[int]:
        """Token ids of the prompt for what comes between two texts. Raises InvalidRequest where the vocabulary has
        no tokens to ask for it, and for what is no Unicode text."""
        ids = self.special_ids
        if not {SUFFIX, PREFIX} <= ids.keys() or len(self.encode_piece(BEFORE_SUFFIX)) != CUT_TOKENS:
            what = "the served model does not fill in the middle: its tekken.json is not made for that"
            raise InvalidRequest(what, field="suffix", limit="left out", value=suffix)
        refuse_surrogates("text", text)
        refuse_surrogates("suffix", suffix)
        behind = self.encode_piece(BEFORE_SUFFIX + suffix)[CUT_TOKENS:] if suffix else []
        return [*self._begin, ids[SUFFIX], *behind, ids[PREFIX], *self.encode_piece(text)]

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes in the text; empty for control tokens and for ids that the vocabulary does not have."""
        return self._bytes[token_id] if 0 <= token_id < self.num_tokens else b""


def load_tekken(checkpoint_dir: Path, vocab_size: int | None = None) -> TekkenVocabulary:
    """Read tekken.json. Raises CheckpointError if that cannot be done, or if it has more tokens than the model's
    vocabulary; a model may have more, which no text is made of."""
    path = checkpoint_dir / TEKKEN_FILE
    require_file(path)
    logging.getLogger("mistral_common").setLevel(logging.WARNING)  # it counts tokens aloud
    try:
        inner = Tekkenizer.from_file(path)
        vocabulary = TekkenVocabulary(inner)
        ranks = {text: inner.get_special_token(text) for text in vocabulary.special_ids}
    except Exception as error:  # it asserts what it expects, and looks up the rest
        reason = f"{type(error).__name__}: {str(error)[:MAX_REASON_CHARS]}"
        raise CheckpointError(f"{path} cannot be read: {reason}", field=TEKKEN_FILE) from error
    for text, place in vocabulary.special_ids.items():
        if ranks[text] != place:
            what = f"{path}: {text} has rank {ranks[text]}, and stands at place {place} of special_tokens"
            raise CheckpointError(what, field="special_tokens", limit=place, value=ranks[text])
    if vocab_size is not None and vocabulary.num_tokens > vocab_size:
        raise CheckpointError(
            f"{path} is not this model's: it has {vocabulary.num_tokens} tokens, the model {vocab_size}",
            field="vocab_size",
            limit=f"at least {vocabulary.num_tokens}",
            value=vocab_size,
        )
    return vocabulary
