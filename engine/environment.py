"""Environment variables: this is the one file of the package that reads them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast, get_args

from cierzo.engine.errors import ConfigError, refusal
from cierzo.engine.settings import limit_of
from cierzo.kernels.config import InstructionSet

ENVIRONMENT_PREFIX = "CIERZO_"
_KNOWN_VARIABLES = {
    "CIERZO_CACHE_DIR": "folder for converted and packed checkpoints",
    "CIERZO_INSTRUCTION_SET": "what instruction_set is where nothing else is said",
    "CIERZO_NATIVE": "0: the installation leaves out the C++ kernels (setup.py)",
}


def check_environment() -> None:
    """An unknown CIERZO_ variable is an error, as is a wrong value: no setting that is given passes in silence."""
    for name in os.environ:
        if name.startswith(ENVIRONMENT_PREFIX) and name not in _KNOWN_VARIABLES:
            known = ", ".join(sorted(_KNOWN_VARIABLES))
            raise ConfigError(
                f"unknown environment variable {name}; known: {known}",
                field=name,
                limit=known,
                value=os.environ[name],
            )
    if "CIERZO_CACHE_DIR" in os.environ:
        cache_dir()
    default_instruction_set()


def default_instruction_set() -> InstructionSet:
    """The instruction set that "auto" stands for: CIERZO_INSTRUCTION_SET, else "auto". Raises ConfigError."""
    chosen = os.environ.get("CIERZO_INSTRUCTION_SET", "auto")
    if chosen not in get_args(InstructionSet):
        raise refusal("CIERZO_INSTRUCTION_SET", limit_of(InstructionSet), chosen)
    return cast(InstructionSet, chosen)


def spin_briefly() -> None:
    """Have OpenMP's threads spin for microseconds only, unless the user said otherwise; before torch is imported.

    By default they spin while they wait for each other. If another process takes a core, a sibling spins for as
    long as the thread that it waits for does not run. `GOMP_SPINCOUNT=N cierzo demo --max-tokens 24` on two cores,
    beside one busy process: 0.7 tokens/s with libgomp's own 300,000 spins, 7.0 with 5,000; alone, 28 with either.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def cache_dir() -> Path:
    """Where converted checkpoints are kept: CIERZO_CACHE_DIR, else cierzo/ in the user's cache folder."""
    chosen = os.environ.get("CIERZO_CACHE_DIR")
    if chosen is not None and not os.path.isabs(chosen):
        raise refusal("CIERZO_CACHE_DIR", "an absolute path", chosen)
    user_cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(user_cache):
        user_cache = os.path.expanduser("~/.cache")
    if chosen is None and not os.path.isabs(user_cache):
        raise refusal("CIERZO_CACHE_DIR", "set", chosen, "this user has no home folder")
    return Path(chosen or user_cache, "" if chosen else "cierzo")
