"""What a run leaves in its directory: the result, and whether it can be taken up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cjepa_kernels.train.config import (
    ExperimentConfig,
    config_to_dict,
    differing_keys,
)
from cjepa_kernels.yaml_reader import read_yaml

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"


@dataclass(frozen=True)
class RunResult:
    """What a finished run measured."""

    run_dir: Path
    history: list[dict[str, float]]  # one row per epoch
    evaluation: dict[str, float]
    findings: list[dict[str, str | float]]
    seconds: float


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
    file = Path(run_dir) / "result.json"
    if not file.is_file():
        raise FileNotFoundError(f"no finished run in {str(run_dir)!r}: {file.name} is missing")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return RunResult(
            run_dir=Path(run_dir),
            history=[_decode_numbers(row) for row in stored["history"]],
            evaluation=_decode_numbers(stored["evaluation"]),
            findings=stored["findings"],
            seconds=stored["seconds"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a result of this program ({error!r}): remove it to evaluate the run "
            "again"
        ) from error


def check_run_directory(config: ExperimentConfig, run_dir: Path) -> None:
    """Refuse a directory that holds a run of another configuration.

    Args:
        config: The experiment.
        run_dir: Directory of its run, which need not exist.

    Raises:
        ValueError: If a run is there that cannot be taken up; the differing keys are named.
    """
    file = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir: expected a directory, {str(run_dir)!r} is a file")
    if not file.is_file():
        if any((run_dir / name).exists() for name in ("result.json", LAST_CHECKPOINT)):
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
    differences = differing_keys(stored, config_to_dict(config))
    if differences:
        raise ValueError(
            "\n  ".join(
                [
                    f"run_dir: {str(run_dir)!r} holds a run of another configuration; choose "
                    "another directory or remove it; the keys that differ (there -> here):",
                    *differences,
                ]
            )
        )


def encode_result(result: RunResult) -> str:
    """JSON has no NaN and no infinity: they become strings."""
    content = {
        "history": [_encode_numbers(row) for row in result.history],
        "evaluation": _encode_numbers(result.evaluation),
        "findings": result.findings,
        "seconds": result.seconds,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _encode_numbers(row: dict[str, float]) -> dict[str, float | str]:
    return {key: value if math.isfinite(value) else str(value) for key, value in row.items()}


def _decode_numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items()}
