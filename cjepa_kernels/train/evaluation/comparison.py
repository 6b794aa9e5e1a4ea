"""The outcome of a comparison: runs, baselines, paired differences, JSON and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from cjepa_kernels.files import atomic_write
from cjepa_kernels.train import checksummed_json
from cjepa_kernels.train.data.summary import DataSummary
from cjepa_kernels.train.evaluation.probes import ProbeSizes
from cjepa_kernels.train.evaluation.uncertainty import CONFIDENCE, difference_margin, wilson

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
        data: What was understood of the data; None in records of before it was kept.
        probes: Sizes of the probes: ``"all"`` of all classes, and ``"transfer"`` of the classes
            left out of pretraining; empty in records of before they were kept.
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

        None, too, in records that do not hold the number of test images, which is needed for it.
        """
        sizes = self.probes.get("transfer" if metric in TRANSFER_METRICS else "all")
        cells = {arm: self.summary(arm, features, metric) for arm in self.arms}
        found = {arm: cell for arm, cell in cells.items() if cell is not None}
        if len(found) < 2 or sizes is None:
            return None
        first = max(found, key=lambda arm: found[arm].mean)
        for arm, cell in found.items():
            ahead = found[first].mean - cell.mean
            if arm != first and not ahead > difference_margin(
                found[first].values, cell.values, sizes.test_images
            ):
                return None
        return first

    def to_json(self) -> str:
        """Everything as JSON; numbers that are not finite become null."""
        content = {"format": FORMAT} | asdict(self)
        content["data"] = None if self.data is None else self.data.to_dict()
        return checksummed_json.encode(_finite(content))

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
        title: What the table shows, and of how many test images and seeds.
        columns: Headings; the first is that of the row titles.
        rows: Title and cells of each row.
        differences: The paired differences, the table's last rows; empty without two arms.
        best: For each column after the first, the row in bold, or None.
        notes: What a reader has to know of these numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    differences: list[tuple[str, ...]]
    best: tuple[int | None, ...]
    notes: list[str]

    def is_best(self, row: int, column: int) -> bool:
        """Whether a cell of ``rows`` is in bold."""
        return column > 0 and self.best[column - 1] == row

    def markdown(self) -> str:
        """The table without title and notes."""
        lines = [" | ".join(self.columns), "|".join(["---", *["---:"] * len(self.best)])]
        for number, row in enumerate(self.rows):
            cells = [
                f"**{cell}**" if self.is_best(number, column) else cell
                for column, cell in enumerate(row)
            ]
            lines.append(" | ".join(cells))
        lines += [" | ".join(row) for row in self.differences]
        return "\n".join(
            f"|{line}|" if position == 1 else f"| {line} |" for position, line in enumerate(lines)
        )


def text_tables(comparison: Comparison) -> list[TextTable]:
    """The tables of a comparison: by features, and again for transfer if it was measured."""
    tables = []
    groups: list[tuple[tuple[str, ...], str, str]] = [(MAIN_METRICS, "", "all")]
    if comparison.transfer:
        groups.append((TRANSFER_METRICS, ", transfer to the classes left out", "transfer"))
    for metrics, suffix, probes in groups:
        sizes = comparison.probes.get(probes)
        for features, title in FEATURE_TITLES.items():
            rows = []
            for row in comparison.rows():
                cells = [comparison.summary(row, features, metric) for metric in metrics]
                texts = ["-" if cell is None else cell.format() for cell in cells]
                rows.append((ARM_TITLES[row], *texts))
            differences = []
            for pair, by_metric in comparison.paired.items():
                found = [by_metric.get(f"{features}/{metric}") for metric in metrics]
                texts = ["-" if cell is None else cell.format(signed=True) for cell in found]
                differences.append((pair_title(pair), *texts))
            names = list(comparison.rows())
            best = [comparison.best(features, metric) for metric in metrics]
            shown = comparison.summary(comparison.arms[0], features, metrics[0])
            tables.append(
                TextTable(
                    title=title[0].upper() + title[1:] + suffix + _of(sizes, comparison),
                    columns=("accuracy, %", *(METRIC_TITLES[metric] for metric in metrics)),
                    rows=rows,
                    differences=differences,
                    best=tuple(None if arm is None else names.index(arm) for arm in best),
                    notes=_notes(comparison, sizes, title, shown),
                )
            )
    return tables


def pair_title(pair: str) -> str:
    """``"cjepa - jepa"`` for a reader."""
    return " − ".join(ARM_TITLES[arm] for arm in pair.split(" - "))


def _seeds(comparison: Comparison) -> str:
    count = len(comparison.seeds)
    return f"{count} seed{'s' * (count > 1)}"


def _of(sizes: ProbeSizes | None, comparison: Comparison) -> str:
    images = "" if sizes is None else f"{sizes.test_images:,} test images, "
    return f" ({images}{_seeds(comparison)})"


def labels_per_class(sizes: ProbeSizes) -> str:
    """How many labels the few-label probe has, as in ``8 to 10 labels per class``."""
    fewest, most = sizes.fewest_labels, sizes.most_labels
    return f"{most if fewest == most else f'{fewest} to {most}'} labels per class"


def _notes(
    comparison: Comparison, sizes: ProbeSizes | None, features: str, example: Summary | None
) -> list[str]:
    """Sizes of the sets, what ± is and is not, and what bold means."""
    level = f"{100 * CONFIDENCE:.0f} %"
    seeds = _seeds(comparison)
    if len(comparison.seeds) > 1:
        notes = [f"± is the sample standard deviation over {seeds}."]
    else:
        notes = ["A single seed has no deviation over seeds."]
    if sizes is None:
        return [
            *notes,
            "This record does not hold the numbers of training and test images. Without them the "
            "sampling error of the test set is unknown, so no cell is in bold.",
        ]
    notes.append(
        f"The probes are fitted on {sizes.train_images:,} training images (few-label: "
        f"{labels_per_class(sizes)}) and tested on {sizes.test_images:,} test images. One test "
        f"image is {100 / sizes.test_images:.2g} percentage points."
    )
    notes.append(
        f"The trained arm in bold is ahead of every other one by more than the {level} margin of "
        "the seeds and of the test images together. In a column without bold, no arm is ahead "
        "beyond the noise."
    )
    if example is not None:
        low, high = wilson(example.mean, sizes.test_images)
        notes.append(
            "The sampling error of the test set comes on top: with "
            f"{sizes.test_images:,} test images, an accuracy of {example.mean:.1f} % (few-label, "
            f"{features}) has a {level} interval of {low:.1f} to {high:.1f} % (Wilson)."
        )
    return notes


def rich_tables(comparison: Comparison) -> list[Table]:
    """The tables of a comparison for a Rich console; the notes stand below the last one."""
    tables = []
    texts = text_tables(comparison)
    for text in texts:
        table = Table(title=text.title, title_justify="left", title_style="bold")
        for i, column in enumerate(text.columns):
            table.add_column(column, justify="right" if i else "left")
        for number, row in enumerate(text.rows):
            cells = [
                Text(cell, style="bold" if text.is_best(number, column) else "")
                for column, cell in enumerate(row)
            ]
            table.add_row(*cells, end_section=number == len(text.rows) - 1)
        for row in text.differences:
            table.add_row(*row, style="green")
        tables.append(table)
    return tables


def notes_of(tables: Sequence[TextTable]) -> list[str]:
    """The notes of some tables, each once."""
    return list(dict.fromkeys(note for table in tables for note in table.notes))


def comparison_markdown(comparison: Comparison) -> str:
    """The tables and the environment as Markdown, for the documentation."""
    seeds = ", ".join(str(seed) for seed in comparison.seeds)
    lines = [f"Dataset {comparison.dataset}; seeds {seeds}."]
    if comparison.data is not None:
        lines += ["", *(f"- {line}" for line in comparison.data.lines())]
    tables = text_tables(comparison)
    for table in tables:
        lines += ["", f"**{table.title}**", "", table.markdown()]
    lines += ["", *(f"- {note}" for note in notes_of(tables))]
    environment = comparison.environment
    lines += ["", *(f"- {key}: {_plain(value)}" for key, value in environment.items())]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
