"""The runner of a check starts steps, limits their time, and loses nothing that they wrote."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bench_scripts import load, run_script
from processes import gone

runner, record, steps_of_check = (
    load("step_runner"),
    load("gpu_check_record"),
    load("gpu_check_steps"),
)
ROW = {"M": 64, "D": 16, "name": "cjepa_kernels", "seconds": 1.5}
WRITE = f"import step_lines; step_lines.write('compile', **{ROW})"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, 'bench'); {code}"]


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    return runner.Folder(tmp_path / "check")


def test_a_step_that_fails_hangs_or_ends_early_loses_nothing(folder: Any) -> None:
    half_a_line = "import os; open(os.environ['CJEPA_LINES'], 'a').write('{\"section\": \"comp')"
    hang = "import time; time.sleep(600)"
    environment = "import os; assert os.environ['A'] == '1'; assert os.environ['PYTHONPATH']"
    steps = [
        runner.Step("fails", python(f"{WRITE}; raise SystemExit(3)"), 60, stage="together"),
        runner.Step("hangs", python(f"{WRITE}; {hang}"), 6, stage="together"),
        runner.Step("hangs too", python(f"{WRITE}; {half_a_line}; {hang}"), 6, stage="together"),
        runner.Step("crashes", python(f"{WRITE}; os = __import__('os'); os.abort()"), 60),
        runner.Step("missing", ["/no/such/program"], 60),
        runner.Step("needs", python(""), 60, needs=("json", "no_such_module")),
        runner.Step("late", python(""), 1),
        runner.Step(
            "passes", python(f"{environment}; {WRITE}"), 60, environment={"A": "1"}, stage="last"
        ),
        runner.Step("no line", python("print('a word')"), 60, stage="last"),
    ]
    saved: list[int] = []
    start = time.monotonic()
    outcomes = runner.run_all(steps, folder, 200.0, lambda done: saved.append(len(done)))
    assert time.monotonic() - start < 40  # The hanging steps ran together.
    assert [outcome.text for outcome in outcomes] == [
        "failed (3)",
        "stopped after 6 s",
        "stopped after 6 s",
        "failed (-6)",
        "failed (No such file or directory)",
        "not run: no_such_module not installed",
        "not run: no time left",
        "passed",
        "passed",
    ]
    assert saved == [3, 4, 5, 6, 7, 9]
    content = record.merge({}, steps, outcomes, folder)
    assert content["finished"]
    assert content["compile"] == [ROW] * 5
    assert content["faults"] == [{"step": "hangs too", "line": 2, "fault": "incomplete or unknown"}]
    assert [step["outcome"] for step in content["steps"]] == [o.text for o in outcomes]
    assert folder.log("no line").read_text() == "a word\n"


def test_a_step_beyond_its_limit_is_interrupted_and_its_children_are_ended(
    folder: Any, tmp_path: Path
) -> None:
    """A test that has passed before the limit counts, and so does the reason of a failure."""
    marker, child, suite = (tmp_path / name for name in ("pid", "child.py", "test_slow.py"))
    child.write_text(
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"pathlib.Path({str(marker)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    suite.write_text(
        "import pytest, subprocess, sys, time\n"
        "def test_fast(): pass\n"
        "def test_wrong(): assert 1 == 2, 'not equal'\n"
        "def test_left_out(): pytest.skip('no device')\n"
        "def test_slow():\n"
        f"    subprocess.Popen([sys.executable, {str(child)!r}])\n"
        "    time.sleep(600)\n"
    )
    command = steps_of_check.pytest(str(suite), xdist=False)
    step = steps_of_check.step_of_tests("slow", [], 600, command=command)
    running, outcome = runner.Running(step, step.limit, folder), None
    while outcome is None:
        if marker.exists() and marker.read_text():
            running.limit = 0.0
        outcome = running.look()
        time.sleep(0.05)
    assert outcome.text == "stopped after 0 s"
    (tests,) = record.merge({}, [step], [outcome], folder)["tests"]
    assert (tests["passed"], tests["failed"], tests["skips"]) == (1, 1, {"no device": 1})
    assert tests["failures"][0]["test"].endswith("test_wrong")
    assert "not equal" in tests["failures"][0]["reason"]
    assert "1 failed, 1 passed, 1 skipped" in folder.log("slow").read_text()
    assert gone(int(marker.read_text()))


def test_a_folder_may_be_relative_and_loses_what_an_earlier_check_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CJEPA_LINES", raising=False)
    for _ in range(2):
        folder = runner.Folder(Path("relative"))
        step = runner.Step("writes", python(WRITE), 60)
        outcomes = runner.run_all([step], folder, 60.0)
        assert record.merge({}, [step], outcomes, folder)["compile"] == [ROW]
    assert (tmp_path / "relative" / "lines" / "writes.jsonl").is_file()


def test_an_exception_ends_the_running_steps(folder: Any, tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    code = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(600)"

    def interrupt(self: Any) -> None:
        if marker.exists() and marker.read_text():
            raise SystemExit(143)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.Running, "look", interrupt)
        with pytest.raises(SystemExit):
            runner.run_stage([runner.Step("long", python(code), 60)], [60.0], folder)
    assert gone(int(marker.read_text()))


def test_steps_share_one_deadline(folder: Any) -> None:
    now = 0.0
    limits: dict[str, float] = {}

    def use_whole_limits(stage: Sequence[Any], given: Sequence[float], _: Any) -> list[Any]:
        nonlocal now
        limits.update(zip((step.name for step in stage), given, strict=True))
        now += max(*given, 0.0)
        return [runner.Outcome(step.name, "stopped", 0.0) for step in stage]

    steps = [
        runner.Step(name, [], limit, reserved=reserved, stage=stage)
        for name, limit, reserved, stage in (
            ("a", 100, 0, "x"),
            ("b", 60, 0, "x"),
            ("c", 300, 0, ""),
            ("d", 200, 50, ""),
            ("e", 100, 20, ""),
        )
    ]
    runner.run_all(steps, folder, 300.0, runner=use_whole_limits, clock=lambda: now)
    assert limits == {"a": 100, "b": 60, "c": 129, "d": 50, "e": 20}


def test_pytest_runs_without_plugins_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_of_check, "installed", lambda module: module != "xdist")
    command = steps_of_check.pytest("--collect-only", "python_tests/package/test_package.py")
    assert "-n" not in command
    result = run_script("-c", f"import sys; sys.path.insert(0, 'bench'); import pytest; "
                        f"sys.exit(pytest.main({command[3:]}))")  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
