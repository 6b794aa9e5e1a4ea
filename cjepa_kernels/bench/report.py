"""A comparison as tables, plain sentences and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cjepa_kernels.bench.candidates import (
    BOTH,
    CANDIDATES,
    EAGER,
    FORWARD,
    OURS,
    TITLES,
    is_peer,
)
from cjepa_kernels.bench.comparison import Results
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.bench.verdict import CONFIDENCE, MARGIN, MIN_ROUNDS, Ratio, Verdict
from cjepa_kernels.tables import markdown_table, mebibytes, milliseconds, times, two_digits

LEVEL = f"{100 * CONFIDENCE:.0f} %"
HEADER = (
    "M x D",
    "loss",
    "forward ms",
    "forward + backward ms",
    "p20 to p80",
    "rounds",
    "time / ours",
    f"{LEVEL} interval",
    "memory MiB",
    "loss error",
    "gradient error",
)
WRONG = 0.1  # An error above this share of the largest magnitude makes a gradient useless.


def sizes_of(results: Results) -> list[Size]:
    """The sizes that were measured."""
    return list(dict.fromkeys(Size(row["M"], row["D"]) for row in results["rows"]))


def by_name(results: Results, section: str, size: Size, **same: Any) -> dict[str, Record]:
    """The records of a section at a size, by the candidate's name."""
    return {
        row["name"]: row
        for row in results[section]
        if (row["M"], row["D"]) == size and all(row[key] == value for key, value in same.items())
    }


def table(results: Results) -> list[list[str]]:
    """Rows under ``HEADER``: every candidate at every size."""
    return [cells for size in sizes_of(results) for cells in of_size(results, size)]


def of_size(results: Results, size: Size) -> Iterator[list[str]]:
    """The rows of one size."""
    forward = by_name(results, "rows", size, **{"pass": FORWARD})
    both = by_name(results, "rows", size, **{"pass": BOTH})
    memory = by_name(results, "memory", size)
    errors = by_name(results, "errors", size)
    for name, row in both.items():
        over_ours = times(over(both, name)) if OURS in both else ""
        paired = ratio_in(row)
        yield [
            f"{size.rows} x {size.features}",
            title(name),
            milliseconds(forward[name]["median"]) if name in forward else "",
            milliseconds(row["median"]),
            f"{milliseconds(row['p20'])} to {milliseconds(row['p80'])}",
            f"{row['rounds']:.0f}",
            over_ours,
            interval(paired) if paired is not None else "",
            mebibytes(memory[name]["extra_bytes"]) if name in memory else "",
            *(f"{errors[name][key]:.1e}" if name in errors else "" for key in ("loss", "gradient")),
        ]


def ratio_in(row: Record) -> Ratio | None:
    """The paired ratio of a row, or None in our own row and in records made without ratios."""
    record = row.get("over_ours")
    return None if record is None else Ratio(**record)


def over(both: dict[str, Record], name: str) -> float:
    """A candidate's time divided by ours: the paired ratio, or that of the medians without one."""
    paired = ratio_in(both[name])
    if paired is not None:
        return paired.value
    return float(both[name]["median"] / both[OURS]["median"])


def interval(paired: Ratio) -> str:
    """``5.21 to 6.02``, or nothing if there were too few rounds for an interval."""
    if paired.low is None or paired.high is None:
        return ""
    return f"{times(paired.low)} to {times(paired.high)}"


def left_out(results: Results, size: Size) -> str:
    """The candidates that were not measured at a size, and why."""
    records = by_name(results, "left_out", size).items()
    return "; ".join(f"{TITLES[name]} {row['reason']}" for name, row in records)


def title(name: str) -> str:
    """The title of a candidate, marked if it is another loss."""
    other = name in CANDIDATES and not CANDIDATES[name].same_loss
    return TITLES[name] + (" *" if other else "")


def in_sentence(name: str) -> str:
    """The title of a candidate within a sentence."""
    article = "the " if TITLES[name].startswith("plain") else ""
    return article + TITLES[name]


def verdict(results: Results) -> list[str]:
    """The results in plain sentences, whichever candidate they favour."""
    sizes = [s for s in sizes_of(results) if OURS in by_name(results, "rows", s, **{"pass": BOTH})]
    sentences = []
    if not results["complete"]:
        sentences.append(_stopped(results))
    if reason := results["environment"].get("missing_backend"):
        backend = results["environment"]["backend"]
        sentences.append(f"cjepa_kernels ran its {backend} back end, not its kernels: {reason}.")
    with_eager = [s for s in sizes if EAGER in by_name(results, "rows", s, **{"pass": BOTH})]
    if with_eager:
        sentences.append(_beside(results, max(with_eager), EAGER))
    sentences += _beyond(results, sizes)
    sentences += _verdicts(results, sizes)
    sentences += _errors(results)
    sentences += _temperatures(results)
    sentences += _narrow_dtypes(results)
    return sentences


def _stopped(results: Results) -> str:
    """What is missing from a run that was cut off."""
    measured = {str(size) for size in sizes_of(results)}
    left = [size for size in results["settings"]["sizes"] if size not in measured]
    if not results["temperatures"]:
        left.append("the errors against the temperature")
    return f"This run was cut off: {', '.join(left)} not measured."


def _beside(results: Results, size: Size, other: str) -> str:
    both = by_name(results, "rows", size, **{"pass": BOTH})
    memory = by_name(results, "memory", size)
    names = (OURS, other)
    costs = {name: f"{milliseconds(both[name]['median'])} ms" for name in names}
    compared = f"{two_digits(over(both, other))} x the time"
    paired = ratio_in(both[other])
    if paired is not None and interval(paired):
        compared += f" ({LEVEL} interval {interval(paired)})"
    if all(name in memory for name in names):
        for name in names:
            costs[name] += f" and {mebibytes(memory[name]['extra_bytes'])} MiB"
        more = memory[other]["extra_bytes"] / max(memory[OURS]["extra_bytes"], 1)
        compared += f", {two_digits(more)} x the memory"
    return (
        f"At M = {size.rows}, D = {size.features} on this machine forward + backward costs "
        f"{costs[OURS]} with cjepa_kernels; {in_sentence(other)} {costs[other]}: {compared}."
    )


def _beyond(results: Results, sizes: list[Size]) -> Iterator[str]:
    """Our time at the largest size for which the plain formula lacks memory."""
    reasons = {
        Size(row["M"], row["D"]): row["reason"]
        for row in results["left_out"]
        if row["name"] == EAGER
    }
    beyond = [size for size in sizes if size in reasons]
    if beyond:
        size = max(beyond)
        seconds = by_name(results, "rows", size, **{"pass": BOTH})[OURS]["median"]
        memory = by_name(results, "memory", size).get(OURS)
        with_memory = f" and {mebibytes(memory['extra_bytes'])} MiB" if memory else ""
        yield (
            f"At M = {size.rows} cjepa_kernels takes {milliseconds(seconds)} ms{with_memory}; "
            f"{in_sentence(EAGER)} {reasons[size]}."
        )


Place = tuple[Size, Record]


def _verdicts(results: Results, sizes: list[Size]) -> Iterator[str]:
    """Which candidates of the same loss are slower, faster, or too noisy to tell, and where."""
    places_of: dict[Verdict | None, dict[str, list[Place]]] = {}
    for size in sizes:
        for name, row in by_name(results, "rows", size, **{"pass": BOTH}).items():
            if is_peer(name):
                paired = ratio_in(row)
                verdict = None if paired is None else paired.verdict()
                places_of.setdefault(verdict, {}).setdefault(name, []).append((size, row))
    if None in places_of:
        yield from _unpaired(results, places_of.pop(None))
    for name, places in places_of.get("slower", {}).items():
        where = ", ".join(map(_times_as_long, places))
        yield f"cjepa_kernels is slower than {in_sentence(name)} at {where}."
    for name, places in places_of.get("equal", {}).items():
        where = ", ".join(f"M = {size.rows}" for size, _ in places)
        within = f"within {100 * (MARGIN - 1):.0f} %"
        yield f"cjepa_kernels is as fast as {in_sentence(name)}, {within}, at {where}."
    for name, places in places_of.get("unclear", {}).items():
        where = ", ".join(map(_unclear, places))
        yield (
            f"Too noisy to tell whether cjepa_kernels is faster or slower than {in_sentence(name)} "
            f"at {where}."
        )
    if faster := sum(map(len, places_of.get("faster", {}).values())):
        others = sum(len(places) for of in places_of.values() for places in of.values()) - faster
        which = "the other" if others else "all" if faster > 1 else "the only"
        count = f" {faster} comparisons" if faster > 1 else " comparison"
        yield (
            f"In {which}{count} with another candidate of the same loss cjepa_kernels is faster."
        )


def _times_as_long(place: Place) -> str:
    """Where we are slower, and how much: the ratio the other way round, and its interval."""
    size, row = place
    paired = Ratio(**row["over_ours"]).inverse()
    return (
        f"M = {size.rows} ({times(paired.value)} x its time, {LEVEL} interval {interval(paired)})"
    )


def _unclear(place: Place) -> str:
    size, row = place
    paired = Ratio(**row["over_ours"]).inverse()
    if not interval(paired):
        return f"M = {size.rows} ({paired.rounds} rounds; {MIN_ROUNDS} are needed)"
    return f"M = {size.rows} (our time is {interval(paired)} x its time, {LEVEL} interval)"


def _unpaired(results: Results, places_of: dict[str, list[Place]]) -> Iterator[str]:
    """The medians of a record made without ratios of rounds, which has no verdict."""
    yield (
        "This record keeps no ratios of single rounds, so it cannot say which differences between "
        "the medians are more than noise."
    )
    any_faster = False
    for name, places in places_of.items():
        where = []
        for size, row in places:
            ours = by_name(results, "rows", size, **{"pass": BOTH})[OURS]["median"]
            if row["median"] < ours:
                where.append(f"M = {size.rows} ({ours / row['median']:.2f} x its median)")
        if where:
            any_faster = True
            yield (
                f"The median of cjepa_kernels is above that of {in_sentence(name)} at "
                f"{', '.join(where)}."
            )
    if not any_faster:
        yield "No other candidate of the same loss has a lower median at any size."


def _errors(results: Results) -> Iterator[str]:
    """The largest errors of our gradient and of the plain formula's."""
    largest = {
        name: max(row["gradient"] for row in results["errors"] if row["name"] == name)
        for name in (OURS, EAGER)
        if any(row["name"] == name for row in results["errors"])
    }
    if len(largest) == 2:
        yield (
            f"The largest error of a gradient against float64 is {largest[OURS]:.1e} with "
            f"cjepa_kernels and {largest[EAGER]:.1e} with {in_sentence(EAGER)}."
        )


def _temperatures(results: Results) -> Iterator[str]:
    """The temperature below which the plain formula's gradient in fp32 is useless."""
    gradients: dict[float, dict[str, float]] = {}
    for row in results["temperatures"]:
        if row["dtype"] == "fp32":
            gradients.setdefault(row["temperature"], {})[row["name"]] = row["gradient"]
    wrong: list[dict[str, float]] = []
    for temperature in sorted(gradients):
        if gradients[temperature].get(EAGER, 0.0) < WRONG:
            break
        wrong.append(gradients[temperature])
        highest = temperature
    if wrong:
        yield (
            f"From temperature {highest:g} down {in_sentence(EAGER)}'s gradient in fp32 is off by "
            f"{100 * min(of[EAGER] for of in wrong):.0f} % or more; that of cjepa_kernels by "
            f"{max(of[OURS] for of in wrong):.1e} at most."
        )


def _narrow_dtypes(results: Results) -> Iterator[str]:
    """Temperatures at which the dtype of the inputs, not the formula, spoils our gradient."""
    for dtype in dict.fromkeys(row["dtype"] for row in results["temperatures"]):
        errors = {
            row["temperature"]: row["gradient"]
            for row in results["temperatures"]
            if (row["dtype"], row["name"]) == (dtype, OURS)
        }
        wrong = [f"{value:g}" for value in sorted(errors) if not errors[value] < WRONG]
        if wrong:
            why = ": numbers this small round to 0 in fp16, not in bf16 or fp32" * (dtype == "fp16")
            yield (
                f"With {dtype} inputs the gradient of cjepa_kernels is off by "
                f"{100 * WRONG:.0f} % or more at temperature {', '.join(wrong)}{why}."
            )


def markdown(results: Results, images: dict[str, str] | None = None) -> str:
    """The results as a page.

    Args:
        results: Of a comparison.
        images: Link of each plot, by its title.
    """
    environment = results["environment"]
    versions = ", ".join(
        f"{key} {environment[key]}"
        for key in ("instruction_set", "threads", "torch", "cuda", "cjepa_kernels", "python")
        if environment.get(key)
    )
    settings = results["settings"]
    at_commit = f" at commit {environment['commit']}" if environment["commit"] else ""
    lines = [
        f"# {environment['device']}, {environment['date'][:10]}",
        "",
        f"`{environment['command']}`{at_commit}; back end "
        f"{environment['backend']}, {versions}; inputs in {settings['dtype']}, temperature "
        f"{settings['temperature']:g}.",
        "",
        *(f"- {sentence}" for sentence in verdict(results)),
    ]
    for name, link in (images or {}).items():
        lines += ["", f"![{name}]({link})"]
    lines += ["", *markdown_table(HEADER, table(results), left=2), ""]
    if any(" *" in cells[1] for cells in table(results)):
        lines += ["\\* another loss of the same M x M matrix", ""]
    for size in sizes_of(results):
        if reasons := left_out(results, size):
            lines.append(f"- Not measured at M = {size.rows}, D = {size.features}: {reasons}")
    for row in results["missing"]:
        lines.append(f"- {TITLES[row['name']]} is left out: {row['how']}")
    for row in results["failed"]:
        what = f"{TITLES[row['name']]} at {row['M']} x {row['D']} ({row['what']})"
        lines.append(f"- {what} failed: {row['error']}")
    return "\n".join(lines).rstrip() + "\n"


def load(path: Path) -> Results:
    """Read a results file."""
    content: Results = json.loads(path.read_text(encoding="utf-8"))
    for row in (*content["errors"], *content["temperatures"]):
        for key in ("loss", "gradient"):
            row[key] = math.nan if row[key] is None else row[key]
    return content
