"""Runs the steps of ``make gpu-check`` and keeps their record and its page up to date."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gpu_check_steps
from gpu_check_page import page
from gpu_check_record import NAME, merge
from gpu_check_targets import judge
from step_runner import PASSED, Folder, Outcome, Step, run_all

from cjepa_kernels.bench import machine
from cjepa_kernels.bench.records import RESULTS, as_json
from cjepa_kernels.bench.sources import PARTS, changed, of_files
from cjepa_kernels.bench.targets import print_targets, summary
from cjepa_kernels.files import atomic_write
from cjepa_kernels.triton.proved import SWITCHES

TOTAL = 345.0  # Seconds of all steps together. The rest of the 6 minutes is for start and end.
SHOWN_LINES = 12  # Of the output of a step that failed.
COLUMNS = ("target", "M", "D")


def changed_since(path: Path, now: dict[str, str]) -> tuple[str, ...]:
    """The parts of the sources that have changed since a record in which all tests passed.

    Without such a record all parts count as changed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tested = content["tests"] and not any(entry["failed"] for entry in content["tests"])
        recorded = content["environment"]["sources"] if tested else None
    except (OSError, ValueError, LookupError, TypeError):
        return PARTS
    return tuple(changed(recorded, now)) if recorded else PARTS


def environment(device: str) -> dict[str, Any]:
    """The machine, the versions, the sources and our variables."""
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("CJEPA_") and name != "CJEPA_COMMIT"
    }
    return {**machine.environment(device, of_kernels=True), "variables": variables}


class Check:
    """Runs steps and writes record and page anew after each stage.

    Attributes:
        content: The record so far.
    """

    def __init__(self, steps: list[Step], folder: Folder, made_on: dict[str, Any]) -> None:
        self.steps, self.folder, self.made_on = steps, folder, made_on
        self.shown = 0
        self.content: dict[str, Any] = {}

    def save(self, outcomes: list[Outcome]) -> None:
        """Write record and page, and show the outcomes that are new."""
        self.content = merge(self.made_on, self.steps, outcomes, self.folder)
        atomic_write(self.folder.path / NAME, as_json(self.content))
        atomic_write(self.folder.path / "gpu_check.md", page(self.content))
        for outcome in outcomes[self.shown :]:
            print(f"{outcome.seconds:4.0f} s  {outcome.name}: {outcome.text}", flush=True)
            log = self.folder.log(outcome.name)
            if outcome.text != PASSED and log.is_file():
                lines = log.read_text("utf-8", "replace").splitlines()
                print("".join(f"        {line}\n" for line in lines[-SHOWN_LINES:]), end="")
        self.shown = len(outcomes)

    def run(self, total: float = TOTAL) -> bool:
        """Run all steps; whether every one has passed."""
        outcomes = run_all(self.steps, self.folder, total, self.save)
        return all(outcome.text == PASSED for outcome in outcomes)

    def show_end(self) -> None:
        """Print the targets, what failed, and where the record is."""
        judged = judge(self.content)
        print()
        print_targets(judged, COLUMNS)
        print(summary(judged, COLUMNS).splitlines()[0])
        for entry in self.content["errors"]:
            where = f"{entry['part']} M={entry['M']} D={entry['D']} {entry['name']}"
            print(f"failed: {where}: {entry['error']}")
        if missing := gpu_check_steps.missing_for_tests():
            print(f"not installed, so that tests were left out or slow: {', '.join(missing)}")
        if gpu_check_steps.sanitizer() is None:
            print("compute-sanitizer is not installed: no check of memory or races")
        print(f"written: {self.folder.path / NAME} and gpu_check.md beside it")


def check_machine(out: Path, processes: int, *, as_chosen: bool = False) -> bool:
    """Run the whole check into a folder; whether every step has passed.

    Args:
        out: The folder.
        processes: Number of GPUs; without one the course of the check is tried on the CPU.
        as_chosen: Whether the package chooses Gluon kernels and launch plans by itself. Otherwise
            they are asked for, unless the environment says something else.
    """
    for variable in () if as_chosen else SWITCHES.values():
        os.environ.setdefault(variable, "1")
    if processes > 0:
        now = changed_since(RESULTS / NAME, of_files())
        steps, device = gpu_check_steps.on_gpus(processes, changed=now), "cuda"
    else:
        steps, device = gpu_check_steps.on_cpu(), "cpu"
    made_on = environment(device)
    print(f"{made_on['device']}, PyTorch {made_on['torch']}, {len(steps)} steps", flush=True)
    check = Check(steps, Folder(out), made_on)
    passed = check.run()
    check.show_end()
    return passed
