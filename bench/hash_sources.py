"""Write into each record of the GPU kernels the hashes of the files that it depends on.

    python bench/hash_sources.py

A new record has them already. The script is for records that name their commit alone: it takes the
files of that commit from git. Where the name of a commit is not one, the record says ``null``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from cjepa_kernels.bench import sources
from cjepa_kernels.bench.records import as_json
from cjepa_kernels.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RECORDS = re.compile(r"(gpu_|NVIDIA-|nvidia-).*\.json")


def records() -> list[Path]:
    """The records of the GPU kernels."""
    folders = (ROOT / "bench" / "results", ROOT / "docs" / "results")
    paths = sorted(path for folder in folders for path in folder.glob("*.json"))
    return [path for path in paths if RECORDS.fullmatch(path.name)]


def main() -> None:
    for path in records():
        content = json.loads(path.read_text(encoding="utf-8"))
        environment = content["environment"]
        if "sources" in environment:
            continue
        environment["sources"] = sources.of_commit(environment["commit"] or "", ROOT)
        atomic_write(path, as_json(content))
        print(f"written: {path.relative_to(ROOT)}: {environment['sources']}")


if __name__ == "__main__":
    main()
