"""Where the scripts of bench/ write, and how they print."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cjepa_kernels.bench.machine import environment

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, rows: list[dict[str, Any]], **sections: list[dict[str, Any]]) -> Path:
    """Write ``bench/results/<name>.json`` in one piece and return its path.

    Args:
        name: Stem of the file.
        rows: What was measured.
        **sections: Further lists, each under its own name.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    content = {"environment": environment(), "rows": rows, **sections}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print rows under a header, columns aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
