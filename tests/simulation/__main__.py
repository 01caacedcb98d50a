"""`python -m simulation SEED` repeats a seed; `--seeds N` runs N of them from SEED on, over all processors.

The last line is PASS, or the seeds that failed, the first ones each with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

from .world import World

COMMAND = "PYTHONPATH=tests .venv/bin/python -m simulation"
SHOWN = 5


def run_seed(seed: int) -> tuple[int, list[str], Counter[str]]:
    """One world: the seed, what was wrong, what happened."""
    world = World(seed)
    wrongs = world.run()
    return seed, wrongs, world.counts


def main() -> int:
    """Run seeds, tell what happened in them; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="simulation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="so many, from this one on")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    counts: Counter[str] = Counter()
    failed: list[tuple[int, list[str]]] = []
    start = time.monotonic()
    with ProcessPoolExecutor(1 if len(seeds) == 1 else os.cpu_count()) as pool:
        for seed, wrongs, counted in tqdm(
            pool.map(run_seed, seeds, chunksize=min(20, max(1, len(seeds) // 8))),
            total=len(seeds),
            disable=None,
            delay=2.0,
        ):
            counts.update(counted)
            if wrongs:
                failed.append((seed, wrongs))
    print(", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())))
    for seed, wrongs in failed[:SHOWN]:
        shown = "\n  ".join(wrongs[: 20 if len(seeds) == 1 else 3])
        print(f"FAIL  seed {seed} ({len(wrongs)} violations): {COMMAND} {seed}\n  {shown}")
    if len(failed) > SHOWN:
        print(f"and seeds {', '.join(str(seed) for seed, _ in failed[SHOWN:])}")
    verdict = f"FAIL  {len(failed)} of" if failed else "PASS "
    print(f"{verdict} {len(seeds):,} seeds in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
