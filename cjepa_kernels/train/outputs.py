"""Places that a command writes to: tried before any work, written in one piece afterwards."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cjepa_kernels.files import atomic_write


def check_directory(option: str, directory: Path) -> None:
    """Refuse a directory that cannot be made or written to; nothing is left behind.

    Args:
        option: What the error calls it, for example ``"--out"``.
        directory: The directory, which need not exist.

    Raises:
        ValueError: Something else is there, or the operating system refuses to write.
    """
    with _refusals(option, "a directory to write to", directory):
        _try_directory(directory)


def check_file(option: str, file: Path) -> None:
    """Refuse a file that cannot be written; an existing one is left as it is.

    Args:
        option: What the error calls it, for example ``"--json"``.
        file: The file, which need not exist.

    Raises:
        ValueError: It is a directory, or the operating system refuses to write.
    """
    with _refusals(option, "a file to write to", file):
        if file.is_dir():
            raise ValueError("it is a directory")
        if _takes_bytes_only(file):
            with file.open("ab"):
                return
        _try_directory(_target(file).parent)


def write_file(file: Path, text: str) -> None:
    """Write a file that :func:`check_file` let pass.

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


def _try_directory(directory: Path) -> None:
    """Write to the part of the path that exists: what is missing below it can then be made."""
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
