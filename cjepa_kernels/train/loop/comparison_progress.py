"""Progress of a comparison: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cjepa_kernels.train.loop.worker_pool import Event

_LINE_SECONDS = 10.0


@contextmanager
def progress_display(console: Console, jobs: int) -> Iterator[Callable[[Event], None]]:
    """Show the progress of a number of jobs.

    Args:
        console: On a terminal, each running job has a bar, and all jobs together have one.
            Elsewhere a line is printed when a job ends, and one about the running jobs every ten
            seconds.
        jobs: How many jobs there are.

    Yields:
        The function that takes the events of :func:`worker_pool.run_jobs`.
    """
    if not console.is_terminal:
        yield _Lines(console, jobs)
        return
    columns = (
        TextColumn("{task.description}", style="bold"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bars(progress, jobs)


class _Bars:
    def __init__(self, progress: Progress, jobs: int) -> None:
        self.progress = progress
        self.jobs = jobs
        self.done = 0
        self.total = progress.add_task(f"all jobs (0/{jobs})", total=float(jobs))
        self.fractions: dict[str, float] = {}
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if event.kind == "started":
            self.tasks[event.job] = self.progress.add_task(event.job, total=None)
        elif event.kind == "progress":
            self.fractions[event.job] = event.step / max(1, event.total_steps)
            self.progress.update(
                self.tasks[event.job], completed=event.step, total=event.total_steps
            )
        else:
            self.fractions.pop(event.job, None)
            self.done += 1
            self.progress.remove_task(self.tasks.pop(event.job))
            self.progress.console.print(f"finished {event.job}", style="dim")
        self.progress.update(
            self.total,
            completed=self.done + sum(self.fractions.values()),
            description=f"all jobs ({self.done}/{self.jobs})",
        )


class _Lines:
    def __init__(self, console: Console, jobs: int) -> None:
        self.console = console
        self.jobs = jobs
        self.done = 0
        self.started: dict[str, float] = {}
        self.fractions: dict[str, float] = {}
        self.last_line = time.monotonic()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.kind == "started":
            self.started[event.job] = now
        elif event.kind == "progress":
            self.fractions[event.job] = event.step / max(1, event.total_steps)
            if now - self.last_line >= _LINE_SECONDS:
                self.last_line = now
                running = ", ".join(f"{job} {100 * f:.0f} %" for job, f in self.fractions.items())
                self.console.print(f"running: {running}", highlight=False)
        else:
            self.done += 1
            self.fractions.pop(event.job, None)
            seconds = now - self.started.pop(event.job)
            self.console.print(
                f"[{self.done}/{self.jobs}] finished {event.job} in {seconds:.0f} s",
                markup=False,
                highlight=False,
            )
