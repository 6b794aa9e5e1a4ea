"""The tables of a comparison and the notes below them, for a console, Markdown or HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from cjepa_kernels.tables import markdown_table
from cjepa_kernels.train.evaluation.comparison import (
    ARM_TITLES,
    FEATURE_TITLES,
    MAIN_METRICS,
    METRIC_TITLES,
    TRANSFER_METRICS,
    Comparison,
    Summary,
)
from cjepa_kernels.train.evaluation.probes import ProbeSizes
from cjepa_kernels.train.evaluation.uncertainty import CONFIDENCE, wilson

# What a table says of a contrastive term other than NT-Xent.
_CONTRASTIVE_NOTES = {
    "sup_con": [
        "C-JEPA and the contrastive arm were trained with the labels of the training images "
        "(SupCon). JEPA alone and the baselines were not."
    ],
    "dcl": ["The contrastive term is DCL."],
    "info_nce": ["The contrastive term is InfoNCE in both directions between the views."],
}


@dataclass(frozen=True)
class TextTable:
    """A table of strings, ready for a console, Markdown or HTML.

    Attributes:
        title: The features that the table is about, with the numbers of test images and seeds.
        columns: Headings; the first one stands above the titles of the rows.
        rows: Title and cells of each row.
        differences: The paired differences, the table's last rows; empty without two arms.
        best: For each column after the first, the row in bold, or None.
        notes: Facts that a reader needs to judge these numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    differences: list[tuple[str, ...]]
    best: tuple[int | None, ...]
    notes: list[str]

    def bold_columns(self, row: int) -> tuple[int, ...]:
        """The columns in which a row of ``rows`` is in bold."""
        return tuple(column for column, best in enumerate(self.best, start=1) if best == row)

    def markdown(self) -> str:
        """The table without title and notes."""
        rows = []
        for number, row in enumerate(self.rows):
            bold = self.bold_columns(number)
            rows.append([f"**{cell}**" if i in bold else cell for i, cell in enumerate(row)])
        return "\n".join(markdown_table(self.columns, [*rows, *self.differences], left=1))


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
                cells = [by_metric.get(f"{features}/{metric}") for metric in metrics]
                texts = ["-" if cell is None else cell.format(signed=True) for cell in cells]
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
    """Notes on the sizes of the sets, the meaning of ± and the meaning of bold."""
    level = f"{100 * CONFIDENCE:.0f} %"
    seeds = _seeds(comparison)
    if len(comparison.seeds) > 1:
        notes = [f"± is the sample standard deviation over {seeds}."]
    else:
        notes = ["A single seed has no deviation over seeds."]
    kind = comparison.config.get("loss", {}).get("contrastive_type", "nt_xent")
    notes += _CONTRASTIVE_NOTES.get(kind, [])
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
            bold = text.bold_columns(number)
            cells = [Text(cell, style="bold" if i in bold else "") for i, cell in enumerate(row)]
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
    lines += ["", *(f"- {key}: {plain(value)}" for key, value in environment.items())]
    return "\n".join(lines) + "\n"


def plain(value: Any) -> str:
    """A value of the recorded environment, as a reader sees it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "unknown" if value is None else str(value)
