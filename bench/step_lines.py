"""The lines that a step of a check writes as it goes; as a plugin of pytest, one for each test.

    pytest -p step_lines

Each line is a JSON object that names its section of the record. The file is the one that the
variable ``CJEPA_LINES`` names; without the variable nothing is written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "CJEPA_LINES"
LONGEST_REASON = 300  # Characters.


def write(section: str, **fields: Any) -> None:
    """Append a line, whole and at once."""
    path = os.environ.get(VARIABLE)
    if path:
        with Path(path).open("ab", buffering=0) as file:
            file.write((json.dumps({"section": section, **fields}) + "\n").encode())


def reason_of(report: Any) -> str:
    """Why a test was skipped, or the last line of its failure."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr or "") if crash is None else str(crash.message)
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    return (lines[0] if crash is not None else lines[-1])[:LONGEST_REASON]


class OutcomeLines:
    """Writes a line for each test, and one for each file that was skipped or not imported."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write the outcome of a test, when it is known."""
        if report.when == "call" or not report.passed:
            write_test(report, report.duration)

    def pytest_collectreport(self, report: Any) -> None:
        """Write why a file has no tests."""
        if not report.passed:
            write_test(report, 0.0)


def write_test(report: Any, seconds: float) -> None:
    """Write a line of the section of tests."""
    write(
        "tests",
        test=report.nodeid,
        outcome=report.outcome,
        seconds=round(seconds, 3),
        reason="" if report.passed else reason_of(report),
    )


def pytest_configure(config: Any) -> None:
    """Begin to write. Of the processes of pytest-xdist only the one that collects reports does."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(OutcomeLines(), "step_lines of this process")
