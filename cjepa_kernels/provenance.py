"""Where a result comes from: the processor, the versions of libraries, the state of a checkout."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

GIT_SECONDS = 10.0
# Libraries whose versions change the numbers of a training.
TRAINING_LIBRARIES = ("torch", "lightning", "scikit-learn", "numpy")


def installed_version(distribution: str) -> str | None:
    """The version of a library, or None if it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*arguments: str, root: Path) -> str:
    """The output of git in a folder, or nothing if git is missing or refuses."""
    try:
        result = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            cwd=root,
            check=False,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def commit(name: Sequence[str], changes: Sequence[str], mark: str) -> str | None:
    """The commit of the checkout from which Python imports this package; None without a checkout.

    Args:
        name: Arguments of git that print the commit.
        changes: Arguments of ``git status`` that say which changes count.
        mark: Appended to the commit if there are such changes.
    """
    here = Path(__file__).resolve()
    if not git("ls-files", "--error-unmatch", here.name, root=here.parent):
        return None  # The package is installed, and a repository around it is another project's.
    root = here.parent.parent
    found = git(*name, root=root)
    return found + mark if git("status", "--porcelain", *changes, root=root) else found


def cpu_name() -> str:
    """The name of the processor."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
