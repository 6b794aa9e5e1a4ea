"""Hashes of the files that measurements on a GPU depend on, and whether these have changed since.

A record keeps one hash for each part, which covers the paths of its files and their contents as git
hashes them. The same hash can therefore be computed from the files of a checkout, with or without
git, and from a commit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from cjepa_kernels.provenance import git

ROOT = Path(__file__).resolve().parents[2]

Hashes = dict[str, str]  # By name of the part.

KERNELS, CONFIGURATIONS, HOST, PLANS = "kernels", "configurations", "host code", "launch plans"
PARTS = (KERNELS, CONFIGURATIONS, HOST, PLANS)
TRITON, CUDA = "cjepa_kernels/triton", "csrc/cuda"
SUFFIXES = frozenset({".py", ".json", ".cpp", ".cu", ".h"})
ABSENT = "no files"
# It names the record that proves an entry, so that it changes after the record is made.
PROVED = "proved.json"


def part_of(path: str) -> str | None:
    """The part that a file of the repository belongs to; None if no figure depends on it."""
    if Path(path).suffix not in SUFFIXES:
        return None
    if path.startswith(f"{CUDA}/"):
        return PLANS
    if not path.startswith(f"{TRITON}/"):
        return None
    name = path.removeprefix(f"{TRITON}/")
    if name == PROVED:
        return None
    if name.startswith("kernels/"):
        return KERNELS
    return CONFIGURATIONS if name == "configs.py" or name.endswith(".json") else HOST


def of_files(root: Path = ROOT) -> Hashes:
    """The hash of each part as its files are now."""
    paths = (path for folder in (TRITON, CUDA) for path in (root / folder).rglob("*"))
    return _hashes(
        (path.relative_to(root).as_posix(), blob(path.read_bytes()))
        for path in paths
        if path.is_file() and part_of(path.relative_to(root).as_posix())
    )


def of_commit(commit: str, root: Path = ROOT) -> Hashes | None:
    """The hash of each part at a commit; None if the repository does not have the commit.

    Args:
        commit: Its name. Anything longer, such as ``1a2b3c4-dirty``, is not known to git.
        root: The folder of the repository.
    """
    listed = git("ls-tree", "-r", f"{commit}^{{commit}}", "--", TRITON, CUDA, root=root)
    if not listed:
        return None
    lines = (line.split("\t") for line in listed.splitlines())
    return _hashes((path, entry.split()[2]) for entry, path in lines)


def blob(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _hashes(files: Iterable[tuple[str, str]]) -> Hashes:
    lines: dict[str, list[str]] = {part: [] for part in PARTS}
    for path, content in files:
        part = part_of(path)
        if part is not None:
            lines[part].append(f"{content} {path}\n")
    return {
        part: hashlib.sha256("".join(sorted(of)).encode()).hexdigest()[:16] if of else ABSENT
        for part, of in lines.items()
    }


def changed(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The parts whose files are others than when the record was made.

    Args:
        recorded: The hashes of a record.
        now: Those of the files as they are.
    """
    names = dict.fromkeys((*now, *recorded))
    return [part for part in names if recorded.get(part, ABSENT) != now.get(part, ABSENT)]


def since(recorded: Mapping[str, str] | None, now: Mapping[str, str] | None = None) -> str:
    """A sentence that says whether a record is one of the code as it is.

    Args:
        recorded: The hashes of the record; None if they are not known.
        now: Those of the files as they are. Default: of this checkout.
    """
    if recorded is None:
        return "It is not known exactly which kernels were measured."
    if changed(recorded, of_files() if now is None else now):
        return (
            "**The kernels or the code that launches them have changed since, and the measurement "
            "has not been repeated.**"
        )
    return "The kernels and the code that launches them have not changed since."
