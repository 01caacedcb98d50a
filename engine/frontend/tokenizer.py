"""The former name of `engine.text.tokenizer`, for programs outside this repository that import it."""

from cierzo.engine.text.tokenizer import _byte_alphabet, load_tokenizer

__all__ = ["_byte_alphabet", "load_tokenizer"]
