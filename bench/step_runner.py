"""Steps of a check: processes with limits of their own, which run one after another or together.

Steps of one stage run together, and stages run one after another. A step that fails, hangs or ends
without a word loses nothing of the others. A step writes what it finds to the file that the
variable ``CJEPA_LINES`` names, line by line, so that what it wrote before its end counts.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINES = "CJEPA_LINES"  # Variable that names the file of a step's lines.
SHORTEST = 3.0  # A step with fewer seconds left is not started.
POLL = 0.05  # Seconds between two looks at the running steps.
NO_TESTS = 5  # Exit code of pytest that has run no test.
PASSED = "passed"


@dataclass(frozen=True)
class Step:
    """A command and its limits.

    Attributes:
        name: Its name in the record.
        command: Program and arguments.
        limit: Seconds that it may take at most.
        stage: Neighbouring steps of the same stage run together. Default: the step runs alone.
        reserved: Seconds that the earlier steps must leave for it.
        grace: Seconds that it has after an interrupt to write what it has.
        needs: Modules that it cannot run without.
        environment: Variables that are added to those of this process.
        touches: The parts of the sources that it tests; empty if it is no test.
    """

    name: str
    command: Sequence[str]
    limit: float
    stage: str = ""
    reserved: float = 0.0
    grace: float = 1.0
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    touches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a step ended, and the seconds that it took."""

    name: str
    text: str
    seconds: float


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def stages(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps, grouped into those that run together."""
    numbered = enumerate(steps)
    groups = groupby(numbered, key=lambda pair: pair[1].stage or pair[0])
    return [[step for _, step in group] for _, group in groups]


def allowance(step: Step, later: Sequence[Sequence[Step]], left: float) -> float:
    """The seconds that a step may take of those that are left.

    Args:
        step: The step.
        later: The stages after its own.
        left: Seconds that are left for all.
    """
    reserved = sum(max(other.reserved for other in stage) for stage in later)
    return min(step.limit, left - step.grace - reserved)


class Folder:
    """The folder of a check, which holds the lines and the output of every step."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # Steps run in the root of the checkout.
        for name in ("lines", "logs"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
            for old in (self.path / name).iterdir():
                old.unlink()

    def lines(self, step: str) -> Path:
        """The file that a step writes its lines to."""
        return self.path / "lines" / f"{_file_name(step)}.jsonl"

    def log(self, step: str) -> Path:
        """The file with the output of a step."""
        return self.path / "logs" / f"{_file_name(step)}.txt"


def _file_name(step: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in step)


class Running:
    """A step whose process runs."""

    def __init__(self, step: Step, limit: float, folder: Folder) -> None:
        self.step, self.limit = step, limit
        environment = {**os.environ, **step.environment, LINES: str(folder.lines(step.name))}
        path = [str(ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self.start = time.monotonic()
        with folder.log(step.name).open("wb") as log:
            self.process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.interrupted: float | None = None

    def look(self) -> Outcome | None:
        """The outcome if the step has ended. A step beyond its limit is interrupted, then killed.

        The processes that a step has left behind are killed too.
        """
        code = self.process.poll()
        now = time.monotonic()
        if code is None and self.interrupted is None and now - self.start >= self.limit:
            self.interrupted = now
            self.send(signal.SIGINT)
        killed = self.interrupted is not None and now - self.interrupted >= self.step.grace
        if code is None and not killed:
            return None
        self.kill()
        if self.interrupted is not None:
            text = f"stopped after {self.limit:.0f} s"
        elif code == 0:
            text = PASSED
        elif code == NO_TESTS and "pytest" in self.step.needs:
            text = "no test ran"
        else:
            text = f"failed ({code})"
        return Outcome(self.step.name, text, time.monotonic() - self.start)

    def send(self, number: int) -> None:
        """Send a signal to the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End the process and its children."""
        self.send(signal.SIGKILL)
        self.process.wait()


def run_stage(steps: Sequence[Step], limits: Sequence[float], folder: Folder) -> list[Outcome]:
    """Run steps together, each for at most its own limit."""
    outcomes: dict[str, Outcome] = {}
    with ExitStack() as stack:
        running = []
        for step, limit in zip(steps, limits, strict=True):
            missing = [module for module in step.needs if not installed(module)]
            if missing:
                text = f"not run: {', '.join(missing)} not installed"
            elif limit < SHORTEST:
                text = "not run: no time left"
            else:
                try:
                    started = Running(step, limit, folder)
                except OSError as error:
                    text = f"failed ({error.strerror})"
                else:
                    stack.callback(started.kill)
                    running.append(started)
                    continue
            outcomes[step.name] = Outcome(step.name, text, 0.0)
        while running:
            for one in list(running):
                outcome = one.look()
                if outcome is not None:
                    outcomes[outcome.name] = outcome
                    running.remove(one)
            time.sleep(POLL if running else 0.0)
    return [outcomes[step.name] for step in steps]


def run_all(
    steps: Sequence[Step],
    folder: Folder,
    total: float,
    done: Callable[[list[Outcome]], Any] = lambda outcomes: None,
    runner: Callable[..., list[Outcome]] = run_stage,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run every step, all within ``total`` seconds.

    Args:
        steps: In the order in which they run.
        folder: Of the check.
        total: Seconds for all of them.
        done: Is called after each stage with all outcomes so far.
        runner: Runs a stage.
        clock: Seconds since some moment.
    """
    deadline = clock() + total
    groups = stages(steps)
    outcomes: list[Outcome] = []
    for index, group in enumerate(groups):
        left = deadline - clock()
        limits = [allowance(step, groups[index + 1 :], left) for step in group]
        outcomes += runner(group, limits, folder)
        done(outcomes)
    return outcomes
