"""One training run in one directory: started, resumed after a kill, or found finished."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from cjepa_kernels.backends import check_device
from cjepa_kernels.files import atomic_write, remove_partial_files
from cjepa_kernels.train.config import (
    ExperimentConfig,
    config_from_dict,
    config_to_dict,
    uses_labels,
)
from cjepa_kernels.train.data.batches import PretrainData
from cjepa_kernels.train.data.dataset import (
    Dataset,
    channel_statistics,
    load_dataset,
    pretrain_indices,
    resolve_pretrain_classes,
)
from cjepa_kernels.train.data.fingerprint import check_fingerprint, fingerprint
from cjepa_kernels.train.data.summary import DataSummary, summarize
from cjepa_kernels.train.evaluation.features import FeatureExtractor, Features
from cjepa_kernels.train.evaluation.probes import (
    check_dataset,
    check_probe_images,
    evaluate,
)
from cjepa_kernels.train.loop.advisor import Advisor
from cjepa_kernels.train.loop.advisor_hook import AdvisorHook
from cjepa_kernels.train.loop.checkpoints import (
    AtomicCheckpointIO,
    DamagedCheckpointError,
    EpochCheckpoint,
    read_checkpoint,
    remedy,
)
from cjepa_kernels.train.loop.directory_lock import DirectoryLock
from cjepa_kernels.train.loop.metric_history import MetricHistory
from cjepa_kernels.train.loop.module import (
    CJEPAModule,
    build_loss,
    feature_extractor,
)
from cjepa_kernels.train.loop.progress_reports import Progress, ProgressHook
from cjepa_kernels.train.loop.run_directory import (
    RunResult,
    check_checkpoint,
    check_last_checkpoint,
    check_run_directory,
    encode_result,
    load_result,
    now,
)
from cjepa_kernels.train.loop.run_files import LAST_CHECKPOINT, RESULT
from cjepa_kernels.train.loop.signal_handlers import SignalHandlers, preserve_ctrl_c
from cjepa_kernels.train.loop.stopwatch import Stopwatch
from cjepa_kernels.train.loop.training_progress import EpochLines, RunProgressBar
from cjepa_kernels.train.model.vit import VisionTransformer


def train(
    config: ExperimentConfig,
    run_dir: Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_summary: Callable[[DataSummary], None] | None = None,
    progress_bar: bool = True,
    epoch_lines: bool = False,
) -> RunResult:
    """Train and evaluate one encoder, or go on where a killed process stopped.

    The directory gets ``config.yaml``, ``checkpoints/last.ckpt`` (replaced at each epoch's end;
    the one before stays as ``previous.ckpt``), ``metrics.csv``, ``log.txt``, ``tensorboard/`` and,
    at the end, ``result.json``. On the CPU, a run that was killed and started again ends with the
    numbers of an uninterrupted one.

    Args:
        config: The experiment.
        run_dir: Directory of this run alone. With a finished result of the same configuration and
            the same data nothing is trained, and the result says so.
        on_progress: Called with the progress, a few times a second at most.
        on_summary: Called once before training with what was understood of the data.
        progress_bar: Whether to draw a progress bar.
        epoch_lines: Whether to print a line per epoch to the standard error if no progress bar is
            drawn.

    Returns:
        Metrics of every epoch, the final evaluation, the advisor's findings. Of several ranks,
        only the first one evaluates.

    Raises:
        FileNotFoundError: If the data are missing.
        ValueError: If the configuration does not fit the data, or the directory holds a run of
            another configuration, was trained on other data, is damaged or in use.
        DivergenceError: If the loss stops being finite.
    """
    run_dir = Path(run_dir)
    _check_loss(config)
    check_run_directory(config, run_dir)
    finished = run_dir / RESULT
    show_bar = progress_bar and config.logging.progress_bar
    # A finished run is only read, and its directory may not be writable.
    first_rank = _is_first_rank(config)
    with (
        _threads(config.trainer.threads),
        DirectoryLock(run_dir, wanted=first_rank and not finished.is_file()) as lock,
    ):
        known = load_result(run_dir) if finished.is_file() else None
        dataset = load_dataset(config.data, show_progress=show_bar)
        samples = check_against_data(config, dataset)
        summary = summarize(config, dataset)
        data = fingerprint(dataset)
        if known is not None:
            check_fingerprint(known.data, data, origin=str(finished), remedy=start_again(run_dir))
            return known
        module = _build_module(config, dataset, samples, data)
        lock.acquire()
        check_run_directory(config, run_dir)  # what another process wrote since then
        last = run_dir / LAST_CHECKPOINT
        steps_before = completed_steps(run_dir, config, data)
        if first_rank:
            atomic_write(
                run_dir / "config.yaml", yaml.safe_dump(config_to_dict(config), sort_keys=False)
            )
        stopwatch = Stopwatch()
        history = MetricHistory(run_dir / "metrics.csv", dataset, samples)
        advice = AdvisorHook(
            _advisor(config, module), history, run_dir / "log.txt", summary.lines()
        )
        callbacks: list[Callback] = [SignalHandlers(), stopwatch, history, advice]
        if on_progress is not None:
            callbacks.append(ProgressHook(on_progress, history))
        if show_bar:
            callbacks.append(RunProgressBar(history))
        elif epoch_lines:
            callbacks.append(EpochLines(history))
        callbacks.append(
            EpochCheckpoint(run_dir / LAST_CHECKPOINT.parent, config.trainer.keep_every_n_epochs)
        )
        with _quiet_lightning(), preserve_ctrl_c():
            trainer = _trainer(config, run_dir, callbacks, steps_before)
            if trainer.is_global_zero:
                remove_partial_files(run_dir)
                if on_summary is not None:
                    on_summary(summary)
            trainer.fit(
                module,
                datamodule=PretrainData(dataset, samples, config.trainer.batch_size, config.seed),
                ckpt_path=str(last) if last.is_file() else None,
                weights_only=True,
            )
        result = RunResult(
            run_dir=run_dir,
            history=history.rows,
            evaluation={},
            findings=advice.findings,
            seconds=stopwatch.seconds,
            data=data,
            finished=now(),
        )
        if not trainer.is_global_zero:
            return result
        # These files are written again in case no epoch was left to train: a file may have been
        # damaged since, and the checkpoint has everything that belongs in it.
        history.write()
        advice.write()
        evaluation = evaluate(
            feature_extractor(module.target_encoder, trainer.strategy.root_device),
            dataset,
            config.evaluation,
            pretrain_classes=resolve_pretrain_classes(config.data, dataset),
        )
        result = replace(result, evaluation=evaluation, seconds=stopwatch.seconds, finished=now())
        atomic_write(finished, encode_result(result))
    return result


def start_again(directory: Path) -> str:
    """What a user can do about results of other data, for the end of an error message."""
    return (
        f"choose another directory, or remove {str(directory)!r} to train on the data as they are"
    )


def _is_first_rank(config: ExperimentConfig) -> bool:
    # Lightning has the rank from the environment before there is a process group.
    return config.trainer.devices == 1 or getattr(rank_zero_only, "rank", 0) == 0


def load_encoder(checkpoint: Path) -> tuple[FeatureExtractor, ExperimentConfig]:
    """Load the target encoder of a checkpoint for evaluation.

    Args:
        checkpoint: A ``.ckpt`` file, or the directory of a run, whose last checkpoint is loaded.

    Returns:
        The feature extractor, on the CPU, and the experiment that it comes from. The extractor
        takes uint8 images (N, C, H, W) with pixels of 0 to 255, as they are stored, and returns
        the CLS tokens (N, D) and the means of the patch tokens (N, D), fp32. It raises a TypeError
        for another dtype, and a ValueError if C, H or W differs from the experiment's.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or is not a checkpoint of this program.
    """
    file = Path(checkpoint)
    if file.is_dir():
        file = file / LAST_CHECKPOINT
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {str(file)!r}")
    try:
        stored = read_checkpoint(file)
    except DamagedCheckpointError as error:
        if file.name != LAST_CHECKPOINT.name:
            raise
        raise ValueError(f"{error}: {remedy(file.parent.parent)}") from error
    try:
        config = config_from_dict(stored["experiment"], origin=f"the experiment in {file}")
        channels, height, width = stored["image_shape"]
        prefix = "target_encoder."
        weights = {
            name.removeprefix(prefix): value
            for name, value in stored["state_dict"].items()
            if name.startswith(prefix)
        }
        # The meta device takes no memory: it is not known yet whether the file has these weights.
        with torch.device("meta"):
            encoder = VisionTransformer(
                config.model, (channels, height, width), torch.zeros(channels), torch.ones(channels)
            )
        encoder.load_state_dict(weights, assign=True)
        encoder.float()
    except Exception as error:
        # An intact checkpoint of another program fails in this block, with an error of any kind.
        raise ValueError(f"{file} is not a checkpoint of this program: {error}") from error
    return _checked(feature_extractor(encoder, "cpu"), (channels, height, width)), config


def untrained_encoder(config: ExperimentConfig, dataset: Dataset | None = None) -> FeatureExtractor:
    """Build the encoder as it is before its first step, a baseline.

    Args:
        config: The experiment.
        dataset: Its data, if loaded already.

    Returns:
        The feature extractor, on the CPU.

    Raises:
        FileNotFoundError: If the data are missing.
        ValueError: If the configuration does not fit the data.
    """
    dataset = load_dataset(config.data, show_progress=False) if dataset is None else dataset
    module = _build_module(config, dataset, check_against_data(config, dataset))
    return feature_extractor(module.target_encoder, "cpu")


def _checked(extract: FeatureExtractor, image_shape: Sequence[int]) -> FeatureExtractor:
    def checked(images: Tensor) -> Features:
        if isinstance(images, Tensor) and tuple(images.shape[1:]) != tuple(image_shape):
            raise ValueError(
                f"images: the encoder was trained on shape {tuple(image_shape)}, "
                f"got {tuple(images.shape[1:])}"
            )
        return extract(images)

    return checked


def check_against_data(config: ExperimentConfig, dataset: Dataset) -> Tensor:
    """Check what can only be checked once the data are known.

    Args:
        config: The experiment.
        dataset: What its data section loads.

    Returns:
        (n,) int64, indices of the training images that pretraining sees.

    Raises:
        ValueError: If model, masks, loss, batch size, classes or probes do not fit the data, or
            the machine lacks the devices.
    """
    _check_loss(config, dataset.image_shape)
    _check_devices(config)
    classes = resolve_pretrain_classes(config.data, dataset)
    check_dataset(dataset, classes)
    check_probe_images(dataset, config.evaluation, classes)
    samples = pretrain_indices(config.data, dataset)
    labels = dataset.train.labels[samples]
    if uses_labels(config) and (labels == labels[:1]).all():
        raise ValueError(
            "loss.contrastive_type: 'sup_con' trains with the labels (data.label_column), and the "
            f"{len(samples)} images to pretrain on are all of one class"
        )
    if config.trainer.batch_size > len(samples):
        raise ValueError(
            f"trainer.batch_size: expected at most the {len(samples)} images to pretrain on, "
            f"got {config.trainer.batch_size}"
        )
    return samples


def _check_loss(config: ExperimentConfig, image_shape: tuple[int, int, int] | None = None) -> None:
    try:
        build_loss(config, image_shape)
    except RuntimeError as error:
        # The back end named by loss.backend is not available.
        raise ValueError(str(error)) from error
    if config.loss.get("contrastive_on_context", True) is False:
        raise ValueError(
            "loss.contrastive_on_context: expected true, because the target encoder's features "
            "carry no gradient and contrasting them trains nothing; got False"
        )


def _check_devices(config: ExperimentConfig) -> None:
    """Let Lightning look for the devices while no file is written yet, and check the back end."""
    wanted = config.trainer
    cores = os.cpu_count() or 1
    if wanted.accelerator == "cpu" and wanted.devices > max(2, cores):
        raise ValueError(
            "trainer.devices: each device of trainer.accelerator='cpu' is a process, and this "
            f"machine has {cores} CPU cores, got {wanted.devices}"
        )
    try:
        with _quiet_lightning():
            trainer = L.Trainer(**_device_options(config), logger=False, barebones=True)
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ValueError(
            f"trainer.accelerator: this machine does not offer {wanted.accelerator!r} with "
            f"trainer.devices={wanted.devices} and trainer.precision={wanted.precision!r}: {error}"
        ) from error
    if wanted.precision == "16-mixed" and isinstance(trainer.accelerator, CPUAccelerator):
        raise ValueError(
            "trainer.precision: the CPU takes '32-true' or 'bf16-mixed', got '16-mixed' with "
            f"trainer.accelerator={wanted.accelerator!r}"
        )
    backend = config.loss.get("backend", "auto")
    if backend != "auto":
        try:
            check_device(backend, trainer.strategy.root_device.type)
        except ValueError as error:
            raise ValueError(
                f"loss.backend: {error}, with trainer.accelerator={wanted.accelerator!r}"
            ) from error


def completed_steps(run_dir: Path, config: ExperimentConfig, data: str) -> int:
    """Read how far a run came, and check that it can go on.

    Args:
        run_dir: Directory of the run.
        config: Its experiment.
        data: Fingerprint of its data as they are now.

    Returns:
        Optimiser steps in its last checkpoint, 0 without one.

    Raises:
        ValueError: If the checkpoint is damaged or gone, or belongs to another experiment or to
            other data.
    """
    file = run_dir / LAST_CHECKPOINT
    check_last_checkpoint(run_dir)
    if not file.exists():
        return 0
    try:
        stored = read_checkpoint(file)
    except DamagedCheckpointError as error:
        raise ValueError(f"{error}: {remedy(run_dir)}") from error
    check_checkpoint(stored, config, file)
    check_fingerprint(stored.get("data"), data, origin=str(file), remedy=start_again(run_dir))
    return int(stored["global_step"])


def _build_module(
    config: ExperimentConfig, dataset: Dataset, samples: Tensor, data: str | None = None
) -> CJEPAModule:
    mean, std = channel_statistics(dataset.train.images, samples)
    steps_per_epoch = len(samples) // config.trainer.batch_size
    total_steps = steps_per_epoch * config.trainer.epochs
    return CJEPAModule(
        config,
        dataset.image_shape,
        channel_mean=mean,
        channel_std=std,
        total_steps=total_steps,
        data=data,
    )


def _advisor(config: ExperimentConfig, module: CJEPAModule) -> Advisor:
    ranks = 1 if module.gathers else config.trainer.devices
    return Advisor(
        warmup_epochs=config.optimizer.warmup_fraction * config.trainer.epochs,
        contrastive_weight=module.loss.contrastive_weight,
        jepa_weight=module.loss.jepa_weight,
        batch_size=config.trainer.batch_size // ranks,  # what a rank contrasts
        temperature=float(module.loss.contrastive.temperature),
        contrastive_type=module.loss.contrastive_type,
    )


def _trainer(
    config: ExperimentConfig,
    run_dir: Path,
    callbacks: list[Callback],
    steps_before: int,
) -> L.Trainer:
    loggers: list[Logger] = []
    if config.logging.tensorboard:
        # The resumed run logs again what a killed process logged after its last checkpoint.
        loggers.append(
            TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=steps_before + 1)
        )
    return L.Trainer(
        **_device_options(config),
        default_root_dir=run_dir,
        max_epochs=config.trainer.epochs,
        gradient_clip_val=config.optimizer.gradient_clip,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _device_options(config: ExperimentConfig) -> dict[str, Any]:
    return {
        "accelerator": config.trainer.accelerator,
        "devices": config.trainer.devices,
        "strategy": "ddp" if config.trainer.devices > 1 else "auto",
        "precision": config.trainer.precision,
    }


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence tips about hardware, loggers and data loaders that do not apply here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
