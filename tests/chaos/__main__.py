"""`python -m chaos [NAME ...]`: all, or those named. Each prints its figures; exit status 1 if one fails."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from chaos import cancels, kills, overload, readers, soak


def _simulation(seeds: int) -> bool:
    return subprocess.run([sys.executable, "-m", "simulation", "--seeds", str(seeds)], check=False).returncode == 0


def _abuse() -> bool:
    script = Path(__file__).parents[1] / "support" / "abuse.py"  # attacks on loop and memory, its long form
    return subprocess.run([sys.executable, str(script)], check=False).returncode == 0


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--cancels", type=int, default=100_000, metavar="N")
    parser.add_argument("--readers", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="pairs of measurements beside the readers"
    )
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="of each rate of the overload")
    parser.add_argument("--seeds", type=int, default=10_000, metavar="N", help="of the simulation")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="of the soak, which must be named")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("names", nargs="*", help="kills, cancels, readers, overload, simulation, abuse, soak")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], bool]] = {
        "kills": lambda: kills.run(arguments.kills, arguments.seed),
        "cancels": lambda: cancels.run(arguments.cancels, arguments.seed),
        "readers": lambda: readers.run(arguments.readers, arguments.rounds),
        "overload": lambda: overload.run(arguments.seconds, arguments.seed),
        "simulation": lambda: _simulation(arguments.seeds),
        "abuse": _abuse,
        "soak": lambda: soak.run(arguments.minutes, arguments.seed),
    }
    if unknown := set(arguments.names) - set(parts):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    verdicts = {}
    for name in arguments.names or [name for name in parts if name != "soak"]:
        print(name, flush=True)
        verdicts[name] = parts[name]()
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
