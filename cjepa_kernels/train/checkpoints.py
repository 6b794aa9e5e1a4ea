"""The checkpoints of a run: saved at each epoch's end, complete or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from cjepa_kernels.train.atomic import atomic_path


class EpochCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` at each epoch's end, after every other callback.

    Args:
        directory: Where the checkpoints go.
        keep_every_n_epochs: Also keep every n-th epoch's checkpoint; 0: only the last one.
    """

    def __init__(self, directory: Path, keep_every_n_epochs: int = 0) -> None:
        self.directory = directory
        self.keep_every_n_epochs = keep_every_n_epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.keep_every_n_epochs and epoch % self.keep_every_n_epochs == 0:
            trainer.save_checkpoint(self.directory / f"epoch{epoch:04d}.ckpt")
        trainer.save_checkpoint(self.directory / "last.ckpt")


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are complete or absent, and that hold tensors and plain values only."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,
    ) -> None:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # PyTorch reports a position in the file; what the operating system said is behind.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        try:
            checkpoint: dict[str, Any] = torch.load(
                path, map_location=map_location or "cpu", weights_only=True
            )
        except Exception as error:
            # A damaged file fails somewhere in unpickling, in a way that names nothing.
            raise ValueError(
                f"{path} is damaged ({error}): remove it to start the run again"
            ) from error
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink(missing_ok=True)
