"""Suggestions for misspelt names: only where a typing error is the likely cause."""

from __future__ import annotations

from collections.abc import Iterable

MOST_EDITS = 2
MOST_NAMES = 24  # that an error lists


def nearest(name: object, known: Iterable[str]) -> str:
    """What an error says after an unknown name.

    Args:
        name: The unknown name.
        known: The names that exist.

    Returns:
        ``", did you mean 'x'?"`` if some name is at most two typing errors away, else the list of
        the known names, shortened if it is long.

    Example:
        >>> nearest("contrastive_wieght", ["contrastive_weight", "eps"])
        ", did you mean 'contrastive_weight'?"
        >>> nearest("vicreg_weight", ["jepa_weight", "eps"])
        '; known: eps, jepa_weight'
    """
    names = sorted(known)
    if (meant := closest(name, names)) is not None:
        return f", did you mean {meant!r}?"
    return f"; known: {listed(names)}" if names else ""


def closest(name: object, known: Iterable[str]) -> str | None:
    """The name that was meant, if one is at most two typing errors away; case does not count.

    Args:
        name: The unknown name.
        known: The names that exist.
    """
    word = str(name)
    found = min(((edits(word.lower(), other.lower()), other) for other in known), default=None)
    # In a short word, two edits replace most of it: that is another word, not a typing error.
    if found and found[0] <= MOST_EDITS and 2 * found[0] < max(len(word), len(found[1])):
        return found[1]
    return None


def listed(names: Iterable[object], most: int = MOST_NAMES) -> str:
    """Write names with commas between them, shortened if there are many.

    Args:
        names: The names, in their order.
        most: How many of them are written.

    Returns:
        The names and the number of those left out; ``"nothing"`` if there is no name.
    """
    everything = [str(name) for name in names]
    more = len(everything) - most
    return (", ".join(everything[:most]) or "nothing") + (f" and {more} more" if more > 0 else "")


def edits(a: str, b: str) -> int:
    """Damerau-Levenshtein distance: insertions, deletions, replacements, swaps of neighbours.

    It is the variant in which no part is edited twice (optimal string alignment). Distances above
    ``MOST_EDITS`` are reported as ``MOST_EDITS + 1`` where the lengths alone show that.

    Args:
        a: First word.
        b: Second word.

    Returns:
        The number of edits.

    Example:
        >>> edits("wieght", "weight"), edits("epoch", "epochs"), edits("vicreg", "jepa")
        (1, 1, 6)
    """
    if abs(len(a) - len(b)) > MOST_EDITS:
        return MOST_EDITS + 1
    before_last: list[int] = []
    last = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before_last[j - 2] + 1)
            row.append(cost)
        before_last, last = last, row
    return last[-1]
