"""Where a result comes from: the processor, the versions of libraries, the state of a checkout."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

GIT_SECONDS = 10.0


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


def cpu_name() -> str:
    """The name of the processor."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
