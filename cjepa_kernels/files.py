"""Writing files that are either complete or absent, whenever the process is killed.

A command checks with :func:`check_directory` or :func:`check_file` that it can write its results
before it does any work.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
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
        keep_as: Name in the same directory under which the replaced file is kept. The file has
            this name before ``path`` is replaced, so that ``path`` exists at every moment.

    Yields:
        The temporary name to write to. It is removed if the block raises.

    Raises:
        OSError: If the file cannot be written; the error names ``path``.
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
        # The error of a full disk names no file, and the temporary name would not help the user.
        if error.errno is None or error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a whole file at once; readers see the old contents or the new, never a part.

    Args:
        path: File to create or replace. Missing parent directories are created.
        data: The contents; text is encoded as UTF-8.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def remove_partial_files(directory: str | os.PathLike[str]) -> None:
    """Remove the temporary files that a killed process left under ``directory``.

    Args:
        directory: Directory to search, with all directories below it.
    """
    for leftover in Path(directory).rglob(f".*{_TEMPORARY_SUFFIX}"):
        if _TEMPORARY_NAME.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)


def check_directory(option: str, directory: Path) -> None:
    """Refuse a directory that cannot be made or written to, without leaving a file behind.

    Args:
        option: Its name in the error, for example ``"--out"``.
        directory: The directory, which need not exist.

    Raises:
        ValueError: If something else has its name, or the operating system refuses to write.
    """
    with _refusals(option, "a directory to write to", directory):
        _try_directory(directory)


def check_file(option: str, file: Path) -> None:
    """Refuse a file that cannot be written; an existing one is left as it is.

    Args:
        option: Its name in the error, for example ``"--json"``.
        file: The file, which need not exist.

    Raises:
        ValueError: If it is a directory, or the operating system refuses to write.
    """
    with _refusals(option, "a file to write to", file):
        if file.is_dir():
            raise ValueError("it is a directory")
        if _takes_bytes_only(file):
            with file.open("ab"):
                return
        _try_directory(_target(file).parent)


def write_file(file: Path, text: str) -> None:
    """Write a file that :func:`check_file` has accepted.

    Args:
        file: The file. The target of a symbolic link is replaced, not the link; a device or a
            pipe such as ``/dev/stdout`` is written to.
        text: The contents.
    """
    if _takes_bytes_only(file):
        with file.open("w", encoding="utf-8") as stream:
            stream.write(text)
    else:
        atomic_write(_target(file), text)


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


def _try_directory(directory: Path) -> None:
    """Try to write to the deepest existing directory of a path, where the rest can be made."""
    there = directory.absolute()
    while True:
        try:
            there.stat()
            break
        except (FileNotFoundError, NotADirectoryError):
            if there.is_symlink():
                raise ValueError(f"{str(there)!r} is a symbolic link to nothing") from None
            there = there.parent
    if not there.is_dir():
        raise ValueError(f"{str(there)!r} is a file")
    with tempfile.TemporaryDirectory(dir=there, prefix=".cjepa-"):
        pass


def _takes_bytes_only(file: Path) -> bool:
    return file.exists() and not file.is_file()


def _target(file: Path) -> Path:
    return Path(os.path.realpath(file))


@contextmanager
def _refusals(option: str, expected: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{option}: expected {expected}, got {str(path)!r}: {reason}") from None
