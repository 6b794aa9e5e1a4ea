"""The files of CONTRIBUTING's walk-throughs, put into a copy of the package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"^```(py|diff)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Parts of the repository that the copy has, beside the package and the helpers of the tests.
COPIED = (
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "Makefile",
    "README.md",
    "bench/gpu_check_steps.py",
    "csrc",
    "docs",
    "examples",
    "pyproject.toml",
    "python_tests/conftest.py",
    "python_tests/package",
    "python_tests/support",
    "setup.py",
)


class Extension(NamedTuple):
    """A copy of the package with the additions of the walk-through."""

    directory: Path
    added: list[str]  # Paths of new files.
    changed: list[str]  # Paths of files with new or changed lines.


def section_of(document: str, heading: str) -> str:
    """The text of a section of the second level."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
    return str(section)


def copy_package(source: Path, target: Path) -> None:
    """Copy the package with its compiled module, and other files that the walk-throughs use."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source / "cjepa_kernels", target / "cjepa_kernels", ignore=ignored)
    for name in COPIED:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, path, ignore=ignored)
        else:
            shutil.copy(source / name, path)


def apply_walkthrough(document: str, target: Path) -> Extension:
    """Write the files of all ``py`` blocks, and change files as the ``diff`` blocks say.

    Args:
        document: Text of the document.
        target: Directory of the copy.

    Raises:
        ValueError: A new file exists already, or the text to be changed is not found exactly once.
    """
    added, changed = [], []
    for kind, name, content in BLOCK.findall(document):
        if kind == "py":
            if (target / name).exists():
                raise ValueError(f"{name} exists already")
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(content, encoding="utf-8")
            added.append(name)
            continue
        parts = re.split(r"^# (\S+)\n", f"# {name}\n{content}", flags=re.MULTILINE)[1:]
        for path, hunks in zip(parts[::2], parts[1::2], strict=True):
            _change(target / path, hunks)
            changed.append(path)
    return Extension(target, added, changed)


def _change(path: Path, hunks: str) -> None:
    text = path.read_text(encoding="utf-8")
    for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE):
        lines = [(line[:1], line[1:]) for line in hunk.splitlines()]
        before, after = (
            "".join(f"{line}\n" for sign, line in lines if sign != other) for other in "+-"
        )
        if text.count(before) != 1:
            raise ValueError(f"expected once in {path}, found {text.count(before)}:\n{before}")
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")
