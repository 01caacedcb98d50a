"""`make bench-rpc`: requests and tokens a second over the RPC, client and server sharing this machine's cores.

The server runs with the fake runner, which computes next tokens without a model: what is measured is sockets,
frames, scheduling and streams. Two closed loops: short answers (requests per second) and long ones (streamed
tokens per second). With `--against COMMIT` this tree and another commit take turns, each with its own client, and
the median of the pairs' ratios is judged; with `--guard`, this tree with keys, tenants, metrics and cost records
(and TLS), and this tree without. Exit status 1 if a figure is below its limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

import cierzo
from cierzo.bench.latency import result_table
from cierzo.bench.load import LoadSettings
from cierzo.bench.peers.engine import find_checkpoint
from cierzo.bench.peers.ours import CierzoServer
from cierzo.bench.peers.process import HOST, Process, free_port
from cierzo.engine.errors import ConfigError

CLIENTS = 64
REQUESTS, LONG_SHARE = 20_000, 10  # of short answers; that many times fewer of long ones
SHORT = LoadSettings(rpc="", requests=REQUESTS, concurrency=CLIENTS, output_tokens=16)
LONG = msgspec.structs.replace(SHORT, requests=REQUESTS // LONG_SHARE, output_tokens=256)
# What is loaded, the figure of its result that has a limit, and the limit.
LIMITS = ((SHORT, "requests_per_s", 1500.0), (LONG, "output_tokens_per_s", 30_000.0))
RATIOS = (0.87, 0.93)  # of requests a second, of tokens a second: this tree over the other commit
GUARDED = {"keys": (0.97, 0.97), "tls": (0.0, 0.0)}  # the same, over this tree without; what TLS costs has no limit
ROOT = Path(cierzo.__file__).resolve().parents[2]
Figures = tuple[float, float, float]  # requests a second, tokens a second, seconds of the server's processors
Ratios = tuple[float, float]


def main() -> int:
    """Serve a tiny checkpoint, load it, print the verdicts."""
    parser = argparse.ArgumentParser(prog="cierzo.bench.rpc", description=__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="take turns with this commit, and judge the ratios")
    told = "take turns with and without keys, or keys and TLS, with all that a server tells switched on"
    parser.add_argument("--guard", choices=GUARDED, help=told)
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="turns of each (default: 5)")
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help=f"default: {REQUESTS}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cierzo-bench-") as folder:
        checkpoint = find_checkpoint("small4", Path(folder), "tiny")
        log = Path(folder) / "server.log"
        if arguments.guard is not None:
            guard = Guard.made(Path(folder), with_tls=arguments.guard == "tls")
            turns = [lambda: once(ROOT, checkpoint, log, arguments.requests, guard)]
            turns.append(lambda: once(ROOT, checkpoint, log, arguments.requests))
            return paired(turns, (arguments.guard, "without"), arguments.pairs, GUARDED[arguments.guard])
        if arguments.against is None:
            return alone(checkpoint, log, arguments.requests)
        other = extracted(arguments.against, ROOT / "build" / "against")
        turns = [lambda: once(ROOT, checkpoint, log, arguments.requests)]
        turns.append(lambda: once(other, checkpoint, log, arguments.requests))
        return paired(turns, ("this tree", arguments.against), arguments.pairs, RATIOS)


class Guard(msgspec.Struct, frozen=True):
    """Options of a server that lets in known tenants alone and tells all it can, and the words of `rpc_once.py`
    that get its client in."""

    serve: list[str]
    load: list[str]

    @classmethod
    def made(cls, folder: Path, with_tls: bool) -> Guard:
        """Write keys, and for TLS certificates, into a folder."""
        keys, key, told = folder / "keys", folder / "key", folder / "told"
        made = subprocess.run(
            [sys.executable, "-m", "cierzo", "make-key", "bench", "--keys", str(keys)],
            check=True,
            capture_output=True,
            text=True,
        )
        key.write_text(made.stdout, encoding="ascii")
        serve = ["--keys", str(keys), "--usage-file", f"{told}.jsonl", "--metrics", f"unix:{told}.sock"]
        load = [f"key_file={key}"]
        if with_tls:
            import trustme  # of the tests' packages

            authority, certificate, private = trustme.CA(), folder / "certificate.pem", folder / "private.pem"
            issued = authority.issue_cert(HOST)
            issued.cert_chain_pems[0].write_to_path(str(certificate))
            issued.private_key_pem.write_to_path(str(private))
            authority.cert_pem.write_to_path(str(folder / "authority.pem"))
            serve += ["--tls-certificate", str(certificate), "--tls-key", str(private)]
            load.append(f"tls_ca={folder / 'authority.pem'}")
        return cls(serve, load)


UNGUARDED = Guard([], [])


def alone(checkpoint: Path, log: Path, requests: int) -> int:
    """Load this tree's server twice, and judge the figures by themselves."""
    is_good = True
    with CierzoServer(checkpoint, {"runner": "fake"}, log) as server:
        for load, name, limit in LIMITS:
            count = max(CLIENTS, load.requests * requests // REQUESTS)
            settings = msgspec.structs.replace(load, requests=count)
            result = server.load(settings)
            figure = getattr(result, name)
            print(f"\n{settings.requests} requests of {settings.output_tokens} tokens, {CLIENTS} open")
            print(result_table(result))
            told = "holds" if figure >= limit else "BELOW THE LIMIT"
            print(f"{told}: {figure:,.0f} {name.replace('_', ' ')} (limit {limit:,.0f})")
            is_good = is_good and figure >= limit and not result.errors
    return 0 if is_good else 1


def paired(turns: Sequence[Callable[[], Figures]], names: tuple[str, str], pairs: int, ratios: Ratios) -> int:
    """Take turns, `pairs` times; print what each gave, and judge the median of the pairs' ratios.

    The processor time of the servers is told too, and not judged: neighbours of this machine's cores disturb it
    less than they disturb the clock on the wall, and it says nothing of waits.
    """
    seen: tuple[list[Figures], list[Figures]] = ([], [])
    for number in range(pairs):
        for name, figures, turn in zip(names, seen, turns, strict=True):
            figures.append(turn())
            told = "{:8,.0f} requests/s  {:10,.0f} tokens/s  {:6.2f} s of the server's processors".format(
                *figures[-1]
            )
            print(f"{number + 1}  {name:12}  {told}", flush=True)
    is_good = True
    for index, (unit, limit) in enumerate(zip(("requests/s", "tokens/s"), ratios, strict=True)):
        ours, theirs = (statistics.median(one[index] for one in figures) for figures in seen)
        ratio = statistics.median(our[index] / their[index] for our, their in zip(*seen, strict=True))
        is_good = is_good and ratio >= limit
        told = "holds" if ratio >= limit else "BELOW THE LIMIT"
        print(f"{told}: medians {ours:,.0f} and {theirs:,.0f} {unit}, median ratio {ratio:.3f} (limit {limit})")
    ours, theirs = (statistics.median(one[2] for one in figures) for figures in seen)
    ratio = statistics.median(their[2] / our[2] for our, their in zip(*seen, strict=True))
    print(
        f"work done by a second of the server's processors: medians of {ours:.2f} and {theirs:.2f} s, {ratio:.3f}"
    )
    return 0 if is_good else 1


def once(tree: Path, checkpoint: Path, log: Path, requests: int, guard: Guard = UNGUARDED) -> Figures:
    """Server and client of a tree, in processes of their own. Its compiled kernels need not be there."""
    loads = (f"{requests}:{SHORT.output_tokens}", f"{max(1, requests // LONG_SHARE)}:{LONG.output_tokens}")
    python = ["env", f"PYTHONPATH={tree / 'src'}", sys.executable, "-P"]
    module = "cierzo" if (tree / "src" / "cierzo" / "__main__.py").exists() else "cierzo.engine"  # as it was once
    address = f"{HOST}:{free_port()}"
    serve = [*python, "-m", module, "serve", str(checkpoint), "--runner", "fake", "--rpc", address, *guard.serve]
    load = [*python, str(ROOT / "bench" / "rpc_once.py"), address, str(CLIENTS), *guard.load]
    with Process(serve, log) as server:
        subprocess.run([*load, f"{CLIENTS}:4"], stdout=subprocess.DEVNULL, check=True)  # until it is warm
        began_s = server.cpu_s()
        done = subprocess.run([*load, *loads], stdout=subprocess.PIPE, check=True, text=True)
        cpu_s = server.cpu_s() - began_s
    short, long = json.loads(done.stdout.splitlines()[-1])
    return short[0], long[1], cpu_s


def extracted(commit: str, folder: Path) -> Path:
    """The tree of a commit, below `folder`. Raises ConfigError if there is no such commit."""
    found = subprocess.run(["git", "rev-parse", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise ConfigError(
            f"there is no commit {commit} here: {found.stderr.strip()}", field="against", value=commit
        )
    tree = folder / found.stdout.strip()
    if not tree.exists():
        tree.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
            archive = subprocess.run(
                ["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True
            ).stdout
            subprocess.run(["tar", "-x", "-C", scratch], input=archive, check=True)
            Path(scratch).rename(tree)
            Path(scratch).mkdir()
    return tree


if __name__ == "__main__":
    raise SystemExit(main())
