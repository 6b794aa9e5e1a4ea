"""The outcome of a comparison: its runs, baselines and paired differences, and their JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cjepa_kernels.files import atomic_write
from cjepa_kernels.json_values import finite
from cjepa_kernels.train import checksummed_json
from cjepa_kernels.train.data.summary import DataSummary
from cjepa_kernels.train.evaluation.probes import ProbeSizes
from cjepa_kernels.train.evaluation.uncertainty import difference_margin

FORMAT = 1  # version of the JSON layout

ARM_TITLES = {
    "pixels": "Raw pixels",
    "untrained": "Untrained encoder",
    "jepa": "JEPA alone",
    "contrastive": "Contrastive alone",
    "cjepa": "C-JEPA",
}
FEATURE_TITLES = {"mean": "mean-pooled patch features", "cls": "CLS token"}
SHORT_FEATURE_TITLES = {"mean": "mean-pooled", "cls": "CLS"}
MAIN_METRICS = ("few_label", "knn", "linear", "linear_robust")
TRANSFER_METRICS = ("transfer_few_label", "transfer_knn", "transfer_linear")
METRIC_TITLES = {
    "few_label": "few-label",
    "knn": "k-NN",
    "linear": "linear",
    "linear_robust": "robust",
    "transfer_few_label": "few-label",
    "transfer_knn": "k-NN",
    "transfer_linear": "linear",
}
# The numbers that a reader should look at first.
HEADLINE_TITLES = {
    f"{features}/{metric}": f"{METRIC_TITLES[metric]}, {title}"
    for features, title in SHORT_FEATURE_TITLES.items()
    for metric in ("few_label", "knn")
}
PAIRS = (("cjepa", "jepa"), ("cjepa", "contrastive"))


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation over seeds (NaN for a single seed)."""

    mean: float
    std: float
    values: tuple[float, ...]

    @staticmethod
    def of(values: Iterable[float]) -> Summary:
        """Summarise at least one value."""
        numbers = tuple(float(value) for value in values)
        if not numbers:
            raise ValueError("values must hold at least one number, got none")
        std = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
        return Summary(statistics.fmean(numbers), std, numbers)

    def format(self, *, signed: bool = False) -> str:
        """``"80.6 ± 1.1"``, without the deviation for a single seed."""
        mean = f"{self.mean:+.1f}" if signed else f"{self.mean:.1f}"
        return mean if math.isnan(self.std) else f"{mean} ± {self.std:.1f}"


@dataclass(frozen=True)
class ArmRun:
    """One training run of a comparison.

    Attributes:
        arm: Name of the arm.
        seed: The run's seed.
        directory: The run's directory, relative to the comparison's.
        history: One row of metrics per epoch.
        evaluation: The final evaluation.
        findings: The advisor's findings.
        seconds: Duration of the training, from the run's own clock.
    """

    arm: str
    seed: int
    directory: str
    history: list[dict[str, float]]
    evaluation: dict[str, float]
    findings: list[dict[str, str | float]]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Arms x seeds on the same views, masks and budget.

    Attributes:
        dataset: Name of the dataset.
        arms: Names of the arms, in the order of the tables.
        seeds: The seeds, common to all arms.
        transfer: Whether half of the classes were left out of pretraining.
        config: The experiment, as plain values.
        runs: Every run, by arm and then by seed.
        baselines: ``pixels``: one evaluation; ``untrained``: one evaluation per seed.
        paired: ``{"cjepa - jepa": {"mean/knn": Summary}}``: differences seed by seed.
        environment: Versions, device, threads, command, commit, date.
        data: The summary of the data; None in earlier records, which lack it.
        probes: Sizes of the probes: ``"all"`` of all classes, and ``"transfer"`` of the classes
            left out of pretraining; empty in earlier records, which lack them.
    """

    dataset: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    transfer: bool
    config: dict[str, Any]
    runs: list[ArmRun]
    baselines: dict[str, list[dict[str, float]]]
    paired: dict[str, dict[str, Summary]]
    environment: dict[str, Any]
    data: DataSummary | None = None
    probes: dict[str, ProbeSizes] = field(default_factory=dict)

    def arm_runs(self, arm: str) -> list[ArmRun]:
        """The runs of one arm, in the order of the seeds."""
        return [run for run in self.runs if run.arm == arm]

    def rows(self) -> dict[str, list[dict[str, float]]]:
        """Evaluations by row of the tables: baselines first, C-JEPA last."""
        rows = {name: self.baselines[name] for name in ("pixels", "untrained")}
        for arm in sorted(self.arms, key=list(ARM_TITLES).index):
            rows[arm] = [run.evaluation for run in self.arm_runs(arm)]
        return rows

    def summary(self, row: str, features: str, metric: str) -> Summary | None:
        """A cell of the tables, or None if it was not measured."""
        key = f"{'pixels' if row == 'pixels' else features}/{metric}"
        values = [evaluation[key] for evaluation in self.rows()[row] if key in evaluation]
        return Summary.of(values) if values else None

    def best(self, features: str, metric: str) -> str | None:
        """The trained arm that is ahead of every other one by more than the noise, or None.

        It is None, too, in records without the number of test images, which the noise depends on.
        """
        sizes = self.probes.get("transfer" if metric in TRANSFER_METRICS else "all")
        cells = {arm: self.summary(arm, features, metric) for arm in self.arms}
        measured = {arm: cell for arm, cell in cells.items() if cell is not None}
        if len(measured) < 2 or sizes is None:
            return None
        first = max(measured, key=lambda arm: measured[arm].mean)
        for arm, cell in measured.items():
            ahead = measured[first].mean - cell.mean
            if arm != first and not ahead > difference_margin(
                measured[first].values, cell.values, sizes.test_images
            ):
                return None
        return first

    def to_json(self) -> str:
        """Everything as JSON; numbers that are not finite become null."""
        content = {"format": FORMAT} | asdict(self)
        content["data"] = None if self.data is None else self.data.to_dict()
        return checksummed_json.encode(finite(content))

    @staticmethod
    def from_json(text: str) -> Comparison:
        """Read what :meth:`to_json` wrote.

        Args:
            text: The JSON document.

        Raises:
            ValueError: If it is no JSON, or no comparison of this format.
        """
        values, verified = checksummed_json.decode(text)
        if values.get("format") != FORMAT:
            got = values.get("format")
            raise ValueError(f"a comparison of format {FORMAT} was expected, got {got!r}")
        unknown = values.keys() - {"format", *Comparison.__dataclass_fields__}
        if unknown and not verified:
            raise ValueError(f"its checksum is missing, but it has {sorted(unknown)[0]!r}")
        try:
            return Comparison(
                dataset=values["dataset"],
                arms=tuple(values["arms"]),
                seeds=tuple(values["seeds"]),
                transfer=values["transfer"],
                config=values["config"],
                runs=[
                    ArmRun(
                        **{
                            **run,
                            "history": [_numbers(row) for row in run["history"]],
                            "evaluation": _numbers(run["evaluation"]),
                        }
                    )
                    for run in values["runs"]
                ],
                baselines={
                    name: [_numbers(row) for row in rows]
                    for name, rows in values["baselines"].items()
                },
                paired={
                    pair: {
                        key: Summary(
                            _number(value["mean"]),
                            _number(value["std"]),
                            tuple(_number(v) for v in value["values"]),
                        )
                        for key, value in differences.items()
                    }
                    for pair, differences in values["paired"].items()
                },
                environment=values["environment"],
                data=DataSummary.from_dict(values["data"]) if values.get("data") else None,
                probes={
                    name: ProbeSizes(**sizes) for name, sizes in values.get("probes", {}).items()
                },
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the comparison is incomplete: {error}") from error


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    return {key: _number(value) for key, value in row.items()}


def paired_differences(
    first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]
) -> dict[str, Summary]:
    """Differences first - second, seed by seed, of every metric that both hold.

    Args:
        first: One evaluation per seed.
        second: The same, in the same order of seeds.

    Returns:
        Mean, sample standard deviation and the differences themselves, by metric.

    Raises:
        ValueError: If the number of seeds differs or is 0.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            "paired differences need the same seeds in both arms, at least one, "
            f"got {len(first)} and {len(second)}"
        )
    shared = set.intersection(*(set(row) for row in (*first, *second)))
    return {
        key: Summary.of(a[key] - b[key] for a, b in zip(first, second, strict=True))
        for key in first[0]
        if key in shared
    }


def save_comparison(comparison: Comparison, path: Path) -> None:
    """Write a comparison as JSON; the file is replaced as a whole or not at all."""
    atomic_write(path, comparison.to_json())


def load_comparison(path: Path) -> Comparison:
    """Read a comparison.

    Args:
        path: File that :func:`save_comparison` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no comparison of this format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no comparison at {path}")
    try:
        return Comparison.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
