"""The files and folders that a data set on disk consists of."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

_SYSTEM_NAMES = frozenset(
    {
        "thumbs.db",
        "desktop.ini",
        "icon\r",
        "__macosx",
        "@eadir",
        "$recycle.bin",
        "system volume information",
        "lost+found",
    }
)


def visible_entries(folder: Path) -> list[Path]:
    """List a folder without hidden files and without what operating systems leave behind.

    Returns the files and folders by name, symbolic links included. A folder that cannot be read,
    or that holds a link to nothing, is a ValueError.
    """
    try:
        entries = [
            entry
            for entry in folder.iterdir()
            if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_NAMES
        ]
    except OSError as error:
        raise ValueError(
            f"data.source: cannot read the folder {str(folder)!r}: {error.strerror}"
        ) from error
    for entry in entries:
        if not entry.exists():
            what = "a symbolic link that leads nowhere" if entry.is_symlink() else "unreadable"
            raise ValueError(f"data.source: {str(entry)!r} is {what}")
    return sorted(entries)


def identity(path: Path) -> tuple[int, int]:
    """Return what tells a file or folder from every other, however it is reached."""
    status = path.stat()
    return status.st_dev, status.st_ino


def walk_files(folder: Path, visited: dict[tuple[int, int], Path]) -> Iterator[Path]:
    """List the files of a folder and of all folders below it, in the order of their names.

    Symbolic links are followed. ``visited`` holds the folders met so far, and grows: a folder that
    is met twice is a ValueError, because it would give its images twice, or without end.
    """
    first = visited.setdefault(identity(folder), folder)
    if first is not folder:
        raise ValueError(
            f"data.source: {str(folder)!r} is the same folder as {str(first)!r}, by a symbolic "
            "link; its images would be read twice"
        )
    for entry in visible_entries(folder):
        if entry.is_dir():
            yield from walk_files(entry, visited)
        else:
            yield entry


def class_name(folder: Path) -> str:
    """Return the name of the class of a folder, the same on every operating system."""
    # Bytes that are no UTF-8 could be neither printed nor written to a log.
    text = folder.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return unicodedata.normalize("NFC", text)


def expanded_path(location: str) -> Path:
    """Return a path in which ``~`` is the user's home and all else stands for itself."""
    return Path(os.path.expanduser(location))


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the ``datasets`` library wrote a folder."""
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
