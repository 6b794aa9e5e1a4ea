"""The checkpoints of a run: complete at each epoch's end, and verified when they are read."""

from __future__ import annotations

import errno
import os
import shlex
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from cjepa_kernels.error_lines import first_line
from cjepa_kernels.files import atomic_path
from cjepa_kernels.train.loop.run_files import LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, RESULT


class EpochCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` at each epoch's end, after every other callback.

    The checkpoint that it replaces is kept as ``previous.ckpt``.

    Args:
        directory: Where the checkpoints go.
        keep_every_n_epochs: Also keep every n-th epoch's checkpoint; 0: only the last two.
    """

    # Lightning's ModelCheckpoint writes the absolute path of its directory into each checkpoint, so
    # the same run would leave different checkpoints in different directories.

    def __init__(self, directory: Path, keep_every_n_epochs: int = 0) -> None:
        self.directory = directory
        self.keep_every_n_epochs = keep_every_n_epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.keep_every_n_epochs and epoch % self.keep_every_n_epochs == 0:
            trainer.save_checkpoint(self.directory / f"epoch{epoch:04d}.ckpt")
        trainer.save_checkpoint(self.directory / LAST_CHECKPOINT.name)


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are complete or absent, and that hold tensors and plain values only."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,
    ) -> None:
        target = Path(path)
        is_last = target.name == LAST_CHECKPOINT.name
        previous = target.with_name(PREVIOUS_CHECKPOINT.name) if is_last else None
        with atomic_path(target, keep_as=previous) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # PyTorch reports a position in the file; the system's error is its context.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location=map_location or "cpu")

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink(missing_ok=True)


class DamagedCheckpointError(ValueError):
    """A file that is not a checkpoint, or not as it was written."""


def read_checkpoint(file: Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint and verify that it is as it was written.

    PyTorch stores a checksum with each record but does not compare it when it reads the file.

    Args:
        file: The checkpoint.
        map_location: Where the tensors go.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedCheckpointError: If the file is damaged or of another kind. The message has the file
            and the reason.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            # PyTorch leaves these attributes at 0. With one flipped bit it takes a record for a
            # directory, and returns memory that it has not written.
            altered = [info.filename for info in archive.infolist() if info.external_attr]
    except Exception as error:
        # The operating system reports a damaged position in the file as an invalid argument.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise DamagedCheckpointError(
            f"{file} is damaged, or is not a checkpoint ({first_line(error)})"
        ) from error
    if damaged or altered:
        raise DamagedCheckpointError(
            f"{file} is damaged: its record {damaged or altered[0]!r} is not as it was written"
        )
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # PyTorch's message advises to load the file without weights_only, which would run its code.
        raise DamagedCheckpointError(
            f"{file} is not a checkpoint of this program: it does not load with weights_only=True"
        ) from error
    if not isinstance(checkpoint, dict):
        raise DamagedCheckpointError(
            f"{file} is not a checkpoint of this program: expected a dictionary, "
            f"got {type(checkpoint).__name__}"
        )
    return checkpoint


def remedy(run_dir: Path) -> str:
    """Say how to go on with a run whose last checkpoint cannot be used.

    Args:
        run_dir: Directory of the run.

    Returns:
        Sentences for the end of an error message.
    """
    last, previous = run_dir / LAST_CHECKPOINT, run_dir / PREVIOUS_CHECKPOINT
    result = run_dir / RESULT
    finished = [str(result)] if result.is_file() else []
    restart = (
        f"remove it to start the run again: {shlex.join(['rm', '-r', str(last.parent), *finished])}"
    )
    try:
        epoch = int(read_checkpoint(previous)["epoch"]) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return restart
    commands = [["mv", str(previous), str(last)]]
    if finished:
        commands.append(["rm", *finished])
    return (
        f"the checkpoint before it is sound; to go on from the end of epoch {epoch}, run "
        f"{' && '.join(map(shlex.join, commands))} and start the same command again; or {restart}"
    )
