"""The page of ``make gpu-check``: what a record shows, and what has not been measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from gpu_check_targets import AS_CALLED, GRAPH, NOT_MEASURED, REDUCE_OVERHEAD, judge

from cjepa_kernels.bench.candidates import BOTH, COMPILED, EAGER, OURS
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.sources import changed, of_files, since
from cjepa_kernels.tables import markdown_table

TITLES = {
    EAGER: "plain formula",
    COMPILED: "`torch.compile` of it",
    OURS: "cjepa_kernels",
    REDUCE_OVERHEAD: 'cjepa_kernels, `mode="reduce-overhead"`',
    GRAPH: "cjepa_kernels, CUDA graph",
}
ROWS = (256, 1024, 4096, 16384)  # M of the latency as called, at D = 256.
WIDTH = 256


def micro(seconds: float) -> str:
    """Whole microseconds."""
    return f"{1e6 * seconds:,.0f}"


def figure(value: float) -> str:
    """Three significant digits, or the whole number if it has more."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def made(content: Record, now: Mapping[str, str] | None = None) -> str:
    """How a record came about, and whether the code has changed since."""
    at = content["environment"]
    date = datetime.fromisoformat(at["date"])
    versions = f"PyTorch {at['torch'].split('+')[0]}, Triton {at['triton']}, Python {at['python']}"
    text = (
        f"Measured by `{at['command']}`: {at['device']}, {versions}, {date.day} {date:%B %Y}, "
        f"commit {at['commit']}."
    )
    if at["variables"]:
        settings = ", ".join(f"`{name}={value}`" for name, value in at["variables"].items())
        text += f" The environment had {settings}."
    if at["cuda"] is None:
        text += (
            " **There was no GPU: the times are those of the CPU and show that the check runs.**"
        )
    if not content["finished"]:
        text += " **The check did not come to its end.**"
    return f"{text} {since(at['sources'], now)}"


def table(heads: str, rows: list[list[object]], *, left: int) -> str:
    """A Markdown table of which the first ``left`` columns are text."""
    texts = [[str(cell) for cell in row] for row in rows]
    return "\n".join(markdown_table(heads.split(" | "), texts, left=left))


def targets(content: Record) -> str:
    """Every target, its value, and whether it is met."""
    rows: list[list[object]] = []
    for target in judge(content):
        value, limit = target.value, target.limit or 0.0
        rows.append(
            [
                target.cell["target"],
                target.cell["M"],
                target.cell["D"],
                f"{target.bound} {figure(limit)}",
                "" if value is None else figure(value),
                target.verdict,
            ]
        )
    return table("target | M | D | bound | value | met?", rows, left=1)


def latency_of(content: Record, rows: int, name: str) -> Record | None:
    """The latencies of a candidate at D = 256, if they were measured."""
    for entry in content.get("latency", []):
        if (entry["M"], entry["D"], entry["name"]) == (rows, WIDTH, name):
            found: Record = entry
            return found
    return None


def as_called(content: Record) -> str:
    """The wall-clock time of one synchronised call of each candidate."""
    rows: list[list[object]] = []
    for count in ROWS:
        found = (latency_of(content, count, name) for name in TITLES)
        cells = [NOT_MEASURED if x is None else micro(x[AS_CALLED]["median"]) for x in found]
        rows.append([count, *cells])
    return table(" | ".join(["M = 2B", *TITLES.values()]), rows, left=0)


def latency(content: Record | None, earlier: Record) -> str:
    """The latency as called, for a page that shows no more of the check.

    Args:
        content: The record of the check; None if there is none.
        earlier: A record of ``cjepa bench`` on a GPU, which stands in for it.
    """
    if content is not None:
        return f"{as_called(content)}\n\n{made(content)}"
    times = {
        (row["M"], row["name"]): micro(row["median"])
        for row in earlier["rows"]
        if row["D"] == WIDTH and row["pass"] == BOTH
    }
    rows: list[list[object]] = [
        [count, *(times.get((count, name), NOT_MEASURED) for name in TITLES)] for count in ROWS
    ]
    at = earlier["environment"]
    text = (
        f"The times are those of `cjepa bench` between two CUDA events, on an {at['device']} at "
        f"commit {at['commit']}. {since(at['sources'])} `make gpu-check` measures the whole table "
        "in one run. It has not been run on the code as it is."
    )
    return f"{table(' | '.join(['M = 2B', *TITLES.values()]), rows, left=0)}\n\n{text}"


def _latency(content: Record) -> Iterator[str]:
    yield "## Latency as called"
    yield (
        "The table has forward + backward in µs at D = 256, bf16, τ = 0.1, metrics on. It is the "
        "median wall-clock time of one synchronised call."
    )
    yield as_called(content)
    rows: list[list[object]] = [
        [
            TITLES.get(entry["name"], entry["name"]),
            entry["M"],
            entry["D"],
            *(micro(entry["as_called"][key]) for key in ("p20", "median", "p80")),
            micro(entry["in_a_row"]["median"]),
            micro(entry["host"]["median"]),
            *(
                "" if entry[count] is None else entry[count]
                for count in ("skipped_graphs", "launch_plans")
            ),
        ]
        for entry in sorted(content["latency"], key=lambda entry: (entry["D"], entry["M"]))
    ]
    if rows:
        yield (
            "*In a row* is the time of a call among others that are launched without waiting, and "
            "*host* the time until a call returns. *Graphs left out* counts the CUDA graphs that "
            "`torch.compile` did not use, and *plans* the launch plans that the process had."
        )
        heads = "loss | M | D | p20 | as called | p80 | in a row | host | graphs left out | plans"
        yield table(heads, rows, left=1)


def _device(content: Record) -> Iterator[str]:
    yield "## Time of the device"
    rows: list[list[object]] = [
        [
            entry["part"],
            entry["pass"],
            entry["M"],
            entry["D"],
            TITLES.get(entry["name"], entry["name"]),
            *(figure(1e3 * entry[key]) for key in ("p20", "median", "p80")),
            entry["of"],
        ]
        for entry in content["device"]
    ]
    if not rows:
        yield f"It was {NOT_MEASURED}."
        return
    yield "The table has ms. What was timed stands in the last column."
    yield table("part | pass | M | D | candidate | p20 | median | p80 | time of", rows, left=2)


def _memory(content: Record) -> Iterator[str]:
    for entry in content["memory"]:
        yield (
            f"At M = {entry['M']:,}, D = {entry['D']} the peak memory beyond inputs and gradients "
            f"is {entry['over_input']:.2f} times the input, and forward + backward takes "
            f"{figure(entry['seconds'])} s."
        )


def _tests(content: Record) -> Iterator[str]:
    yield "## Tests"
    if not content["tests"]:
        yield "No test has run."
        return
    rows: list[list[object]] = [
        [entry["step"], entry["passed"], entry["failed"], entry["skipped"]]
        for entry in content["tests"]
    ]
    yield table("step | passed | failed | skipped", rows, left=1)
    lines = [
        f"- {entry['step']}, failed: `{failure['test']}`: {_in_line(failure['reason'])}"
        for entry in content["tests"]
        for failure in entry["failures"]
    ]
    lines += [
        f"- {entry['step']}, {count} skipped: {_in_line(reason)}"
        for entry in content["tests"]
        for reason, count in entry["skips"].items()
    ]
    if lines:
        yield "\n".join(lines)


def _steps(content: Record) -> Iterator[str]:
    yield "## Steps"
    rows: list[list[object]] = [
        [entry["name"], entry["outcome"], f"{entry['seconds']:.0f}", f"{entry['limit']:.0f}"]
        for entry in content["steps"]
    ]
    yield table("step | outcome | seconds | limit", rows, left=2)
    lines = [f"- {place(entry)} failed: {_in_line(entry['error'])}" for entry in content["errors"]]
    lines += [
        f"- {place(entry)} was left out: {_in_line(entry['reason'])}"
        for entry in content["left_out"]
    ]
    lines += [
        f"- line {entry['line']} of the step {entry['step']} does not count: {entry['fault']}"
        for entry in content["faults"]
    ]
    if lines:
        yield "\n".join(lines)


def place(entry: Mapping[str, Any]) -> str:
    """Where something failed or was left out."""
    return f"{entry['part']} at M = {entry['M']}, D = {entry['D']}, {entry['name']}"


def _in_line(text: str) -> str:
    return " ".join(text.replace("<", "\\<").split())


def _sources(content: Record, now: Mapping[str, str] | None) -> str:
    parts = changed(content["environment"]["sources"], of_files() if now is None else now)
    rows: list[list[object]] = [
        [part, f"`{digest}`", "yes" if part in parts else "no"]
        for part, digest in content["environment"]["sources"].items()
    ]
    return table("files | hash when measured | changed since", rows, left=3)


def body(content: Record | None, now: Mapping[str, str] | None = None) -> str:
    """The page of a record without its title.

    Args:
        content: The record; None if there is none, and then no target is measured.
        now: The hashes of the sources as they are. Default: of this checkout.
    """
    if content is None:
        parts = [
            "**`make gpu-check` has not been run on the code as it is: no target has been "
            "measured.**",
            "## Targets",
            targets({}),
        ]
        return "\n\n".join(parts)
    parts = [made(content, now), _sources(content, now), "## Targets", targets(content)]
    for section in (_latency, _device, _memory, _tests, _steps):
        parts += section(content)
    return "\n\n".join(parts)


def page(content: Record) -> str:
    """The whole page, for the folder of a run."""
    return f"# GPU check\n\n{body(content)}\n"
