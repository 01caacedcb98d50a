"""Types of the clients, as the type checkers of their users see them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cierzo.engine.frontend.client_options import GenerateArguments
from cierzo.engine.messages import Generate, SamplingParams

PROGRAM = Path(__file__).with_name("typed_use.py")
ROOT = Path(__file__).parents[3]


def test_the_arguments_are_the_fields_of_the_messages():
    fields = {*Generate.__struct_fields__, *SamplingParams.__struct_fields__}
    assert {*GenerateArguments.__annotations__} == fields - {"stream", "attached"}


def test_mypy_finds_what_is_wrong_and_nothing_else(tmp_path):
    settings = ("--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={tmp_path}")
    command = (sys.executable, "-m", "mypy", *settings, str(PROGRAM))
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_finds_what_is_wrong_and_nothing_else(tmp_path):
    pyright = Path(sys.executable).with_name("basedpyright")
    command = str(pyright) if pyright.exists() else shutil.which("basedpyright")
    assert command is not None, "basedpyright is of the test extra"
    settings = {
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": "error",
        "enableTypeIgnoreComments": False,  # those are mypy's
        "extraPaths": [str(ROOT / "src")],
        "include": [str(PROGRAM)],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    arguments = (command, "-p", str(tmp_path), "--pythonpath", sys.executable)
    done = subprocess.run(arguments, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _environment():
    return os.environ | {"MYPYPATH": str(ROOT / "src")}
