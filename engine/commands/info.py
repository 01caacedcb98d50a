"""`cierzo info`."""

from __future__ import annotations

import argparse

from cierzo.engine.checkpoint import checkpoint_folder
from cierzo.engine.config import checkpoint_path
from cierzo.engine.options import add_checkpoint
from cierzo.engine.weights import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint."""
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what the checkpoint holds."""
    print(info.describe(checkpoint_path(checkpoint_folder(arguments.checkpoint))))
    return 0
