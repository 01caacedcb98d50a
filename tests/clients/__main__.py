"""`make clients`: lm-eval and aiperf, each from an environment of its own, against the HTTP door.

Prints what each measured; the exit status is 1 if one of them fails, or measures what the engine does not say.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from cierzo.bench.peers.engine import EngineFailed
from cierzo.engine.config import cache_dir
from cierzo.engine.errors import CierzoError
from cierzo.engine.weights.gguf import prepare_demo
from clients import harness, load
from clients.served import Failed

PARTS = {"lm-eval": harness.measure, "aiperf": load.measure}


def main() -> int:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(prog="clients", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("build/clients"), help="of environments and results")
    arguments = parser.parse_args()
    if unknown := {*arguments.parts} - {*PARTS}:
        parser.error(f"{', '.join(unknown)}: not of {', '.join(PARTS)}")
    folder, checkpoint, failed = arguments.folder.resolve(), prepare_demo(cache_dir()), False
    for name in arguments.parts or PARTS:
        results = folder / "results" / name
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir(parents=True)
        try:
            for line in PARTS[name](folder / name, checkpoint, results):
                print(f"{name}: {line}", flush=True)
        except (Failed, EngineFailed, CierzoError, OSError) as error:
            failed = True
            print(f"{name} FAILED: {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
