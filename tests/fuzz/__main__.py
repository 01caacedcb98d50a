"""`python -m fuzz`: 10^7 frames, 10^5 connections, and 30,000 answers that have parts, over all processors; what
fails is kept in the corpus.

Frames and splitter run under atheris if it can be imported (`make fuzz` installs it beside the environment), and
under the seeded mutator otherwise, which `--no-atheris` asks for too. The others run under the mutator.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec

from tqdm import tqdm

from fuzz import images, targets
from fuzz.mutator import mutated

SHARE = 20_000  # inputs of a job
SEQUENCES_SHARE = 200


def run_frames(seed: int, count: int) -> tuple[int, str]:
    """Mutated frames through decoder and splitter: how many, and the first finding's file."""
    rng, corpus = random.Random(seed), targets.entries("frames")
    streams = [*corpus, *targets.entries("sequences")]
    for number in range(count):
        data = mutated(rng, corpus)
        if found := tried("frames", targets.frame, data):
            return number, found
        if number % 10 == 0 and (found := tried("sequences", targets.splitter, mutated(rng, streams))):
            return number, found
    return count, ""


def run_sequences(seed: int, count: int) -> tuple[int, str]:
    """Mutated connections to one server: how many, and the first finding's file."""
    rng, corpus = random.Random(seed), targets.entries("sequences")
    frames = [len(body).to_bytes(4, "big") + body for body in targets.entries("frames")]
    connections = targets.Connections()
    try:
        for number in range(count):
            data = b"".join(rng.choices(frames, k=rng.randint(1, 6))) if rng.random() < 0.3 else rng.choice(corpus)
            hello = rng.choice(frames) if rng.random() < 0.1 else frames[[*_names()].index("hello")]
            whole = hello + mutated(rng, [data]) if rng.random() < 0.5 else mutated(rng, [data])
            if number % 6 == 0:
                whole = images.connection(rng)
                whole = mutated(rng, [whole]) if rng.random() < 0.3 else whole
            if found := tried("sequences", connections.sequence, whole):
                return number, found
    finally:
        connections.close()
    return count, ""


def run_parts(seed: int, count: int) -> tuple[int, str]:
    """Mutated answers through the reader of parts: how many, and the first finding's file."""
    rng, corpus = random.Random(seed), targets.entries("answers")
    for number in range(count):
        data = b"".join(mutated(rng, corpus) for _ in range(rng.choice((1, 1, 2))))
        if found := tried("answers", targets.parts, data):
            return number, found
    return count, ""


def _names() -> list[str]:
    return [path.stem for path in sorted((targets.CORPUS / "frames").iterdir())]


def tried(folder: str, target: Callable[[bytes], None], data: bytes) -> str:
    """Run a target; what it raised, and where the input is kept, empty if it is sound."""
    try:
        target(data)
    except Exception as error:
        path = targets.CORPUS / folder / f"found-{hashlib.sha1(data).hexdigest()[:12]}.bin"
        path.write_bytes(data)
        return f"{path}: {type(error).__name__}: {error}"
    return ""


def main() -> int:
    """Run all of it; 1 if something was found."""
    parser = argparse.ArgumentParser(prog="fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000_000, metavar="N")
    parser.add_argument("--sequences", type=int, default=100_000, metavar="N")
    parser.add_argument("--answers", type=int, default=30_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--no-atheris", action="store_true", help="frames by the seeded mutator")
    arguments = parser.parse_args()
    start, seed = time.monotonic(), arguments.seed
    if find_spec("atheris") is not None and not arguments.no_atheris:
        is_sound = _with_atheris(arguments.frames, seed)
    else:
        is_sound = _over_processors("frames", run_frames, arguments.frames, SHARE, seed)
    is_sound &= _over_processors("sequences", run_sequences, arguments.sequences, SEQUENCES_SHARE, seed)
    is_sound &= _over_processors("answers", run_parts, arguments.answers, SEQUENCES_SHARE, seed)
    print(f"{'PASS' if is_sound else 'FAIL'}  in {time.monotonic() - start:.0f} s")
    return 0 if is_sound else 1


def _with_atheris(count: int, seed: int) -> bool:
    processors = os.cpu_count() or 1
    share, start, processes = -(-count // processors), time.monotonic(), []
    for number in range(processors):
        scratch = os.path.join("build", "fuzz", f"corpus-{number}")
        os.makedirs(scratch, exist_ok=True)
        command = [sys.executable, "-m", "fuzz.under_atheris", str(share), str(seed + number + 1), scratch]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    is_sound = True
    for process in processes:
        told = process.communicate()[1]
        if process.returncode:
            is_sound = False
            print(told[-4000:])
    print(f"{count:,} frames under atheris in {time.monotonic() - start:.0f} s")
    return is_sound


def _over_processors(
    name: str, job: Callable[[int, int], tuple[int, str]], count: int, share: int, seed: int
) -> bool:
    if not count:
        return True
    start, found = time.monotonic(), []
    jobs = -(-count // share)
    with ProcessPoolExecutor() as pool:
        run = partial(job, count=min(share, count))
        seeds = range(seed, seed + jobs)
        for _, finding in tqdm(pool.map(run, seeds), total=jobs, desc=name, disable=None, delay=2.0):
            found += [finding] if finding else []
    print("\n".join(found[:5]))
    print(f"{count:,} {name} in {time.monotonic() - start:.0f} s, {len(found)} findings")
    return not found


if __name__ == "__main__":
    sys.exit(main())
