"""The code that figures belong to: this repository's commit, and the versions of packages that can move them."""

from __future__ import annotations

import hashlib
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
PACKAGES = ("cierzo", "torch", "triton", "cupy-cuda13x", "transformers", "numpy", "msgspec", "uvloop")


def installed_versions() -> dict[str, str]:
    """Versions by package; those that are not installed are left out."""
    return {found.name: found.version for found in metadata.distributions() if found.name in PACKAGES}


def current_commit() -> str:
    """HEAD of this repository; with "-dirty" and a digest of the changes where there are any."""
    head = output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip() or "unknown"
    changes = output("git", "-C", str(ROOT), "diff", "HEAD", "--", ".", ":(exclude)bench/results")
    if not changes:
        return head
    digest = hashlib.sha256(changes.encode()).hexdigest()[:8]
    return f"{head}-dirty-{digest}"


def output(*command: str) -> str:
    """Output of a command; empty where it fails, or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""
