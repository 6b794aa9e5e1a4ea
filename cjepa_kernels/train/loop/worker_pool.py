"""Jobs in parallel processes, with progress reports and an error that names the job.

This is not ``concurrent.futures.ProcessPoolExecutor``, because that class cannot say which job's
process died: it ends all others by SIGTERM first, and a job that was itself ended by SIGTERM looks
like them. It also waits for running jobs when one has failed. What is needed around it (progress,
exit codes, ending the processes) takes as many lines as this pool.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from cjepa_kernels.train.reported_error import ReportedError

ReportProgress = Callable[[int, int], None]  # (step, total steps)

_EXIT_SECONDS = 10.0  # how long a worker may take to end by itself
_REPORT_SECONDS = 0.2  # at most five progress reports a second from each job
# Errors of these types are mistakes of the user, which the command line tells from defects.
_USER_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, FileNotFoundError, OSError, ImportError, ReportedError)
}


@dataclass(frozen=True)
class Job:
    """Work for one process.

    Attributes:
        name: The name in progress reports and errors, unique among the jobs.
        function: Called as ``function(*arguments, report)``. It must be importable, and its
            arguments and its result must be picklable. ``report(step, total_steps)`` shows
            progress.
        arguments: The positional arguments before ``report``.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Event:
    """What happened to a job."""

    kind: str  # "started", "progress" or "finished"
    job: str  # its name
    step: int = 0  # steps done, for "progress"
    total_steps: int = 0  # all steps, for "progress"


class JobError(ReportedError):
    """A job's process died, or the job failed by a defect."""


class JobDefectError(JobError):
    """A job failed by a defect of the program; the cause has the traceback."""


class _RemoteError(Exception):
    """Carries a worker's traceback as the cause of the error raised here."""

    def __str__(self) -> str:
        return f"in the worker process:\n{self.args[0]}"


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    on_event: Callable[[Event], None],
    log_directory: Path,
) -> dict[str, Any]:
    """Run jobs on worker processes; the first failure stops all of them.

    Args:
        jobs: The jobs, started in this order.
        workers: Number of processes, >= 1; 1 runs the jobs one by one in this process.
        on_event: Called in this process as jobs start, progress and finish.
        log_directory: Worker processes print to the files ``worker-<n>.log`` in it.

    Returns:
        The results by job name.

    Raises:
        ValueError: If ``workers`` is below 1, if names repeat, or if a job raised it. A TypeError,
            OSError, ImportError or ReportedError of a job is also raised with the job's name.
        JobError: If a process died.
        JobDefectError: If a job raised anything else.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    names = [job.name for job in jobs]
    if len(set(names)) != len(names):
        raise ValueError(f"jobs must have distinct names, got {', '.join(names)}")
    workers = min(workers, len(jobs))
    if workers <= 1:
        return _run_here(jobs, on_event)
    log_directory.mkdir(parents=True, exist_ok=True)
    with _worker_processes(workers, log_directory) as processes:
        return _distribute(jobs, processes, on_event)


def _run_here(jobs: Sequence[Job], on_event: Callable[[Event], None]) -> dict[str, Any]:
    results = {}
    for job in jobs:
        on_event(Event("started", job.name))

        def report(step: int, total_steps: int, name: str = job.name) -> None:
            on_event(Event("progress", name, step, total_steps))

        try:
            results[job.name] = job.function(*job.arguments, report)
        except Exception as error:
            raise _failure(job.name, _kind(error), str(error)) from error
        on_event(Event("finished", job.name))
    return results


def _kind(error: Exception) -> str:
    kinds = [name for name, kind in _USER_ERRORS.items() if isinstance(error, kind)]
    return kinds[0] if kinds else type(error).__name__


def _failure(job: str, kind: str, message: str) -> Exception:
    if kind in _USER_ERRORS:
        return _USER_ERRORS[kind](f"{job}: {message}")
    return JobDefectError(f"{job} failed: {kind}: {message}")


@contextmanager
def _worker_processes(workers: int, log_directory: Path) -> Iterator[dict[Connection, Any]]:
    """Start worker processes; each has a connection for its jobs and messages."""
    # They are spawned, because a forked child of a process with threads (torch has some) may hang.
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    try:
        for i in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, log_directory / f"worker-{i}.log"))
            with _ctrl_c_ignored():
                process.start()
            there.close()  # now the connection ends when the process ends
            processes[here] = process
        yield processes
        # All jobs are done. Workers without a connection end by themselves and clean up.
        for link in processes:
            link.close()
        for process in processes.values():
            process.join(timeout=_EXIT_SECONDS)
    finally:
        for link, process in processes.items():
            link.close()
            process.terminate()
        for process in processes.values():
            process.join(timeout=_EXIT_SECONDS)
            process.kill()  # which is safe, since files are complete or absent at every moment
            process.join()


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Start a process that ignores Ctrl-C, which a terminal sends to every process of a program.

    A process inherits blocked signals from its first moment on. This process ends the others.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _distribute(
    jobs: Sequence[Job], processes: dict[Connection, Any], on_event: Callable[[Event], None]
) -> dict[str, Any]:
    waiting = deque(jobs)
    running: dict[Connection, str] = {}
    results: dict[str, Any] = {}

    def assign(link: Connection) -> None:
        if waiting:
            job = waiting.popleft()
            running[link] = job.name
            link.send(job)
            on_event(Event("started", job.name))

    for link in processes:
        assign(link)
    while running:
        for ready in connection.wait(list(running)):
            link = cast(Connection, ready)
            job = running[link]
            try:
                kind, payload = link.recv()
            except (EOFError, OSError):
                processes[link].join()
                raise JobError(
                    f"{job} failed: its process ended with exit code {processes[link].exitcode} "
                    "(a negative code is the signal that killed it)"
                ) from None
            if kind == "failed":
                error_kind, message, remote = payload
                raise _failure(job, error_kind, message) from _RemoteError(remote)
            if kind == "progress":
                on_event(Event("progress", job, *payload))
            else:
                del running[link]
                results[job] = payload
                on_event(Event("finished", job))
                assign(link)
    return results


def _work(link: Connection, log: Path) -> None:
    """Do the jobs that come over the connection of a worker process, until it is closed."""
    _end_with_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)  # so that libraries that print do not disturb the progress display
    os.dup2(descriptor, 2)
    while True:
        try:
            job: Job = link.recv()
        except EOFError:
            return
        last_report = 0.0

        def report(step: int, total_steps: int) -> None:
            nonlocal last_report
            now = time.monotonic()
            if now - last_report >= _REPORT_SECONDS or step >= total_steps:
                last_report = now
                link.send(("progress", (step, total_steps)))

        try:
            result = job.function(*job.arguments, report)
        except Exception as error:
            link.send(("failed", (_kind(error), str(error), traceback.format_exc())))
            return
        link.send(("finished", result))


def _end_with_parent() -> None:
    """End this process when its parent dies, even by SIGKILL, so that no orphan writes files."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def wait() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="end-with-parent").start()
