"""`cierzo info`."""

from __future__ import annotations

import argparse

import msgspec

from cierzo.engine.checkpoint import checkpoint_folder
from cierzo.engine.config import EngineOptions, checkpoint_path
from cierzo.engine.options import add_checkpoint, add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, and the settings of what is read of it."""
    add_checkpoint(parser)
    add_options(parser, EngineOptions, skip={*EngineOptions.__struct_fields__} - {"tokenizer", "text_only"})
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")


def run(arguments: argparse.Namespace) -> int:
    """Print what the folder holds and needs; exit status 1 if it would be refused."""
    path = checkpoint_path(checkpoint_folder(arguments.checkpoint))
    from cierzo.engine import checkpoint_report  # imports jinja2 and tokenizers
    from cierzo.engine.model.build import parameter_specs  # imports torch

    found = checkpoint_report.report(path, parameter_specs, arguments.tokenizer, arguments.text_only)
    print(msgspec.json.encode(found).decode() if arguments.json else found)
    return int(bool(found.refused))
