"""The record of ``make gpu-check``: its schema, and how the lines of the steps become one record.

    python bench/gpu_check_record.py runs/gpu-check/gpu_check.json

This command takes a record over into ``bench/results``, from which ``docs/generate_figures.py``
writes the pages. It refuses a record that does not fit the schema, and one made without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_check_targets import judge
from step_runner import Folder, Outcome, Step

from cjepa_kernels.bench.records import RESULTS, Record, as_json
from cjepa_kernels.files import atomic_write

NAME = "gpu_check.json"
NUMBER, COUNT, TEXT, MAYBE = (int, float), int, str, type(None)
SUMMARY = {"median": NUMBER, "p20": NUMBER, "p80": NUMBER, "rounds": COUNT}
CELL = {"M": COUNT, "D": COUNT, "name": TEXT}
# The fields of an entry of each section, with their types. A mapping is an object of its own.
STEP_SECTIONS: dict[str, dict[str, Any]] = {
    "compile": {**CELL, "seconds": NUMBER},
    "latency": {
        **CELL,
        "as_called": SUMMARY,
        "in_a_row": SUMMARY,
        "host": SUMMARY,
        "skipped_graphs": (int, MAYBE),
        "launch_plans": (int, MAYBE),
    },
    "device": {**CELL, "part": TEXT, "pass": TEXT, "of": TEXT, **SUMMARY},
    "memory": {"M": COUNT, "D": COUNT, "over_input": NUMBER, "seconds": NUMBER},
    "left_out": {**CELL, "part": TEXT, "reason": TEXT},
    "errors": {**CELL, "part": TEXT, "error": TEXT},
}
TEST_LINE = {"test": TEXT, "outcome": TEXT, "seconds": NUMBER, "reason": TEXT}
SECTIONS: dict[str, dict[str, Any]] = {
    **STEP_SECTIONS,
    "steps": {"name": TEXT, "outcome": TEXT, "seconds": NUMBER, "limit": NUMBER},
    "tests": {
        "step": TEXT,
        "passed": COUNT,
        "failed": COUNT,
        "skipped": COUNT,
        "failures": list,
        "skips": dict,
    },
    "faults": {"step": TEXT, "line": COUNT, "fault": TEXT},
    "targets": {
        "target": TEXT,
        "M": COUNT,
        "D": COUNT,
        "value": (int, float, MAYBE),
        "limit": NUMBER,
        "bound": TEXT,
        "verdict": TEXT,
    },
}
ENVIRONMENT = {
    "device": TEXT,
    "torch": TEXT,
    "python": TEXT,
    "triton": (str, MAYBE),
    "cuda": (str, MAYBE),
    "commit": (str, MAYBE),
    "date": TEXT,
    "command": TEXT,
    "sources": dict,
    "variables": dict,
}


def faults_of(value: Any, fields: Mapping[str, Any], where: str) -> list[str]:
    """What is wrong with an object whose fields and types are given."""
    if not isinstance(value, dict):
        return [f"{where}: expected an object, got {type(value).__name__}"]
    wrong = [f"{where}: no field {name!r}" for name in fields if name not in value]
    for name, kind in fields.items():
        if name not in value:
            continue
        if isinstance(kind, dict):
            wrong += faults_of(value[name], kind, f"{where}.{name}")
        elif not isinstance(value[name], kind) or isinstance(value[name], bool) != (kind is bool):
            wrong.append(f"{where}.{name}: unexpected {value[name]!r}")
    return wrong


def check(content: Any) -> list[str]:
    """What is wrong with a record; an empty list if it fits the schema."""
    wrong = faults_of(content, {"environment": ENVIRONMENT, "finished": bool}, "record")
    if not isinstance(content, dict):
        return wrong
    for section, fields in SECTIONS.items():
        entries = content.get(section)
        if not isinstance(entries, list):
            wrong.append(f"{section}: expected a list")
            continue
        for index, entry in enumerate(entries):
            wrong += faults_of(entry, fields, f"{section}[{index}]")
    return wrong


def read_lines(path: Path, step: str) -> tuple[list[tuple[str, Record]], list[Record]]:
    """The entries that a step wrote, each with its section, and the lines that are none.

    A step that is killed may leave half a line, which loses this line alone.
    """
    entries: list[tuple[str, Record]] = []
    faults: list[Record] = []
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            section = entry.pop("section")
            fields = TEST_LINE if section == "tests" else STEP_SECTIONS[section]
        except (ValueError, KeyError, AttributeError, TypeError):
            faults.append({"step": step, "line": number, "fault": "incomplete or unknown"})
            continue
        wrong = faults_of(entry, fields, section)
        if wrong:
            faults.append({"step": step, "line": number, "fault": wrong[0]})
        else:
            entries.append((section, entry))
    return entries, faults


def tests_of(step: str, lines: Sequence[Record]) -> Record:
    """The tests of a step: how many passed, and why the others did not."""
    counts = Counter(line["outcome"] for line in lines)
    return {
        "step": step,
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": [
            {"test": line["test"], "reason": line["reason"]}
            for line in lines
            if line["outcome"] == "failed"
        ],
        "skips": dict(Counter(line["reason"] for line in lines if line["outcome"] == "skipped")),
    }


def merge(
    environment: Record,
    steps: Sequence[Step],
    outcomes: Sequence[Outcome],
    folder: Folder,
) -> Record:
    """The record of a check, also of one that is still running.

    Args:
        environment: The machine and the versions.
        steps: All steps of the check.
        outcomes: Of the steps that have ended.
        folder: With the lines of the steps.
    """
    content: Record = {"environment": environment, "finished": len(outcomes) == len(steps)}
    content |= {section: [] for section in SECTIONS}
    limits = {step.name: step.limit for step in steps}
    for outcome in outcomes:
        entries, faults = read_lines(folder.lines(outcome.name), outcome.name)
        tests = [entry for section, entry in entries if section == "tests"]
        if tests:
            content["tests"].append(tests_of(outcome.name, tests))
        for section, entry in entries:
            if section != "tests":
                content[section].append(entry)
        content["faults"] += faults
        content["steps"].append(
            {
                "name": outcome.name,
                "outcome": outcome.text,
                "seconds": round(outcome.seconds, 1),
                "limit": limits[outcome.name],
            }
        )
    content["targets"] = [
        {
            **target.cell,
            "value": target.value,
            "limit": target.limit,
            "bound": target.bound,
            "verdict": target.verdict,
        }
        for target in judge(content)
    ]
    return content


def take_over(path: Path) -> str | None:
    """Copy a record into ``bench/results``; the reason if it is refused."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{path}: {error}"
    wrong = check(content)
    if wrong:
        return f"{path} is no record of gpu_check.py: {wrong[0]}"
    environment = content["environment"]
    if environment["cuda"] is None:
        return f"{path} was made without a GPU, to try the check"
    if (environment["commit"] or "-dirty").endswith("-dirty"):
        return f"{path} is of code that is no commit: {environment['commit']}"
    atomic_write(RESULTS / NAME, as_json(content))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="gpu_check.json of a run")
    refused = take_over(parser.parse_args().record)
    if refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    print(f"written: {RESULTS / NAME}; now run docs/generate_figures.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
