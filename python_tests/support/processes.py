"""Functions for tests that start processes and check whether they have ended."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def wait_long(marker: Path, report: Any) -> None:
    """Write the id of this process to a file and sleep for two minutes."""
    marker.write_text(str(os.getpid()))
    time.sleep(120)


def alive(pid: int) -> bool:
    """Whether a process is running. A zombie has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Wait until a process has ended, and return whether it ended in time."""
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)
