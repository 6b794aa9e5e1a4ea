"""Ctrl-C and SIGTERM end a run with a line that says how to go on with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cjepa_kernels.train.loop.run_files import LAST_CHECKPOINT


class Terminated(KeyboardInterrupt):
    """SIGTERM ends the program like Ctrl-C, but with another exit status."""


@contextmanager
def resumable(directory: Path) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one line and the usual exit status, 130 or 143.

    Args:
        directory: Where the interrupted run or comparison keeps its checkpoints.
    """
    with _raised_on_sigterm():
        try:
            yield
        except KeyboardInterrupt as stop:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # only the first rank prints it
                print(_how_to_go_on(directory), file=sys.stderr)
            signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            raise SystemExit(128 + signum) from None


@contextmanager
def _raised_on_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _how_to_go_on(directory: Path) -> str:
    if not any(directory.rglob(LAST_CHECKPOINT.name)):
        return (
            "interrupted before the end of the first epoch, so nothing is kept; the same command "
            "starts again"
        )
    return (
        f"interrupted; {directory} keeps everything up to the end of the last complete epoch, and "
        "the same command goes on from there"
    )
