"""The clock of a run, and the signal handlers that it keeps."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class Stopwatch(Callback):
    """Seconds spent in a run, over all resumptions, with the evaluation at its end.

    Lightning's Timer stops before that evaluation, and existing checkpoints hold the state of this
    callback.
    """

    def __init__(self) -> None:
        self._before = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run, pauses left out."""
        return self._before + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = float(state_dict["seconds"])
        self._started = time.perf_counter()


class SignalHandlers(Callback):
    """Keeps the handlers of SIGTERM and SIGUSR1 that there were before the training.

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
