"""Recognising the training set and the test set of a data set by the names of its splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from cjepa_kernels import suggestions

# The whole name decides, in upper or lower case. A part of a name never decides, because data sets
# have classes such as "test_tube".
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
_SHOWN = 8

Content = TypeVar("Content")


def split_role(name: str) -> str | None:
    """Return what the split of this name is for; None if this is no split's whole name."""
    return _ROLES.get(name.lower())


@dataclass(frozen=True)
class ChosenSplits(Generic[Content]):
    """The splits of a source that are used."""

    parts: dict[str, tuple[str, Content]]  # "train" and perhaps "test": the split's name, content
    notes: tuple[str, ...]  # a sentence on the splits that are not used, if there are some


def choose_splits(splits: Mapping[str, Content], where: str) -> ChosenSplits[Content]:
    """Choose the training and the test set among the splits of a source, which have names.

    A validation split is the test set only if there is no test split. A source without a training
    set, or with two splits for one role, is a ValueError, which calls the source ``where``.
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


# The name of a shard: its set's name, a number, perhaps "-of-" and the number of all shards, and
# perhaps a fingerprint.
_SHARD = re.compile(
    r"(?P<name>.*?)[-_.]?(?P<number>\d+)(?:[-_]of[-_](?P<total>\d+))?(?:-[0-9a-f]{16})?",
    re.IGNORECASE,
)
_NAME_OF_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?:[-_.].*|\d+)?", re.IGNORECASE)


def split_files(folder: Path, files: Sequence[Path], suffix: str) -> dict[str, list[Path]]:
    """Sort the data files of a folder by split; without splits they are ``"train"``.

    Known are ``train.parquet``, ``train-00000-of-00002.parquet``, ``train-*.parquet``, the same in
    one folder (``data/``) or in folders that have the names of splits, and one set in one file or
    in numbered files. Anything else, or a numbered file that is missing, is a ValueError.
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
    """Refuse a split with a numbered file that is missing or that exists twice."""
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
