"""A lock on a directory, so that two processes never write the same run."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # not POSIX: the lock warns as it does on a file system without locks
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"

_PATIENCE = 2.0  # seconds, for the processes of a killed program to end
_POLL = 0.05
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_LOG = logging.getLogger(__name__)


class DirectoryLockedError(ValueError):
    """Another process works in the directory."""


class DirectoryLock:
    """An exclusive lock on a directory, for the ``with`` statement.

    The kernel holds it for the process, so it ends with the process, however that ends. The file
    ``.lock`` names the owner while the lock is held.

    Entering the block locks the directory if it exists. :meth:`acquire` creates it first if
    necessary, so that a program can check its arguments before it writes anything.

    Args:
        directory: The directory.
        wanted: Whether to lock at all. Of several ranks, only the first one does.

    Raises:
        DirectoryLockedError: If another process holds the lock; the message names it.
    """

    # The package filelock would truncate the file, and with it the owner's name.

    def __init__(self, directory: Path, *, wanted: bool = True) -> None:
        self.directory = Path(directory)
        self.wanted = wanted
        self._descriptor: int | None = None

    def __enter__(self) -> DirectoryLock:
        if self.directory.is_dir():
            self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Create the directory and lock it, unless this object holds the lock already."""
        if not self.wanted or self._descriptor is not None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _PATIENCE
        while True:
            descriptor = os.open(self.directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                taken = self._try(descriptor)
                owner = b"" if taken else os.pread(descriptor, 200, 0)
            except BaseException:
                os.close(descriptor)
                raise
            if taken:
                self._descriptor = descriptor
                return
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise DirectoryLockedError(
                    f"{str(self.directory)!r} is in use by "
                    f"{owner.decode(errors='replace').strip() or 'another process'}: wait until it "
                    "ends, or choose another directory"
                )
            time.sleep(_POLL)

    def _try(self, descriptor: int) -> bool:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no fcntl")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            _LOG.warning(
                "note: the file system of %r has no locks (%s); no second process may use this "
                "directory while this one runs",
                str(self.directory),
                error.strerror,
            )
            return True
        try:
            # The previous owner may have removed the file after it was opened here.
            if not os.path.samestat(os.fstat(descriptor), os.stat(self.directory / LOCK_FILE)):
                return False
        except FileNotFoundError:
            return False
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{owner}\n".encode(), 0)
        return True

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is None:
            return
        # The file is removed while it is locked. A process that has opened it since sees that.
        (self.directory / LOCK_FILE).unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
