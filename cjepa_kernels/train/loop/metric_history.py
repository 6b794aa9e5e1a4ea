"""The metrics of every epoch: collected, checked and written to ``metrics.csv``."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cjepa_kernels.files import atomic_write
from cjepa_kernels.train.data.dataset import Dataset
from cjepa_kernels.train.evaluation.probes import evaluate
from cjepa_kernels.train.loop.collapse_monitor import CollapseMonitor
from cjepa_kernels.train.loop.module import CJEPAModule, feature_extractor
from cjepa_kernels.train.reported_error import ReportedError

Row = dict[str, float]


class DivergenceError(ReportedError):
    """The loss is no longer finite."""


class MetricHistory(Callback):
    """One row of metrics per epoch, in memory, in ``metrics.csv`` and in the loggers.

    The checkpoint holds the rows, so that the file of a resumed run has all of them. The file is
    replaced as a whole at each epoch's end.

    Args:
        path: The CSV file.
        dataset: Images for the collapse monitor and the probes.
        samples: (n,) int64, the training images of which the collapse monitor looks at some.
    """

    # Lightning's CSVLogger appends to its file, so the rows that a killed process wrote after its
    # last checkpoint would be there twice after the run is resumed.

    def __init__(self, path: Path, dataset: Dataset, samples: Tensor) -> None:
        self.path = path
        self.dataset = dataset
        self.collapse_monitor = CollapseMonitor(dataset, samples)
        self.rows: list[Row] = []
        self._sums: Tensor | None = None
        self._steps = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums, self._steps = None, 0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # The sum stays on the device and is read once per epoch, because reading synchronises.
        metrics = outputs["metrics"]
        if metrics.device.type == "mps":  # MPS has no fp64
            metrics = metrics.cpu()
        metrics = metrics.double()
        self._sums = metrics if self._sums is None else self._sums + metrics
        self._steps += 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CJEPAModule)
        assert self._sums is not None
        means = trainer.strategy.reduce(self._sums / self._steps, reduce_op="mean")
        row = self._row(trainer, pl_module, means.tolist())
        if not math.isfinite(row["loss"]):
            raise DivergenceError(
                f"the loss is {row['loss']} in epoch {int(row['epoch'])}: lower "
                "optimizer.learning_rate or raise loss.contrastive_temperature"
            )
        if trainer.is_global_zero:
            row |= self._evaluate(pl_module, int(row["epoch"]))
        self.rows.append(row)
        if trainer.is_global_zero:
            self.write()
            for logger in trainer.loggers:
                logger.log_metrics(row, step=int(row["step"]))

    def write(self) -> None:
        """Replace ``metrics.csv``."""
        atomic_write(self.path, to_csv(self.rows))

    def _row(self, trainer: L.Trainer, module: CJEPAModule, means: list[float]) -> Row:
        step = module.global_step
        row: Row = {"epoch": float(module.current_epoch + 1), "step": float(step)}
        row |= dict(zip(module.metric_names, means, strict=True))
        jepa = module.loss.jepa_weight * row["jepa_loss"]
        contrastive = module.loss.contrastive_weight * row["contrastive_loss"]
        row["term_ratio"] = contrastive / jepa if jepa else math.inf
        row["learning_rate"] = module.learning_rate_at(step - 1)
        row["momentum"] = module.momentum_at(step - 1)
        return row

    def _evaluate(self, module: CJEPAModule, epoch: int) -> Row:
        extract = feature_extractor(module.target_encoder, module.device)
        row = self.collapse_monitor.measure(extract)
        config = module.config.evaluation
        if config.every_n_epochs and epoch % config.every_n_epochs == 0:
            quick = evaluate(extract, self.dataset, config, quick=True)
            row |= {f"eval/{name}": value for name, value in quick.items()}
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]


def to_csv(rows: list[Row]) -> str:
    """Format rows as CSV; a metric that only some rows have is empty in the others.

    Args:
        rows: One mapping per line.

    Returns:
        The text with a header; integers without a fraction, other numbers in full precision.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {name: int(row[name]) for name in ("epoch", "step") if name in row})
    return text.getvalue()
