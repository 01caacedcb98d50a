"""`python -m standin MODULE ARGUMENT...`: the `main` of a module beside this one, which the twin can import too."""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    raise SystemExit(importlib.import_module(f"standin.{sys.argv[1]}").main(*sys.argv[2:]))
