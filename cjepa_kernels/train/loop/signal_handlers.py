"""A run leaves the process's signal handlers in place, where Lightning would install its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.callbacks import Callback


class SignalHandlers(Callback):
    """Restores the handlers of SIGTERM and SIGUSR1 that the process had before the training.

    Lightning's own handlers would end a terminated run with exit status 0 and wait for other ranks,
    which may be waiting themselves. Under SLURM they would save a checkpoint in the middle of an
    epoch, and a run that resumes from it ends with other numbers.
    """

    def __init__(self) -> None:
        names = ("SIGTERM", "SIGUSR1")
        kinds = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._handlers = {kind: signal.getsignal(kind) for kind in kinds}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for kind, handler in self._handlers.items():
                if handler is not None:
                    signal.signal(kind, handler)


@contextmanager
def preserve_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within this context and after it.

    Lightning would raise SystemExit instead and ignore a second Ctrl-C.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise ended.__context__ from None
        raise
    finally:
        if in_main_thread and handler is not None:
            signal.signal(signal.SIGINT, handler)
