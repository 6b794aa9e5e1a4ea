"""The clock of a run."""

from __future__ import annotations

import time
from typing import Any

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
