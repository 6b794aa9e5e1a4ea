"""Progress reports of one run to a function."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from cjepa_kernels.train.loop.metric_history import MetricHistory
from cjepa_kernels.train.loop.module import CJEPAModule

_PROGRESS_INTERVAL = 0.5  # seconds


@dataclass(frozen=True)
class Progress:
    """How far a run is, and the metrics of its last complete epoch."""

    step: int
    total_steps: int
    epoch: int
    metrics: dict[str, float]


class ProgressHook(Callback):
    """Reports progress to a function, at most twice a second and at each epoch's end.

    Args:
        report: Called with the progress.
        history: The source of the metrics. It must run before this callback.
    """

    def __init__(self, report: Callable[[Progress], None], history: MetricHistory) -> None:
        self.report = report
        self.history = history
        self._last = 0.0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if time.perf_counter() - self._last >= _PROGRESS_INTERVAL:
            self._report(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(pl_module)

    def _report(self, module: L.LightningModule) -> None:
        assert isinstance(module, CJEPAModule)
        self._last = time.perf_counter()
        if module.trainer.is_global_zero:
            row = dict(self.history.rows[-1]) if self.history.rows else {}
            self.report(
                Progress(module.global_step, module.total_steps, module.current_epoch + 1, row)
            )
