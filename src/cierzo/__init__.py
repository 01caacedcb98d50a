"""cierzo: a serving engine for Mistral Small 4 with its own kernels."""

__version__ = "0.1.0"
