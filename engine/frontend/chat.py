"""The former name of `engine.text.chat`, for programs outside this repository that import it."""

from cierzo.engine.text.chat import ChatTemplate

__all__ = ["ChatTemplate"]
