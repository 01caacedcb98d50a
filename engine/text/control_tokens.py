"""Control tokens that only the house can ask for, by names that no text holds.

The library finds tokens by their spelling in a text, whoever wrote it. Here it is made deaf to those of control
tokens, and each gets a secret name, which is put into a text where the token is meant. So a whole prompt is still
encoded at once, with all that the library does beside a token, and nothing that a client spells becomes one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence

import tokenizers

from cierzo.engine.text.spellings import pattern_of, without

# Markers that are text to the tokenizer of some models, and control tokens to those who wrote them.
MARKERS = {
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
}
BARS = (("<|", "|>"), ("<\uff5c", "\uff5c>"))
MIN_CHARS = 2  # no spelling that is shorter can be broken


def is_control(token: tokenizers.AddedToken, templates: str) -> bool:
    """Whether a text must not become this token: it is special, or looks like a marker and is used as one."""
    text = token.content
    if len(text) < MIN_CHARS:
        return False
    if token.special or text in MARKERS or any(text.startswith(a) and text.endswith(b) for a, b in BARS):
        return True
    return text[0] in "<[" and text[-1] in ">]" and text in templates


class ControlTokens:
    """The control tokens of a tokenizer by their secret names. `first_id`: from here on its ids are those names',
    and no model's. `hidden`: tokens by their ids, which the library now names otherwise; "" where there is none."""

    def __init__(
        self, inner: tokenizers.Tokenizer, tokens: Mapping[int, tokenizers.AddedToken], deaf_to_special: bool
    ) -> None:
        """Change `inner`. tokens: by their ids. deaf_to_special: where a template spells a special token, it is
        text, as the checkpoint's configuration wants it."""
        self.secret = "\U0010fffe" + secrets.token_hex(8)
        self._cut = self.secret + "cut"
        self._ids = {token.content: index for index, token in tokens.items()}
        vocabulary = inner.get_vocab()
        self.first_id = max(vocabulary.values(), default=-1) + 1
        called = [token for token in tokens.values() if not (token.special and deaf_to_special)]
        fillers = self._rename(inner, list(tokens.values()), [_named(self.secret, token) for token in called])
        self.hidden = dict.fromkeys(fillers, "") if fillers else {}
        self.hidden |= {index: word for word, index in vocabulary.items() if index in self.hidden}
        self._real = {inner.token_to_id(self.secret + token.content): self._ids[token.content] for token in called}
        self._cut_id = inner.token_to_id(self._cut)
        self._called = {token.content for token in called}
        single = [token.content for token in called if token.single_word]
        pattern = pattern_of([text for text in self._called if text not in single])
        self._find = re.compile(f"{pattern}|(?<!\\w){pattern_of(single)}(?!\\w)")
        self._spelled = re.compile(pattern_of(self._called))
        self._begin = re.compile(f"(?<!{self.secret})(?={pattern_of(list(self._ids))}).", re.DOTALL)

    def _rename(
        self,
        inner: tokenizers.Tokenizer,
        tokens: list[tokenizers.AddedToken],
        named: list[tokenizers.AddedToken],
    ) -> set[int]:
        for token in tokens:
            token.special = True
        inner.add_tokens(tokens)
        inner.encode_special_tokens = True  # as their letters
        # The library numbers new tokens by how many there are: where ids are left out, that may be within them.
        fillers = [f"{self.secret}{number}" for number in range(self.first_id - inner.get_vocab_size())]
        inner.add_tokens([_token(filler) for filler in fillers])
        inner.add_tokens([_token(self._cut), *named])
        return {index for filler in fillers if (index := inner.token_to_id(filler)) is not None}

    def call(self, spelling: str) -> str:
        """The secret name of a control token."""
        return self.secret + spelling

    def call_all(self, text: str, mark: str = "") -> str:
        """`text` with each control token that it spells called by its secret name, and then without `mark`."""
        text = self._find.sub(lambda found: self.secret + found[0], text)
        return without(mark, text) if mark else text

    def spelled(self, text: str) -> list[str]:
        """The control tokens that `text` spells, in order, also where one beside a letter is none."""
        return self._spelled.findall(text)

    def leading_id(self, text: str) -> int | None:
        """The id of the control token that `text` begins with, None if with another text."""
        found = self._find.match(text)
        return None if found is None else self._ids[found[0]]

    def call_leading(self, text: str) -> str:
        """`text` with the control token that it begins with called by its secret name."""
        return self.secret + text

    def cut(self, text: str) -> str:
        """`text` with a cut in each control token that it spells and does not call."""
        return self._begin.sub(rf"\g<0>{self._cut}", text)

    def without_cuts(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens that are no cuts."""
        return [token_id for token_id in token_ids if token_id != self._cut_id]

    def real(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens with their own ids in place of the secret names'."""
        real = self._real
        return [real.get(token_id, token_id) for token_id in token_ids]


def _token(content: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(content, normalized=False, special=False)


def _named(secret: str, token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    """The token by its secret name, found wherever it stands: which spelling is called has been decided before."""
    return tokenizers.AddedToken(
        secret + token.content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )
