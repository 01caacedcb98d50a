"""`python -m structured [NAME ...]`: all, or those named. Each prints its figures; exit status 1 if one fails."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from structured import exact, first_mask, hostile, schemas

MASKS = 31  # rounds of each grammar


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="structured", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schemas", type=int, default=1000, metavar="N", help="random ones")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first of them")
    parser.add_argument("--requests", type=int, default=400, metavar="N", help="that are asked again in other ways")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="of each hostile grammar")
    parser.add_argument("--folder", type=Path, default=Path("build/structured"), help="where the public suite lies")
    parser.add_argument("names", nargs="*", help="random, suite, exact, first-mask, hostile")
    arguments = parser.parse_args()
    count, seed = arguments.schemas, arguments.seed
    parts: dict[str, Callable[[], bool]] = {
        "random": lambda: schemas.run("random schemas", schemas.random_schemas(count, seed)),
        "suite": lambda: schemas.run("the public suite", schemas.suite_schemas(arguments.folder)),
        "exact": lambda: exact.run(arguments.requests, seed),
        "first-mask": lambda: asyncio.run(first_mask.measure(MASKS)),
        "hostile": lambda: hostile.run(arguments.rounds),
    }
    if unknown := set(arguments.names) - set(parts):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    verdicts = {}
    for name in arguments.names or parts:
        print(name, flush=True)
        verdicts[name] = parts[name]()
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
