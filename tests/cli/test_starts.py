"""What a command imports before it does anything."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cierzo.cli import COMMANDS

FRAME = {"cierzo", "cierzo.__main__", "cierzo.cli"}
HEAVY = {"msgspec", "numpy", "torch", "uvloop"}
OF_A_COMMAND = [words for words, module, _ in COMMANDS if module]


@functools.cache
def imported(*words: str) -> set[str]:
    """Modules that a process of the command has imported at its end."""
    code = "import sys; from cierzo.__main__ import main; status = main(); "
    code += "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.partition(".")[0] == "cierzo"}


@pytest.mark.parametrize("words", ["--help", "--version", "bench --help"])
def test_the_frame_imports_nothing_of_the_house(words: str) -> None:
    modules = imported(*words.split())
    assert ours(modules) == FRAME
    assert not modules & HEAVY


@pytest.mark.parametrize("words", OF_A_COMMAND)
def test_a_command_imports_its_own_module_and_no_other_command(words: str) -> None:
    modules = ours(imported(*words.split(), "--help"))
    others = {f"cierzo.{module}" for other, module, _ in COMMANDS if module and other != words}
    if words == "demo":  # asks its question as chat does
        others.remove("cierzo.engine.commands.chat")
    assert not modules & others


@pytest.mark.parametrize("words", ["serve", "generate", "chat", "demo", "make-checkpoint", "info"])
def test_commands_of_the_engine_import_no_bench_and_no_torch(words: str) -> None:
    modules = imported(words, "--help")
    assert not {name for name in modules if name.startswith(("cierzo.bench", "torch"))}


@pytest.mark.parametrize("words", ["serve", "chat", "demo", "info"])
def test_a_server_and_its_clients_start_without_numpy(words: str) -> None:
    assert "numpy" not in imported(words, "--help")


@pytest.mark.parametrize(("word", "status"), [("serve", 0), ("chat", -signal.SIGHUP)])
def test_a_hangup_while_a_server_is_imported_does_not_end_it(word: str, status: int) -> None:
    code = "import os, signal, sys; from cierzo import __main__, cli; "
    code += "cli.main = lambda: os.kill(os.getpid(), signal.SIGHUP) or 0; sys.exit(__main__.main())"
    done = subprocess.run([sys.executable, "-c", code, word], timeout=60, check=False)
    assert done.returncode == status


def test_a_server_serves_without_bench_and_numpy(tmp_path: Path) -> None:
    """Up to the moment at which it listens; the core, which computes, is another process."""
    from cierzo.engine.weights.make import make_checkpoint

    checkpoint = str(make_checkpoint(tmp_path / "dense", like="small3"))
    code = "import sys; from cierzo.engine import launch\n"
    code += "async def ended(config, **more):\n    launch.load_prompts(config)\n    return 0\n"
    code += "launch._serve = ended\nfrom cierzo.cli import main\nassert main() == 0\nprint(*sys.modules)"
    command = [sys.executable, "-c", code, "serve", checkpoint, "--rpc", f"unix:{tmp_path}/rpc"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    modules = set(done.stdout.split())
    assert not {name for name in modules if name.startswith("cierzo.bench")}
    assert not modules & {"numpy", "torch"}
