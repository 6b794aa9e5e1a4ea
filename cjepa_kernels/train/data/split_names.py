"""Which folders and files of a data set are its training set and which are its test set."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from cjepa_kernels import suggestions

# The whole name decides, in any case. What a name merely contains never does: CIFAR-100 has a
# class "train", and other sets have classes such as "test_tube".
_ROLES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
SPLIT_NAMES = tuple(_ROLES)
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
_SHOWN = 8

Content = TypeVar("Content")


def split_role(name: str) -> str | None:
    """Return what a split is for.

    Args:
        name: Name of a folder or of a split.

    Returns:
        ``"train"``, ``"test"``, ``"validation"``, or None if it is no split's whole name.
    """
    return _ROLES.get(name.lower())


@dataclass(frozen=True)
class ChosenSplits(Generic[Content]):
    """The splits of a source that are used."""

    parts: dict[str, tuple[str, Content]]  # "train" and perhaps "test": the split's name, content
    notes: tuple[str, ...]  # a sentence on the splits that are not used, if there are some


def choose_splits(splits: Mapping[str, Content], where: str) -> ChosenSplits[Content]:
    """Choose the training and the test set among the splits of a source.

    A validation split is the test set only if there is no test split.

    Args:
        splits: The splits by name, each of which has a role.
        where: What errors call the source.

    Raises:
        ValueError: If there is no training set, or two splits have one role.
    """
    of_role: dict[str, str] = {}
    for name in splits:
        role = split_role(name)
        if role is None:
            continue
        if role in of_role:
            raise ValueError(
                f"data.source: {where} holds both {of_role[role]!r} and {name!r}, of which only "
                "one can be used; remove or rename one"
            )
        of_role[role] = name
    if "train" not in of_role:
        raise ValueError(
            f"data.source: {where} has no split 'train', only {listed(splits)}; the training set "
            "must be called train or training"
        )
    chosen = {"train": of_role["train"]}
    test = of_role.get("test", of_role.get("validation"))
    if test is not None:
        chosen["test"] = test
    unused = sorted(set(splits) - set(chosen.values()))
    return ChosenSplits(
        parts={part: (name, splits[name]) for part, name in chosen.items()},
        notes=(f"Splits that are not used: {', '.join(unused)}.",) if unused else (),
    )


def listed(names: Iterable[object]) -> str:
    """Write the first names for an error, and how many more there are."""
    return suggestions.listed(names, most=_SHOWN)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the ``datasets`` library wrote a folder."""
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def visible_entries(folder: Path) -> list[Path]:
    """List a folder without hidden files and without what operating systems leave behind.

    Args:
        folder: The folder.

    Returns:
        Its files and folders by name, symbolic links included.

    Raises:
        ValueError: If the folder cannot be read, or holds a link that leads nowhere.
    """
    try:
        found = [
            entry
            for entry in folder.iterdir()
            if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_NAMES
        ]
    except OSError as error:
        raise ValueError(
            f"data.source: cannot read the folder {str(folder)!r}: {error.strerror}"
        ) from error
    for entry in found:
        if not entry.exists():
            what = "a symbolic link that leads nowhere" if entry.is_symlink() else "unreadable"
            raise ValueError(f"data.source: {str(entry)!r} is {what}")
    return sorted(found)


def walk_files(folder: Path, visited: dict[tuple[int, int], Path]) -> Iterable[Path]:
    """List the files of a folder and of all folders below it; symbolic links are followed.

    Args:
        folder: The folder.
        visited: Folders met so far, by device and inode, which grows. A folder that is met twice
            would give its images twice, or without end.

    Yields:
        The files, in the order of their names.

    Raises:
        ValueError: If a folder is met twice or cannot be read.
    """
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in visited:
        raise ValueError(
            f"data.source: {str(folder)!r} is the same folder as {str(visited[identity])!r}, by a "
            "symbolic link; its images would be read twice"
        )
    visited[identity] = folder
    for entry in visible_entries(folder):
        if entry.is_dir():
            yield from walk_files(entry, visited)
        else:
            yield entry


def class_name(folder: Path) -> str:
    """Return the name of the class of a folder, the same on every operating system.

    Args:
        folder: The class's folder.
    """
    # Bytes that are no UTF-8 could be neither printed nor written to a log.
    text = folder.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return unicodedata.normalize("NFC", text)


def expanded_path(location: str) -> Path:
    """Return a path in which ``~`` is the user's home; every other character stands for itself.

    Args:
        location: What the user wrote.
    """
    return Path(os.path.expanduser(location))


# A shard: its set's name, then a number, perhaps "-of-" the number of all, perhaps a fingerprint.
_SHARD = re.compile(
    r"(?P<name>.*?)[-_.]?(?P<number>\d+)(?:[-_]of[-_](?P<total>\d+))?(?:-[0-9a-f]{16})?",
    re.IGNORECASE,
)
_NAME_OF_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?:[-_.].*|\d+)?", re.IGNORECASE)


def split_files(folder: Path, files: Sequence[Path], suffix: str) -> dict[str, list[Path]]:
    """Sort the data files of a folder by split.

    Known are ``train.parquet``, ``train-00000-of-00002.parquet``, ``train-*.parquet``, the same in
    one folder (``data/``) or in folders that are called as the splits, and one set in one file or
    in numbered files.

    Args:
        folder: The source.
        files: Its data files, at least one.
        suffix: Their suffix, for the error messages.

    Returns:
        The files of each split, under the split's name; a source without splits is ``"train"``.

    Raises:
        ValueError: If it is not clear what the files are, or a numbered file is missing.
    """
    below = {file: file.relative_to(folder).parts for file in files}
    depth = 0
    while all(len(parts) > depth + 1 for parts in below.values()):
        names = {parts[depth] for parts in below.values()}
        if all(split_role(name) for name in names):
            return _complete(_grouped({file: below[file][depth] for file in files}))
        if len(names) > 1:
            raise ValueError(
                f"data.source: {str(folder)!r} holds several folders with {suffix} files: "
                f"{listed(sorted(names))}; name one of them"
            )
        depth += 1
    if any(len(parts) > depth + 1 for parts in below.values()):
        raise ValueError(
            f"data.source: {str(folder)!r} holds {suffix} files beside folders with more of them: "
            f"{listed('/'.join(parts) for parts in below.values())}; name the folder or the file "
            "that is meant"
        )
    matches = {file: _NAME_OF_FILE.fullmatch(file.stem) for file in files}
    named = {file: match[1] for file, match in matches.items() if match}
    if len(named) == len(files):
        return _complete(_grouped(named))
    shards = [_SHARD.fullmatch(file.stem) for file in files]
    one_set = len({shard and shard["name"] for shard in shards}) == 1 and None not in shards
    if not named and (len(files) == 1 or one_set):
        return _complete({"train": sorted(files)})
    raise ValueError(
        f"data.source: expected train{suffix} and test{suffix} (or train-*{suffix}, "
        f"test-*{suffix}) in {str(folder)!r}, found {listed(file.name for file in files)}; rename "
        "the files, or name one of them"
    )


def _grouped(split_of: Mapping[Path, str]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    spelling: dict[str, str] = {}
    for file in sorted(split_of):
        name = spelling.setdefault(split_of[file].lower(), split_of[file])
        groups.setdefault(name, []).append(file)
    return groups


def _complete(groups: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Refuse a split of which numbered files are missing, or one that is there twice."""
    for files in groups.values():
        shards = [_SHARD.fullmatch(file.stem) for file in files]
        totals = {shard["total"] and int(shard["total"]) for shard in shards if shard}
        if totals <= {None}:
            continue
        numbers = sorted(int(shard["number"]) for shard in shards if shard)
        (total, *others) = totals
        complete = [list(range(first, first + int(total or 0))) for first in (0, 1)]
        if others or None in shards or numbers not in complete:
            raise ValueError(
                "data.source: expected every file of one numbered set, each once, found "
                f"{listed(file.name for file in files)} in {str(files[0].parent)!r}"
            )
    return groups
