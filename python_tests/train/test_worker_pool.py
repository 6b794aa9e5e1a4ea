"""Test parallel jobs: results, progress, failures, and that no process remains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import alive, gone, wait_long
from repository import ROOT

pytest.importorskip("rich")

from rich.console import Console

from cjepa_kernels.train.loop.comparison_progress import progress_display
from cjepa_kernels.train.loop.worker_pool import Event, Job, JobDefectError, JobError, run_jobs
from cjepa_kernels.train.reported_error import ReportedError


def square(number: int, report: Any) -> tuple[int, int]:
    report(1, 2)
    report(2, 2)
    os.write(1, b"printed by a library\n")
    return number * number, os.getpid()


def fail(kind: str, report: Any) -> None:
    raise {
        "value": ValueError,
        "zero": ZeroDivisionError,
        "disk": PermissionError,
        "loss": ReportedError,
    }[kind]("the reason")


def die(report: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_events_and_logs(
    workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    jobs = [Job(f"job {n}", square, (n,)) for n in range(5)]
    results = run_jobs(jobs, workers, events.append, tmp_path)
    assert {name: value for name, (value, _) in results.items()} == {
        f"job {n}": n * n for n in range(5)
    }
    printed = capfd.readouterr().out.count("printed by a library")
    logged = sum(log.read_text().count("printed") for log in tmp_path.glob("worker-*.log"))
    assert (printed, logged) == ((5, 0) if workers == 1 else (0, 5))
    pids = {pid for _, pid in results.values()}
    assert (pids == {os.getpid()}) if workers == 1 else (os.getpid() not in pids)
    for job in jobs:
        kinds = [event.kind for event in events if event.job == job.name]
        assert kinds[0] == "started"
        assert kinds[-1] == "finished"
        assert Event("progress", job.name, 2, 2) in events


@pytest.mark.parametrize(
    ("workers", "kind", "error", "message"),
    [
        (1, "value", ValueError, "^bad job: the reason$"),
        (1, "zero", JobDefectError, "^bad job failed: ZeroDivisionError: the reason$"),
        (1, "disk", OSError, "^bad job: the reason$"),
        (1, "loss", ReportedError, "^bad job: the reason$"),
        (2, "value", ValueError, "^bad job: the reason$"),
    ],
)
def test_failure_names_the_job(
    workers: int, kind: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    jobs = [Job("good job", square, (1,)), Job("bad job", fail, (kind,))]
    with pytest.raises(error, match=message) as caught:
        run_jobs(jobs, workers, lambda event: None, tmp_path)
    assert caught.value.__cause__ is not None
    if workers == 2:
        assert "test_worker_pool.py" in str(caught.value.__cause__)


def test_failure_stops_the_others(tmp_path: Path) -> None:
    marker = tmp_path / "pid"

    def on_event(event: Event) -> None:
        assert event.kind == "started"

    jobs = [Job("endless", wait_long, (marker,)), Job("bad", fail, ("zero",))]
    started = time.monotonic()
    with pytest.raises(JobError, match=r"^bad failed"):
        run_jobs(jobs, 2, on_event, tmp_path / "logs")
    assert time.monotonic() - started < 60
    if marker.exists():
        assert gone(int(marker.read_text()))


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_worker_names_its_job(tmp_path: Path) -> None:
    jobs = [Job("good", square, (1,)), Job("killed", die)]
    with pytest.raises(JobError, match=r"^killed failed: its process ended with exit code -9"):
        run_jobs(jobs, 2, lambda event: None, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "from pathlib import Path\n"
        "from cjepa_kernels.train.loop.worker_pool import Job, run_jobs\n"
        "from processes import wait_long\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    jobs = [Job(n, wait_long, (folder / n,)) for n in ('a', 'b')]\n"
        "    run_jobs(jobs, 2, print, folder / 'logs')\n"
    )
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "python_tests" / "support"), os.environ.get("PYTHONPATH", "")]
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )
    try:
        markers = [tmp_path / name for name in ("a", "b")]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(
            m.exists() and m.read_text() for m in markers
        ):
            time.sleep(0.05)
        pids = [int(marker.read_text()) for marker in markers]
        assert all(alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait()
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize(
    ("names", "workers", "message"),
    [(("a", "b"), 0, "workers must be at least 1, got 0"), (("a", "a"), 1, "distinct names")],
)
def test_invalid_arguments(
    names: tuple[str, ...], workers: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_jobs([Job(n, square, (1,)) for n in names], workers, lambda event: None, tmp_path)


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "plain"])
def test_progress_display(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cjepa_kernels.train.loop.comparison_progress._LINE_SECONDS", 0.0)
    console = Console(force_terminal=terminal, width=80, record=True, quiet=False)
    with console.capture() as captured, progress_display(console, 2) as on_event:
        for name in ("first run", "second run"):
            on_event(Event("started", name))
            on_event(Event("progress", name, 5, 10))
            on_event(Event("finished", name))
    text = captured.get()
    assert "first run" in text
    assert ("[2/2] finished second run" in text) == (not terminal)
    if not terminal:
        assert "running: first run 50 %" in text
