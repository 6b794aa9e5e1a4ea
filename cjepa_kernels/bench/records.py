"""The results files: what a run measured, with the machine and the versions that it ran on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cjepa_kernels.bench.machine import ROOT, environment
from cjepa_kernels.files import atomic_write
from cjepa_kernels.json_values import finite

RESULTS = ROOT / "bench" / "results"  # In a clone.

Record = dict[str, Any]  # One measurement: names, sizes and figures.


def write_results(
    name: str, rows: list[Record], *, of_kernels: bool = False, **sections: Any
) -> Path:
    """Write ``bench/results/<name>.json`` and return its path.

    Args:
        name: Stem of the file.
        rows: What was measured.
        of_kernels: As for ``environment``.
        **sections: Further lists, each under its own name.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    made_on = environment(of_kernels=of_kernels)
    atomic_write(path, as_json({"environment": made_on, "rows": rows, **sections}))
    return path


def as_json(content: dict[str, Any]) -> str:
    """The text of a results file."""
    return json.dumps(finite(content), indent=1, allow_nan=False) + "\n"
