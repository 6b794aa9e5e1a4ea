"""Tables for a terminal and for Markdown, and how their figures are written."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header, columns aligned to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int | None = None
) -> list[str]:
    """Lines of a Markdown table.

    Args:
        header: Of the columns.
        rows: Cells; a ``|`` within one is escaped.
        left: Number of columns on the left that hold text, the others being aligned to the right.
            Default: all.
    """
    texts = len(header) if left is None else left
    align = ["---"] * texts + ["---:"] * (len(header) - texts)
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in (header, align, *rows))
    return [f"| {' | '.join(row)} |" for row in escaped]


def milliseconds(seconds: float) -> str:
    """Three digits of milliseconds."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def mebibytes(size: float) -> str:
    """MiB, with a digit behind the point below 10."""
    value = max(size / 2**20, 0.0)  # Of tiny sizes a page less may be resident.
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def times(value: float) -> str:
    """A ratio with two digits behind the point, none above 100."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.2f}"


def two_digits(value: float) -> str:
    """Two digits, all of the whole ones."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
