"""The directory of a run: its result, and whether a new process can resume it."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cjepa_kernels.train import checksummed_json
from cjepa_kernels.train.config import (
    ExperimentConfig,
    config_to_dict,
    differing_keys,
)
from cjepa_kernels.train.loop.checkpoints import remedy
from cjepa_kernels.train.loop.run_files import LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, RESULT
from cjepa_kernels.yaml_reader import read_yaml

_LOG = logging.getLogger(__name__)
# Earlier versions wrote results with these keys and without a checksum.
_FIRST_FORMAT = {"history", "evaluation", "findings", "seconds"}

# Keys of the section `loss` that earlier versions lacked, with the values that they trained with.
_ADDED_LOSS_KEYS = {"smoothl1_beta": 1.0}


@dataclass(frozen=True)
class RunResult:
    """The measurements of a finished run."""

    run_dir: Path
    history: list[dict[str, float]]  # one row per epoch
    evaluation: dict[str, float]
    findings: list[dict[str, str | float]]
    seconds: float
    data: str | None = None  # fingerprint of the images and labels; None: not recorded
    finished: str = ""  # when, in UTC
    trained: bool = field(default=True, compare=False)  # False: it was finished before


def load_result(run_dir: Path) -> RunResult:
    """Read a finished run.

    Args:
        run_dir: Directory of the run.

    Returns:
        The result as :func:`train` returned it.

    Raises:
        FileNotFoundError: If the run is not finished.
        ValueError: If ``result.json`` is damaged.
    """
    file = Path(run_dir) / RESULT
    if not file.is_file():
        raise FileNotFoundError(f"no finished run in {str(run_dir)!r}: {file.name} is missing")
    try:
        stored, verified = checksummed_json.decode(file.read_text(encoding="utf-8"))
        if not verified and stored.keys() != _FIRST_FORMAT:
            raise ValueError("its checksum is missing")
        result = RunResult(
            run_dir=Path(run_dir),
            history=[_decode_numbers(row) for row in stored["history"]],
            evaluation=_decode_numbers(stored["evaluation"]),
            findings=stored["findings"],
            seconds=stored["seconds"],
            data=stored.get("data"),
            finished=stored.get("finished") or _format_time(file.stat().st_mtime),
            trained=False,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged, or is not a result of this program ({error}): remove it to "
            "evaluate the run again"
        ) from error
    if not verified:
        _LOG.warning(
            "note: %s was written by an earlier version, without a checksum; whether it is "
            "damaged is not known",
            file,
        )
    return result


def now() -> str:
    """The time as results record it."""
    return _format_time(datetime.now(timezone.utc).timestamp())


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def check_run_directory(config: ExperimentConfig, run_dir: Path) -> None:
    """Refuse a directory that holds a run of another configuration.

    Args:
        config: The experiment.
        run_dir: Directory of its run, which need not exist.

    Raises:
        ValueError: If the directory holds a run that cannot be resumed; the differing keys are
            named.
    """
    file = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir: expected a directory, {str(run_dir)!r} is a file")
    if not file.is_file():
        if any((run_dir / name).exists() for name in (RESULT, LAST_CHECKPOINT)):
            raise ValueError(
                f"run_dir: {str(run_dir)!r} holds a run without its config.yaml; choose another "
                "directory or remove it"
            )
        return
    try:
        stored = read_yaml(file)
        if not isinstance(stored, Mapping):
            raise ValueError(f"expected a mapping of sections, got {type(stored).__name__}")
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({error}): remove the directory {str(run_dir)!r} to start the run "
            "again, or choose another one"
        ) from error
    differences = _differences(stored, config)
    if differences:
        resume = shlex.join(["cjepa", "train", "--config", str(file), "--out", str(run_dir)])
        raise ValueError(
            "\n  ".join(
                [
                    f"run_dir: {str(run_dir)!r} holds a run of another configuration; choose "
                    f"another directory or remove it, or go on with that run by {resume}; the keys "
                    "that differ (there -> here):",
                    *differences,
                ]
            )
        )


def check_checkpoint(stored: Mapping[str, Any], config: ExperimentConfig, file: Path) -> None:
    """Refuse to go on from a checkpoint that is not this experiment's.

    Args:
        stored: What the checkpoint holds.
        config: The experiment.
        file: The checkpoint, for the message.

    Raises:
        ValueError: If it is another program's or another experiment's.
    """
    experiment = stored.get("experiment")
    if not isinstance(experiment, Mapping) or not isinstance(stored.get("global_step"), int):
        raise ValueError(
            f"{file} is not a checkpoint of this program: {remedy(file.parent.parent)}"
        )
    differences = _differences(experiment, config)
    if differences:
        raise ValueError(
            "\n  ".join(
                [
                    f"{file} belongs to another experiment: put this run's checkpoint in its "
                    "place, or choose another directory; the keys that differ (there -> here):",
                    *differences,
                ]
            )
        )


def _differences(stored: Mapping[str, Any], config: ExperimentConfig) -> list[str]:
    there, here = dict(stored), config_to_dict(config)
    for experiment in (there, here):
        if isinstance(experiment.get("loss"), Mapping):
            experiment["loss"] = {**_ADDED_LOSS_KEYS, **experiment["loss"]}
    return differing_keys(there, here)


def check_last_checkpoint(run_dir: Path) -> None:
    """Refuse a run whose last checkpoint is gone although the one before it exists.

    Args:
        run_dir: Directory of the run.

    Raises:
        ValueError: If it is gone; the message says how to go on with the run.
    """
    last = run_dir / LAST_CHECKPOINT
    if not last.exists() and (run_dir / PREVIOUS_CHECKPOINT).exists():
        raise ValueError(f"{last} is missing: {remedy(run_dir)}")


def encode_result(result: RunResult) -> str:
    """Write a result as JSON. NaN and infinity, which JSON lacks, become strings."""
    content = {
        "history": [_encode_numbers(row) for row in result.history],
        "evaluation": _encode_numbers(result.evaluation),
        "findings": result.findings,
        "seconds": result.seconds,
        "data": result.data,
        "finished": result.finished,
    }
    return checksummed_json.encode(content)


def _encode_numbers(row: dict[str, float]) -> dict[str, float | str]:
    return {key: value if math.isfinite(value) else str(value) for key, value in row.items()}


def _decode_numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items()}
