"""What happens around the steps: metric history, advisor, log, progress."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cjepa_kernels.files import atomic_write
from cjepa_kernels.train.data.dataset import Dataset
from cjepa_kernels.train.evaluation.probes import effective_rank, evaluate, standard_deviation
from cjepa_kernels.train.loop.advisor import METRICS as ADVISOR_METRICS
from cjepa_kernels.train.loop.advisor import Advisor
from cjepa_kernels.train.loop.module import CJEPAModule, feature_extractor
from cjepa_kernels.train.reported_error import ReportedError

Row = dict[str, float]

_COLLAPSE_IMAGES = 512
_PROGRESS_INTERVAL = 0.5  # seconds


class DivergenceError(ReportedError):
    """The loss is no longer finite."""


@dataclass(frozen=True)
class Progress:
    """How far a run is, and the metrics of its last complete epoch."""

    step: int
    total_steps: int
    epoch: int
    metrics: dict[str, float]


class MetricHistory(Callback):
    """One row of metrics per epoch, in memory, in ``metrics.csv`` and in the loggers.

    The rows travel in the checkpoint, so that a resumed run's file has the rows of before; the
    file is replaced as a whole at each epoch's end.

    Args:
        path: The CSV file.
        dataset: Images for the collapse monitor and the probes.
        monitored: (n,) int64, training images of which the collapse monitor looks at some.
    """

    def __init__(self, path: Path, dataset: Dataset, monitored: Tensor) -> None:
        self.path = path
        self.dataset = dataset
        # A source may be sorted by class, so the first images could all be of one.
        order = torch.randperm(len(monitored), generator=torch.Generator().manual_seed(0))
        self.monitored = monitored[order[:_COLLAPSE_IMAGES].sort()[0]]
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
        # Summed on the device and read once per epoch: reading is a synchronisation.
        metrics = outputs["metrics"]
        if metrics.device.type == "mps":  # which has no fp64
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
        cls, _ = extract(self.dataset.train.images[self.monitored])
        row = {
            "cls_std": standard_deviation(cls.numpy()),
            "cls_effective_rank": effective_rank(cls.numpy()),
        }
        config = module.config.evaluation
        if config.every_n_epochs and epoch % config.every_n_epochs == 0:
            quick = evaluate(extract, self.dataset, config, quick=True)
            row |= {f"eval/{name}": value for name, value in quick.items()}
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]


class AdvisorHook(Callback):
    """Asks the advisor once per epoch and keeps ``log.txt``.

    Args:
        advisor: The advisor.
        history: Where the metrics come from; it must run first.
        path: The log file.
        data_lines: What was understood of the data: the log begins with it.
    """

    def __init__(
        self,
        advisor: Advisor,
        history: MetricHistory,
        path: Path,
        data_lines: Sequence[str] = (),
    ) -> None:
        self.advisor = advisor
        self.history = history
        self.path = path
        self.data_lines = tuple(data_lines)
        self.findings: list[dict[str, str | float]] = []
        self.lines: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.write()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row = self.history.rows[-1]
        epoch = int(row["epoch"])
        if not trainer.is_global_zero:
            return
        self.lines.append(
            f"epoch {epoch}: loss {row['loss']:.4f}, jepa {row['jepa_loss']:.4f}, "
            f"contrastive {row['contrastive_loss']:.4f}, "
            f"accuracy {row['contrastive_accuracy']:.3f}"
        )
        metrics = {name: row[name] for name in (*ADVISOR_METRICS, "cls_std")}
        for finding in self.advisor.update(epoch, metrics):
            entry: dict[str, str | float] = dict(vars(finding))
            self.findings.append(entry)
            self.lines.append(
                f"epoch {epoch}: finding {finding.rule}: {finding.message} ({finding.evidence})"
            )
        self.write()

    def write(self) -> None:
        """Replace ``log.txt``."""
        atomic_write(self.path, "".join(f"{line}\n" for line in (*self.data_lines, *self.lines)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "advisor": self.advisor.state_dict(),
            "findings": [dict(finding) for finding in self.findings],
            "lines": list(self.lines),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.advisor.load_state_dict(state_dict["advisor"])
        self.findings = [dict(finding) for finding in state_dict["findings"]]
        self.lines = list(state_dict["lines"])


class Stopwatch(Callback):
    """Seconds spent in training, over all resumptions."""

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


class ProgressHook(Callback):
    """Reports progress to a function, at most twice a second and at each epoch's end.

    Args:
        report: Called with the progress.
        history: Where the metrics come from; it must run first.
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


class SignalHandlers(Callback):
    """Keeps the handlers of SIGTERM and SIGUSR1 that there were before the training.

    Lightning's own would end a terminated run with exit status 0, wait for other ranks that may be
    waiting themselves, and under SLURM save a checkpoint in the middle of an epoch, from which a
    run does not go on to the same numbers.
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


def to_csv(rows: list[Row]) -> str:
    """Format rows as CSV; a metric that only some rows have is empty in the others.

    Args:
        rows: One mapping per line.

    Returns:
        The text with a header; integers without a fraction, other numbers in full precision.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(row: Row, name: str) -> str:
        if name not in row:
            return ""
        value = row[name]
        return str(int(value)) if name in ("epoch", "step") else repr(value)

    lines = [",".join(columns)]
    lines += [",".join(cell(row, name) for name in columns) for row in rows]
    return "\n".join(lines) + "\n"
