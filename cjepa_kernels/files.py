"""Files that are either complete or absent, whenever the process is killed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY_SUFFIX = ".partial"
_TEMPORARY_NAME = re.compile(rf"\..+\.[0-9a-f]{{12}}{re.escape(_TEMPORARY_SUFFIX)}")


@contextmanager
def atomic_path(
    path: str | os.PathLike[str], *, keep_as: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """Give a temporary name in the same directory that replaces ``path`` once it is complete.

    Args:
        path: File to create or replace. Missing parent directories are created.
        keep_as: Name in the same directory under which the file that is replaced is kept. It is
            there before ``path`` is replaced, so that ``path`` exists at every moment.

    Yields:
        The temporary name to write to. It is removed if the block raises.

    Raises:
        OSError: The file cannot be written; the error names ``path``.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target)
    try:
        yield temporary
        _sync(temporary)
        if keep_as is not None and target.exists():
            _keep(target, Path(keep_as))
        os.replace(temporary, target)
        if os.name == "posix":
            _sync(target.parent)
    except OSError as error:
        # A full disk names no file, and the temporary name would tell the user nothing.
        if error.errno is None or error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a whole file at once: readers see the old contents or the new, never a part.

    Args:
        path: File to create or replace. Missing parent directories are created.
        data: The contents; text is encoded as UTF-8.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def remove_partial_files(directory: str | os.PathLike[str]) -> None:
    """Remove what a killed process left under ``directory`` before it could rename it.

    Args:
        directory: Directory that is searched with everything below it.
    """
    for leftover in Path(directory).rglob(f".*{_TEMPORARY_SUFFIX}"):
        if _TEMPORARY_NAME.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)


def _temporary_name(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(6)}{_TEMPORARY_SUFFIX}"


def _keep(target: Path, kept: Path) -> None:
    """Give a file a second name, or copy it where the file system has one name for each file."""
    temporary = _temporary_name(kept)
    try:
        try:
            os.link(target, temporary)
        except OSError:
            shutil.copyfile(target, temporary)
            _sync(temporary)
        os.replace(temporary, kept)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
