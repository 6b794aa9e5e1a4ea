"""Progress of one run: a bar on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from cjepa_kernels.train.loop.metric_history import MetricHistory
from cjepa_kernels.train.loop.module import CJEPAModule


class RunProgressBar(Callback):
    """One bar over all epochs, with the metrics of the last complete one.

    Args:
        history: The source of the metrics. It must run before this callback.
        console: Where the bar is drawn. Default: the standard error.
    """

    # Lightning's bar begins anew at each epoch, which may end before its speed is known, and its
    # fixed columns take more than 80 characters.

    def __init__(self, history: MetricHistory, console: Console | None = None) -> None:
        self.history = history
        one_line = Column(no_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(compact=True, table_column=one_line),
            TextColumn("{task.fields[metrics]}"),
            console=console or Console(stderr=True),
            transient=True,
            expand=True,
        )
        self._task: TaskID | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CJEPAModule)
        if not trainer.is_global_zero:
            return
        description = f"epoch {pl_module.current_epoch + 1}/{trainer.max_epochs}"
        if self._task is None:
            self.progress.start()
            self._task = self.progress.add_task(
                description,
                total=pl_module.total_steps,
                completed=pl_module.global_step,
                metrics=self._metrics(),
            )
        self.progress.update(self._task, description=description, metrics=self._metrics())

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._task is not None:
            self.progress.update(self._task, completed=pl_module.global_step)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.progress.stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.progress.stop()

    def _metrics(self) -> str:
        if not self.history.rows:
            return ""
        row = self.history.rows[-1]
        return f"loss {row['loss']:.4f}, accuracy {row['contrastive_accuracy']:.3f}"


class EpochLines(Callback):
    """Prints a line at each epoch's end to the standard error.

    Args:
        history: The source of the metrics. It must run before this callback.
    """

    def __init__(self, history: MetricHistory) -> None:
        self.history = history
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            row = self.history.rows[-1]
            print(
                f"epoch {int(row['epoch'])}/{trainer.max_epochs}: loss {row['loss']:.4f}, "
                f"accuracy {row['contrastive_accuracy']:.3f}, "
                f"{time.perf_counter() - self._started:.1f} s",
                file=sys.stderr,
                flush=True,
            )
