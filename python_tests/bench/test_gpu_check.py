"""``make gpu-check`` starts its steps, limits their time, and stops them with their children."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import load, run_script

gpu_check = load("gpu_check")


def ended(process: int) -> bool:
    """Whether a process has ended. A zombie counts as ended: only its exit code is left."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    return state.rsplit(")", 1)[1].split()[0] == "Z"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_gpu_check_goes_on_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    check_variables = (
        "import os; assert os.environ['A'] == '1'; assert 'elsewhere' in os.environ['{}']"
    )
    steps = [
        gpu_check.Step("fails", python("raise SystemExit(3)"), 60),
        gpu_check.Step("missing", ["/no/such/program"], 60),
        gpu_check.Step("needs", python(""), 60, needs=("json", "no_such_module")),
        gpu_check.Step("late", python(""), 1),
        gpu_check.Step(
            "passes",
            python(check_variables.format("PYTHONPATH")),
            60,
            environment={"A": "1", "PYTHONPATH": "elsewhere"},
        ),
    ]
    outcomes = [outcome for _, outcome, _ in gpu_check.run_all(steps)]
    assert outcomes == [
        "failed (3)",
        "failed (No such file or directory)",
        "not run: no_such_module not installed",
        "not run: no time left",
        "passed",
    ]


def test_gpu_check_shares_one_deadline() -> None:
    now = 0.0
    limits = {}

    def use_whole_limit(step: Any, limit: float) -> tuple[str, float]:
        nonlocal now
        limits[step.name] = limit
        now += max(limit, 0.0)
        return "stopped", limit

    steps = [
        gpu_check.Step(name, [], limit, reserved)
        for name, limit, reserved in (("a", 100, 0), ("b", 300, 0), ("c", 200, 50), ("d", 100, 20))
    ]
    gpu_check.run_all(steps, 300.0, use_whole_limit, lambda: now)
    grace = gpu_check.GRACE
    assert limits == {"a": 100, "b": 130 - grace, "c": 50, "d": 20}


def test_gpu_check_leaves_the_benchmark_its_time() -> None:
    steps = {step.name: step for step in gpu_check.steps()}
    assert steps["benchmark"].reserved >= 120
    assert sum(step.reserved for step in steps.values()) + gpu_check.GRACE < gpu_check.TOTAL / 2
    assert all(
        Path(argument).exists()
        for step in steps.values()
        for argument in step.command
        if argument.endswith(".py")
    )


def test_gpu_check_interrupts_a_step_and_ends_its_children(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "SHORTEST", 0.0)
    suite = tmp_path / "test_slow.py"
    suite.write_text(
        "import pathlib, signal, subprocess, sys, time\n"
        "def test_fast(): pass\n"
        "def test_slow():\n"
        "    code = 'import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)'\n"
        "    child = subprocess.Popen([sys.executable, '-c', code])\n"
        f"    pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    outcome, _ = gpu_check.run(gpu_check.Step("slow", command, 60), 8.0)
    assert outcome == "stopped after 8 s"
    assert "1 passed" in capfd.readouterr().out
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if ended(child):
            break
        time.sleep(0.1)
    assert ended(child)


def test_gpu_check_runs_pytest_without_its_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "installed", lambda module: module != "xdist")
    command = gpu_check.pytest("--collect-only", "python_tests/package/test_package.py")
    assert "-n" not in command
    result = run_script(*command[1:])
    assert result.returncode == 0, result.stdout + result.stderr
    names = [step.name for step in gpu_check.steps()]
    assert names.index("parity") < names.index("kernels")
    assert names.index("kernels") < names.index("benchmark")


@pytest.mark.parametrize(
    ("managed", "virtual", "breaks"), [(True, False, True), (True, True, False), (False,) * 3]
)
def test_gpu_check_overrides_a_managed_environment_alone(
    managed: bool, virtual: bool, breaks: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if managed:
        (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(gpu_check.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", "elsewhere" if virtual else sys.prefix)
    assert ("--break-system-packages" in gpu_check.pip_install()) == breaks


def test_gpu_scripts_need_no_other_library() -> None:
    """The scripts need only PyTorch, Triton, pytest and hypothesis."""
    missing = ("matplotlib", "rich", "typer", "lightning", "torchvision", "pandas", "sklearn")
    block_imports = (
        f"import sys; sys.modules |= dict.fromkeys({missing}); sys.path.insert(0, 'bench')"
    )
    result = run_script("-c", f"{block_imports}; import gpu, gpu_check")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", ["gpu.py", "gpu_check.py", "gpu_machine_code.py"])
def test_gpu_scripts_show_their_options(script: str) -> None:
    if script == "gpu_machine_code.py":
        pytest.importorskip("triton")
    result = run_script(f"bench/{script}", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {script}")


def test_gpu_check_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake GPU")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    for outcome, code in (("passed", 0), ("not run: no time left", 1)):
        outcomes = [("build", "passed", 1.0), ("benchmark", outcome, 1.0)]
        monkeypatch.setattr(gpu_check, "run_all", lambda steps, outcomes=outcomes: outcomes)
        assert gpu_check.main() == code
