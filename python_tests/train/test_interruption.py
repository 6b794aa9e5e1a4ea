"""Test how a run ends after Ctrl-C or SIGTERM, and how it shows its progress."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from kill_and_resume import cjepa
from processes import gone, wait_long
from rich.console import Console
from train_experiments import TINY, tiny, weights

from cjepa_kernels.train import runner
from cjepa_kernels.train.loop.interruption import Terminated, resumable
from cjepa_kernels.train.loop.module import CJEPAModule
from cjepa_kernels.train.loop.training_progress import RunProgressBar
from cjepa_kernels.train.loop.worker_pool import Event, Job, run_jobs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_interrupted_run_says_how_to_go_on(signum: int, code: int, tmp_path: Path) -> None:
    config, run_dir, log = tmp_path / "experiment.json", tmp_path / "run", tmp_path / "log"
    config.write_text(json.dumps({**TINY, "trainer": {**TINY["trainer"], "epochs": 1000}}))
    process = cjepa("train", "--config", config, "--out", run_dir, log=log)
    try:
        wait_for((run_dir / "checkpoints" / "last.ckpt").exists)
        assert process.pid is not None
        os.kill(process.pid, signum)
        process.join(60)
        assert process.exitcode == code
    finally:
        process.kill()
    lines = log.read_text().splitlines()
    assert lines[-1] == (
        f"interrupted; {run_dir} keeps everything up to the end of the last complete epoch, and "
        "the same command goes on from there"
    )
    # Without a terminal the run prints the lines about the data and then one line per epoch.
    epochs = [line for line in lines[:-1] if line.startswith("epoch")]
    for number, line in enumerate(epochs, start=1):
        assert re.fullmatch(
            rf"epoch {number}/1000: loss \d\.\d{{4}}, accuracy [01]\.\d{{3}}, \d+\.\d s", line
        )
    assert epochs
    rows = (run_dir / "metrics.csv").read_text().splitlines()
    assert len(rows) - 1 in (len(epochs), len(epochs) + 1)
    assert not list(run_dir.glob(".lock"))


def test_interrupted_before_the_first_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    for error, code in ((KeyboardInterrupt, 130), (Terminated, 143)):
        with pytest.raises(SystemExit) as ended, resumable(tmp_path / "absent"):
            raise error
        assert ended.value.code == code
        assert capsys.readouterr().err == (
            "interrupted before the end of the first epoch, so nothing is kept; the same command "
            "starts again\n"
        )
    assert signal.getsignal(signal.SIGTERM) == handler


def test_ctrl_c_reaches_the_caller_and_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    uninterrupted = runner.train(config, tmp_path / "whole", progress_bar=False)
    start = CJEPAModule.on_train_batch_start

    def press_ctrl_c(module: CJEPAModule, batch: Any, batch_idx: int) -> None:
        if module.global_step == 6:
            assert signal.getsignal(signal.SIGTERM) == terminate
            signal.raise_signal(signal.SIGINT)
        start(module, batch, batch_idx)

    terminate = signal.getsignal(signal.SIGTERM)
    interrupt = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(CJEPAModule, "on_train_batch_start", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            runner.train(config, tmp_path / "run", progress_bar=False)
    # Lightning sets SIGINT to be ignored, and the runner restores the handler.
    assert signal.getsignal(signal.SIGINT) == interrupt
    resumed = runner.train(config, tmp_path / "run", progress_bar=False)
    assert (resumed.history, resumed.evaluation) == (
        uninterrupted.history,
        uninterrupted.evaluation,
    )
    resumed_weights = weights(tmp_path / "run")
    assert all(
        value.equal(resumed_weights[name]) for name, value in weights(tmp_path / "whole").items()
    )


def test_workers_end_with_an_interrupted_comparison(tmp_path: Path) -> None:
    markers = [tmp_path / name for name in ("a", "b")]

    def on_event(event: Event) -> None:
        if event.job == "b":
            wait_for(lambda: all(m.exists() and m.read_text() for m in markers))
            # A terminal sends Ctrl-C to the workers too. They ignore it, and the parent ends them.
            for marker in markers:
                os.kill(int(marker.read_text()), signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    jobs = [Job(marker.name, wait_long, (marker,)) for marker in markers]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, 2, on_event, tmp_path / "logs")
    assert all(gone(int(marker.read_text())) for marker in markers)
    assert not any(log.read_text() for log in (tmp_path / "logs").iterdir())


def test_progress_bar_fits_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None)
    frames: dict[int, list[str]] = {60: [], 80: [], 100: []}

    class Recorded(RunProgressBar):
        def on_train_batch_end(self, *args: Any, **options: Any) -> None:
            super().on_train_batch_end(*args, **options)
            for width, shown in frames.items():
                console = Console(width=width, color_system=None)
                with console.capture() as captured:
                    console.print(self.progress.get_renderable())
                shown.append(captured.get())

    monkeypatch.setattr(runner, "RunProgressBar", lambda history: Recorded(history, terminal))
    runner.train(tiny("logging.progress_bar=true"), tmp_path, epoch_lines=True)
    for width, shown in frames.items():
        assert len(shown) == 8
        for step, frame in enumerate(shown, start=1):
            (line,) = frame.splitlines()
            assert len(line.rstrip()) <= width
            assert line.startswith(f"epoch {1 if step <= 4 else 2}/2 ")
            assert f" {100 * step / 8:3.0f} % " in line
            assert "it/s" not in line
            assert bool(re.search(r"loss \d\.\d{4}, accuracy \d\.\d{3}", line)) == (step > 4)
    assert "epoch 2/2" in terminal.file.getvalue()  # type: ignore[attr-defined]
