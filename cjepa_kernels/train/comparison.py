"""The outcome of a comparison: runs, baselines, paired differences, JSON and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cjepa_kernels.train import checksummed_json
from cjepa_kernels.train.atomic import atomic_write

FORMAT = 1  # version of the JSON layout

ARM_TITLES = {
    "pixels": "Raw pixels",
    "untrained": "Untrained encoder",
    "jepa": "JEPA alone",
    "contrastive": "Contrastive alone",
    "cjepa": "C-JEPA",
}
FEATURE_TITLES = {"mean": "mean-pooled patch features", "cls": "CLS token"}
METRIC_TITLES = {
    "few_label": "few-label",
    "knn": "k-NN",
    "linear": "linear",
    "linear_robust": "robust",
    "transfer_few_label": "few-label",
    "transfer_knn": "k-NN",
    "transfer_linear": "linear",
}
MAIN_METRICS = ("few_label", "knn", "linear", "linear_robust")
TRANSFER_METRICS = ("transfer_few_label", "transfer_knn", "transfer_linear")
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
        kept = tuple(float(value) for value in values)
        if not kept:
            raise ValueError("values must hold at least one number, got none")
        std = statistics.stdev(kept) if len(kept) > 1 else math.nan
        return Summary(statistics.fmean(kept), std, kept)

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

    def to_json(self) -> str:
        """Everything as JSON; numbers that are not finite become null."""
        return checksummed_json.encode(_finite({"format": FORMAT} | asdict(self)))

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
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the comparison is incomplete: {error}") from error


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    return {key: _number(value) for key, value in row.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


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


@dataclass(frozen=True)
class TextTable:
    """A table of strings, ready for a console, Markdown or HTML.

    Attributes:
        title: What the table shows.
        columns: Headings; the first is that of the row titles.
        rows: Title and cells of each row.
        difference: The paired differences, the table's last row; empty without both arms.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    difference: tuple[str, ...]


def text_tables(comparison: Comparison) -> list[TextTable]:
    """The tables of a comparison: by features, and again for transfer if it was measured."""
    tables = []
    groups: list[tuple[tuple[str, ...], str]] = [(MAIN_METRICS, "")]
    if comparison.transfer:
        groups.append((TRANSFER_METRICS, ", transfer to the classes left out"))
    for metrics, suffix in groups:
        for features, title in FEATURE_TITLES.items():
            rows = []
            for row in comparison.rows():
                cells = [comparison.summary(row, features, metric) for metric in metrics]
                texts = ["-" if cell is None else cell.format() for cell in cells]
                rows.append((ARM_TITLES[row], *texts))
            pair = comparison.paired.get("cjepa - jepa", {})
            found = [pair.get(f"{features}/{metric}") for metric in metrics]
            difference: tuple[str, ...] = ()
            if pair:
                texts = ["-" if cell is None else cell.format(signed=True) for cell in found]
                difference = ("C-JEPA − JEPA alone", *texts)
            columns = ("accuracy, %", *(METRIC_TITLES[metric] for metric in metrics))
            tables.append(
                TextTable(title[0].upper() + title[1:] + suffix, columns, rows, difference)
            )
    return tables


def rich_tables(comparison: Comparison) -> list[Table]:
    """The tables of a comparison for a Rich console."""
    tables = []
    for text in text_tables(comparison):
        table = Table(title=text.title, title_justify="left", title_style="bold")
        for i, column in enumerate(text.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in text.rows:
            last = row is text.rows[-1]
            bold = row[0] == ARM_TITLES["cjepa"]
            table.add_row(*row, end_section=last, style="bold" if bold else None)
        if text.difference:
            table.add_row(*text.difference, style="bold green")
        tables.append(table)
    return tables


def comparison_markdown(comparison: Comparison) -> str:
    """The tables and the environment as Markdown, for the documentation."""
    seeds = ", ".join(str(seed) for seed in comparison.seeds)
    lines = [f"Dataset {comparison.dataset}; seeds {seeds}; mean ± standard deviation over seeds."]
    for table in text_tables(comparison):
        lines += ["", f"**{table.title}**", ""]
        lines.append("| " + " | ".join(table.columns) + " |")
        lines.append("|---|" + "---:|" * (len(table.columns) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
        if table.difference:
            lines.append("| " + " | ".join(f"**{cell}**" for cell in table.difference) + " |")
    environment = comparison.environment
    lines += ["", *(f"- {key}: {_plain(value)}" for key, value in environment.items())]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
