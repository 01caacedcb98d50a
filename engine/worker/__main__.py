"""`python -m cierzo.engine.worker --socket PATH`: the core process. Started by the front end, not by hand."""

from __future__ import annotations

import argparse
import logging

from cierzo.engine.log_lines import plain_lines
from cierzo.engine.server_process import end_with_parent
from cierzo.engine.worker import progress
from cierzo.engine.worker.process import run


def main() -> int:
    """Parse and run."""
    end_with_parent()
    parser = argparse.ArgumentParser(
        prog="cierzo.engine.worker", description="The core process.", allow_abbrev=False
    )
    parser.add_argument("--socket", required=True, metavar="PATH", help="Unix socket of the front end")
    plain_lines("text")
    progress.log.setLevel(logging.INFO)
    return run(parser.parse_args().socket)


if __name__ == "__main__":
    raise SystemExit(main())
