"""A callback that asks the advisor once per epoch and writes its findings to ``log.txt``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from cjepa_kernels.files import atomic_write
from cjepa_kernels.train.loop.advisor import METRICS, Advisor
from cjepa_kernels.train.loop.metric_history import MetricHistory


class AdvisorHook(Callback):
    """Asks the advisor once per epoch and writes ``log.txt``.

    Args:
        advisor: The advisor.
        history: The source of the metrics. It must run before this callback.
        path: The log file.
        data_lines: The summary of the data, with which the log begins.
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
        if not trainer.is_global_zero:
            return
        row = self.history.rows[-1]
        epoch = int(row["epoch"])
        self.lines.append(
            f"epoch {epoch}: loss {row['loss']:.4f}, jepa {row['jepa_loss']:.4f}, "
            f"contrastive {row['contrastive_loss']:.4f}, "
            f"accuracy {row['contrastive_accuracy']:.3f}"
        )
        metrics = {name: row[name] for name in (*METRICS, "cls_std")}
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
