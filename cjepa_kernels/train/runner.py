"""One training run in one directory: started, resumed after a kill, or found finished."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from cjepa_kernels.train.advisor import Advisor
from cjepa_kernels.train.atomic import atomic_write, remove_partial_files
from cjepa_kernels.train.batches import PretrainData
from cjepa_kernels.train.callbacks import (
    AdvisorHook,
    EpochProgressBar,
    MetricHistory,
    Progress,
    ProgressHook,
    Stopwatch,
)
from cjepa_kernels.train.checkpoints import AtomicCheckpointIO, EpochCheckpoint
from cjepa_kernels.train.config import (
    ExperimentConfig,
    config_from_dict,
    config_to_dict,
)
from cjepa_kernels.train.data import (
    Dataset,
    channel_statistics,
    load_dataset,
    pretrain_indices,
    resolve_pretrain_classes,
)
from cjepa_kernels.train.data_summary import DataSummary, summarize
from cjepa_kernels.train.evaluate import (
    FeatureExtractor,
    check_dataset,
    check_probe_images,
    evaluate,
)
from cjepa_kernels.train.module import (
    CJEPAModule,
    build_loss,
    feature_extractor,
)
from cjepa_kernels.train.run_directory import (
    LAST_CHECKPOINT,
    RunResult,
    check_run_directory,
    encode_result,
    load_result,
)
from cjepa_kernels.train.vit import VisionTransformer


def train(
    config: ExperimentConfig,
    run_dir: Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_summary: Callable[[DataSummary], None] | None = None,
    progress_bar: bool = True,
) -> RunResult:
    """Train and evaluate one encoder, or take up where a killed process stopped.

    The directory gets ``config.yaml``, ``checkpoints/last.ckpt`` (replaced at each epoch's end),
    ``metrics.csv``, ``log.txt``, ``tensorboard/`` and, at the end, ``result.json``. On the CPU, a
    run that was killed and started again ends with the numbers of an uninterrupted one.

    Args:
        config: The experiment.
        run_dir: Directory of this run alone. With a finished result of the same configuration
            nothing is trained.
        on_progress: Called with the progress, a few times a second at most.
        on_summary: Called once before training with what was understood of the data.
        progress_bar: Whether to draw a progress bar.

    Returns:
        Metrics of every epoch, the final evaluation, the advisor's findings. Of several ranks,
        only the first one evaluates.

    Raises:
        FileNotFoundError: If the data are missing.
        ValueError: If the configuration does not fit the data, or the directory holds a run of
            another configuration.
        DivergenceError: If the loss stops being finite.
    """
    run_dir = Path(run_dir)
    _check_loss(config)
    check_run_directory(config, run_dir)
    finished = run_dir / "result.json"
    if finished.is_file():
        return load_result(run_dir)
    show_bar = progress_bar and config.logging.progress_bar
    with _threads(config.trainer.threads):
        dataset = load_dataset(config.data, show_progress=show_bar)
        samples = check_against_data(config, dataset)
        summary = summarize(config, dataset)
        module = _build_module(config, dataset, samples)
        last = run_dir / LAST_CHECKPOINT
        steps_before = _completed_steps(last) if last.is_file() else 0
        atomic_write(
            run_dir / "config.yaml", yaml.safe_dump(config_to_dict(config), sort_keys=False)
        )
        stopwatch = Stopwatch()
        history = MetricHistory(run_dir / "metrics.csv", dataset, samples)
        advice = AdvisorHook(
            _advisor(config, module), history, run_dir / "log.txt", summary.lines()
        )
        callbacks: list[Callback] = [stopwatch, history, advice]
        if on_progress is not None:
            callbacks.append(ProgressHook(on_progress, history))
        if show_bar:
            callbacks.append(EpochProgressBar(history))
        callbacks.append(
            EpochCheckpoint(run_dir / "checkpoints", config.trainer.keep_every_n_epochs)
        )
        with _quiet_lightning():
            trainer = _trainer(config, run_dir, callbacks, show_bar, steps_before)
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
        if not trainer.is_global_zero:
            return RunResult(run_dir, history.rows, {}, advice.findings, stopwatch.seconds)
        evaluation = evaluate(
            feature_extractor(module.target_encoder, trainer.strategy.root_device),
            dataset,
            config.evaluation,
            pretrain_classes=resolve_pretrain_classes(config.data, dataset),
        )
    result = RunResult(run_dir, history.rows, evaluation, advice.findings, stopwatch.seconds)
    atomic_write(finished, encode_result(result))
    return result


def load_encoder(checkpoint: Path) -> tuple[FeatureExtractor, ExperimentConfig]:
    """Load the target encoder of a checkpoint for evaluation.

    Args:
        checkpoint: A ``.ckpt`` file, or the directory of a run, of which the last one is taken.

    Returns:
        The feature extractor, on the CPU, and the experiment that it comes from. Images of another
        shape than the experiment's are a ValueError.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint of this program.
    """
    file = Path(checkpoint)
    if file.is_dir():
        file = file / LAST_CHECKPOINT
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {str(file)!r}")
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        config = config_from_dict(stored["experiment"], origin=f"the experiment in {file}")
        channels, height, width = stored["image_shape"]
        prefix = "target_encoder."
        weights = {
            name.removeprefix(prefix): value
            for name, value in stored["state_dict"].items()
            if name.startswith(prefix)
        }
        encoder = VisionTransformer(
            config.model, (channels, height, width), torch.zeros(channels), torch.ones(channels)
        )
        encoder.load_state_dict(weights)
    except Exception as error:
        # A file of any other kind fails somewhere in unpickling, in a way that names nothing.
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
    def checked(images: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(images.shape[1:]) != tuple(image_shape):
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
        raise ValueError(str(error)) from error  # loss.backend is missing here
    if config.loss.get("contrastive_on_context", True) is False:
        raise ValueError(
            "loss.contrastive_on_context: expected true, because the target encoder's features "
            "carry no gradient and contrasting them trains nothing; got False"
        )


def _check_devices(config: ExperimentConfig) -> None:
    """Let Lightning look for the devices while no file is written yet."""
    wanted = config.trainer
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


def _completed_steps(checkpoint: Path) -> int:
    stored = AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True)
    try:
        return int(stored["global_step"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} is not a checkpoint of this program: remove it to start the run again"
        ) from error


def _build_module(config: ExperimentConfig, dataset: Dataset, samples: Tensor) -> CJEPAModule:
    mean, std = channel_statistics(dataset.train.images, samples)
    steps_per_epoch = len(samples) // config.trainer.batch_size
    return CJEPAModule(
        config, dataset.image_shape, mean, std, steps_per_epoch * config.trainer.epochs
    )


def _advisor(config: ExperimentConfig, module: CJEPAModule) -> Advisor:
    ranks = 1 if module.gathers else config.trainer.devices
    return Advisor(
        warmup_epochs=config.optimizer.warmup_fraction * config.trainer.epochs,
        contrastive_weight=module.loss.contrastive_weight,
        jepa_weight=module.loss.jepa_weight,
        batch_size=config.trainer.batch_size // ranks,  # what a rank contrasts
        temperature=float(module.loss.contrastive.temperature),
    )


def _trainer(
    config: ExperimentConfig,
    run_dir: Path,
    callbacks: list[Callback],
    progress_bar: bool,
    steps_before: int,
) -> L.Trainer:
    loggers: list[Logger] = []
    if config.logging.tensorboard:
        # What a killed process logged after its last checkpoint will be logged again.
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
        enable_progress_bar=progress_bar,
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
