"""One process of atheris, for `python -m fuzz`: `under_atheris.py RUNS SEED FOLDER`, FOLDER for what it learns."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["cierzo.engine.frontend", "cierzo.engine.messages"]):
    from fuzz import targets


def both(data: bytes) -> None:
    """The bytes as a frame, and as a stream of frames."""
    targets.frame(data)
    targets.splitter(data)


def main(runs: str, seed: str, folder: str) -> None:
    """Fuzz; atheris ends the process, with a status of its own. Findings go to the corpus."""
    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=4096", "-verbosity=0"]
    findings = f"-artifact_prefix={targets.CORPUS / 'frames'}/found-"
    folders = [folder, *(str(targets.CORPUS / name) for name in ("frames", "sequences"))]
    atheris.Setup([sys.argv[0], *options, findings, *folders], both)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
