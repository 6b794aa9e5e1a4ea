"""The benchmarks run, compare equal formulas, and judge targets rightly. No time is asserted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error

from cjepa_kernels import backends, nt_xent

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
# Any: the scripts of bench/ are not part of the package.
accuracy, formulas, measurement, plan, plot, targets = (
    importlib.import_module(name)
    for name in ("accuracy", "formulas", "measurement", "plan", "plot", "targets")
)
nt_xent_bench: Any = importlib.import_module("nt_xent")
gpu, gpu_check, gpu_targets, gpu_timing = (
    importlib.import_module(name) for name in ("gpu", "gpu_check", "gpu_targets", "gpu_timing")
)

needs_native = pytest.mark.skipif(
    not backends()["native"].available, reason=backends()["native"].reason
)
SIZE = plan.Size(8192, 256)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


def leaves(batch: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    z_i, noise = torch.randn(2, batch, features, dtype=torch.float64)
    return z_i.clone().requires_grad_(), (z_i + noise).requires_grad_()


def reference(z_i: torch.Tensor, z_j: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
    loss = nt_xent(z_i, z_j, temperature=formulas.TEMPERATURE, backend="reference").loss
    return loss, torch.autograd.grad(loss, (z_i, z_j))


def measured(part: str, direction: str, **seconds: float) -> list[dict[str, Any]]:
    """Rows of the results file for one cell at ``SIZE``."""
    return [
        {
            "part": part,
            "M": SIZE.rows,
            "D": SIZE.features,
            "pass": direction,
            "name": name,
            "median": median,
        }
        for name, median in seconds.items()
    ]


@pytest.mark.parametrize("batch", [2, 7, 33])
@pytest.mark.parametrize("name", [*formulas.FORMULAS, "metric_learning"])
def test_formula_equals_the_reference(name: str, batch: int) -> None:
    if name == "metric_learning":
        pytest.importorskip("pytorch_metric_learning")
    z_i, z_j = leaves(batch, 5)
    loss = plan.find_formula(name, (z_i, z_j))(z_i, z_j)
    gradients = torch.autograd.grad(loss, (z_i, z_j))
    expected_loss, expected = reference(z_i, z_j)
    assert relative_error(loss, expected_loss) <= FLOOR_VALUE[torch.float64]
    for actual, wanted in zip(gradients, expected, strict=True):
        assert relative_error(actual, wanted) <= FLOOR_GRADIENT[torch.float64]


@pytest.mark.parametrize("rows", [4, 34, 1200], ids=["tiny", "odd", "three_blocks"])
def test_exact_values_equal_the_reference(rows: int) -> None:
    z_i, z_j = (z.double().requires_grad_() for z in plan.views(plan.Size(rows, 6)))
    anchors = torch.randperm(rows)[: rows // 2 + 1].sort().values
    truth = accuracy.exact(z_i, z_j, anchors)
    loss, gradients = reference(z_i, z_j)
    assert relative_error(truth.loss, loss) <= FLOOR_VALUE[torch.float64]
    expected = torch.cat(gradients)[anchors]
    assert relative_error(truth.gradient, expected) <= FLOOR_GRADIENT[torch.float64]


def test_errors_see_a_wrong_gradient_in_a_checked_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_row_wrong(z_i: torch.Tensor, z_j: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = formulas.eager(z_i, z_j)
        return loss + (z_j[-1] - z_j[-1].detach()).sum()

    monkeypatch.setitem(formulas.FORMULAS, "wrong", one_row_wrong)
    monkeypatch.setattr(accuracy, "LARGEST_COMPLETE", 8)
    monkeypatch.setattr(accuracy, "checked_anchors", lambda rows: torch.tensor([0, rows - 1]))
    right, wrong = accuracy.measure_errors(plan.Size(40, 6), "fp32", ("eager", "wrong"))
    assert right["rows_checked"] == 2
    assert max(right[quantity] for quantity in accuracy.QUANTITIES) < 1e-5
    assert wrong["loss"] < 1e-5
    assert wrong["grad_z_i"] < 1e-5
    assert wrong["grad_z_j"] > 0.1


def test_checked_anchors_are_all_or_a_fixed_subset() -> None:
    assert torch.equal(accuracy.checked_anchors(10), torch.arange(10))
    subset = accuracy.checked_anchors(32768)
    assert len(subset.unique()) == accuracy.SUBSET
    assert torch.equal(subset, accuracy.checked_anchors(32768))


@pytest.mark.parametrize(
    ("part", "direction", "seconds", "verdict"),
    [
        ("targets", "forward", {"mm": 1.0, "native": 0.37}, "met"),
        ("targets", "forward", {"mm": 1.0, "native": 0.371}, "not met"),
        ("targets", "forward", {"mm": 1.0, plan.NO_GRAD: 0.371}, "no target"),
        ("targets", "forward+backward", {"mm": 1.0, "native": 0.42}, "met"),
        ("targets", "forward+backward", {"mm": 1.0, "native": 0.43}, "not met"),
        ("small", "forward", {"eager": 1.0, "native": 1.0}, "met"),
        ("small", "forward", {"eager": 1.0, "native": 1.01}, "not met"),
        ("speedups", "forward+backward", {"hjepa": 10.0, "native": 1.0}, "met"),
        ("speedups", "forward+backward", {"hjepa": 9.9, "native": 1.0}, "not met"),
        ("speedups", "forward+backward", {"four_blocks": 9.9, "native": 1.0}, "no target"),
        ("bf16", "forward", {"native": 1.6, "native-bf16": 1.0}, "met"),
        ("bf16", "forward", {"native": 1.5, "native-bf16": 1.0}, "not met"),
        ("sweep", "forward", {"mm": 1.0, "native": 1.0}, "no target"),
    ],
)
def test_verdict(part: str, direction: str, seconds: dict[str, float], verdict: str) -> None:
    rows = measured(part, direction, **seconds)
    (comparison,) = targets.compare(part, rows, bf16_instructions=True)
    assert comparison.verdict == verdict
    assert comparison.cells()[-1] == verdict
    assert comparison.record()["verdict"] == verdict


def test_bf16_has_no_target_without_its_instructions() -> None:
    rows = measured("bf16", "forward", native=1.0, **{plan.BF16: 1.0})
    (comparison,) = targets.compare("bf16", rows, bf16_instructions=False)
    assert comparison.verdict == "no target"


def test_every_target_is_measured_by_a_whole_run() -> None:
    cells = plan.plan(plan.FULL, plan.PARTS)
    timed = {(cell.part, cell.size, cell.direction) for cell in cells}
    assert {("targets", *case) for case in targets.OVER_MM} <= timed
    assert {("small", size, d) for size in targets.OVER_EAGER_AT for d in plan.DIRECTIONS} <= timed
    speedups = {
        (cell.size, name) for cell in cells if cell.part == "speedups" for name in cell.names
    }
    assert targets.SPEEDUPS.keys() <= speedups


def test_summary_names_what_is_not_met() -> None:
    rows = [
        *measured("targets", "forward", mm=1.0, native=0.3),
        *measured("targets", "forward+backward", mm=1.0, native=0.5),
    ]
    comparisons = targets.compare("targets", rows, bf16_instructions=False)
    lines = nt_xent_bench.summary([entry.record() for entry in comparisons]).splitlines()
    assert lines[0] == "1 of 2 targets met"
    assert "native / mm at M=8192 D=256 forward+backward: 0.500, at most 0.42" in lines[1]


def test_a_missing_library_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    monkeypatch.delitem(sys.modules, "pytorch_metric_learning.losses", raising=False)
    names = ("eager", "metric_learning")
    cell = plan.Cell("speedups", plan.Size(8, 4), "forward+backward", names)
    rows = nt_xent_bench.measure(cell, 0.0)
    assert [row["name"] for row in rows] == ["eager"]
    printed = capsys.readouterr().out
    assert "pytorch-metric-learning is left out: " in printed
    assert "cjepa_kernels[bench]" in printed


@needs_native
def test_quick_run_prints_every_table_and_writes_nothing() -> None:
    before = {path: path.read_bytes() for path in measurement.RESULTS.iterdir()}
    result = run_script("bench/nt_xent.py", "--quick", "--no-save")
    assert result.returncode == 0, result.stderr
    headings = [nt_xent_bench.HEADINGS[part] for part in plan.PARTS]
    lines = result.stdout.splitlines()
    positions = [lines.index(heading) for heading in headings]
    assert positions == sorted(positions)
    assert "targets met" in result.stdout
    assert before == {path: path.read_bytes() for path in measurement.RESULTS.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64"], "expected MxD with an even M, got '64'"),
        (["--sizes", "63x8"], "expected MxD with an even M, got '63x8'"),
        (["--only", "targets,all"], "expected parts of targets"),
    ],
    ids=["no_features", "odd", "part"],
)
def test_bad_options_are_refused(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["nt_xent.py", *arguments])
    with pytest.raises(SystemExit):
        nt_xent_bench.main()
    assert message in capsys.readouterr().err


@needs_native
def test_results_are_written_with_their_environment_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "RESULTS", tmp_path)
    sections = nt_xent_bench.run(plan.QUICK, list(plan.PARTS), 0.0, compiled=False)
    path = measurement.write_results("nt_xent_cpu", **sections)
    results = json.loads(path.read_text())
    known = {"device", "threads", "instruction_set", "torch", "python", "commit", "date"}
    assert known <= results["environment"].keys()
    for row in results["rows"]:
        assert {"M", "D", "pass", "name", "median", "p20", "p80", "rounds"} <= row.keys()
        assert row["over_mm"] is None or row["over_mm"] > 0
        assert row["over_eager"] is None or row["over_eager"] > 0
    assert {entry["part"] for entry in results["targets"]} == set(plan.PARTS) - {"accuracy"}
    assert {record["dtype"] for record in results["accuracy"]} == {"fp32", "bf16"}
    svg = plot.draw(results)
    ElementTree.fromstring(svg)
    assert plot.INK not in svg
    assert "var(--ink)" in svg


def test_memory_verdict() -> None:
    memory = importlib.import_module("nt_xent_memory")
    record = {"backend": "native", "M": 131072, "extra_bytes": 5e8, "seconds": 1.0}
    for over_input, verdict in ((4.0, "met"), (4.1, "not met")):
        assert verdict in memory.table_row({**record, "over_input": over_input})
    assert "met" not in memory.table_row({**record, "M": 4096, "over_input": 1.0})


def test_micro_benchmarks_run_once_without_timing() -> None:
    result = run_script("-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/test_micro.py")
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(("script", "code"), [("bench/gpu.py", 0), ("bench/gpu_check.py", 1)])
def test_gpu_scripts_say_that_there_is_none(script: str, code: int) -> None:
    result = run_script(script)
    assert result.returncode == code, result.stderr
    assert "there is no CUDA device" in result.stdout


class FakeDevice:
    """A host and a device with a queue, in seconds of no real clock."""

    def __init__(self) -> None:
        self.host = self.free = 0.0

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.free = max(self.free, self.host) + device

    def event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def record(self) -> None:
        self.device.launch(0.0, 1e-6)
        self.at = self.device.free

    def query(self) -> bool:
        return self.device.host >= self.at

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """The GPU scripts on the CPU: their calls of the device go to a fake."""
    device = FakeDevice()
    for name, value in {
        "Event": device.event,
        "_sleep": lambda cycles: device.launch(0.0, cycles / 2e9),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 8 * 64 * 16,
        "get_device_name": lambda: "Fake GPU",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_timing, "FLUSH", 8)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "BACKEND", "chunked")
    monkeypatch.setattr(gpu, "graphed", lambda build: build)
    monkeypatch.setattr(gpu, "SECONDS", 0.0)
    return device


@pytest.fixture
def few_sizes() -> Any:
    """All parts of the GPU benchmark, as small as they get."""
    size = plan.Size(16, 8)
    return gpu_targets.Sizes(
        targets=(size, plan.Size(32, 8)),
        compiled=(),
        latency=(size,),
        memory=(size,),
        accuracy=size,
        fp32=size,
        inf_cl=size,
        first_use=size,
        prediction=size,
        product=16,
    )


def test_gpu_clocks_tell_the_device_from_the_host(fake_device: FakeDevice) -> None:
    def run(launches: int) -> None:
        for _ in range(launches):
            fake_device.launch(50e-6, 10e-6)

    def waits() -> None:
        run(10)
        fake_device.host = fake_device.free

    idle, busy = gpu_timing.IdleDevice(), gpu_timing.BusyDevice()
    assert idle(lambda: run(10)) == pytest.approx(510e-6)
    assert busy(lambda: run(100)) == pytest.approx(1001e-6)
    assert busy.cycles > gpu_timing.SHORTEST_WAIT
    assert busy.of == "device"
    busy(waits)
    assert busy.of == "device and host"


def test_gpu_candidates_fail_alone(fake_device: FakeDevice) -> None:
    calls = iter(range(100))

    def fails_later() -> None:
        if next(calls) > 4:
            raise RuntimeError("no more\nof this")

    def fails_at_once() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    builds = {
        "works": lambda: lambda: fake_device.launch(0.0, 1e-3),
        "build": fails_at_once,
        "call": lambda: fails_later,
    }
    times, errors = gpu_timing.in_turn(builds, seconds=0.0)
    assert list(times) == ["works"]
    assert times["works"]["median"] == pytest.approx(1.001e-3)
    assert times["works"]["rounds"] == 5
    assert errors == {
        "build": "OutOfMemoryError: CUDA out of memory.",
        "call": "RuntimeError: no more",
    }


def test_gpu_eager_is_the_formula() -> None:
    z_i, z_j = leaves(7, 5)
    assert torch.equal(gpu.eager(z_i, z_j), formulas.eager(z_i, z_j))


def fake_results(sizes: Any, ours: float) -> dict[str, list[dict[str, Any]]]:
    """Results in which everything takes 1 s, but for the loss under test and its baselines."""
    both, forward = gpu_targets.BOTH, gpu_targets.FORWARD
    others = {gpu_targets.MM: 1.0, gpu_targets.MM3: 3.0, gpu_targets.EAGER: 2.0}
    others[gpu_targets.BYTES] = 1.0
    others |= dict.fromkeys((gpu_targets.AUTOCAST, gpu_targets.COMPILED), 10.0)
    cells = [
        *(("targets", size, direction) for size in sizes.targets for direction in (forward, both)),
        *(("compiled", size, both) for size in sizes.compiled),
        *((part, size, both) for part in ("latency", "latency_graphed") for size in sizes.latency),
        ("prediction", sizes.prediction, both),
    ]
    rows = [
        {"part": part, "M": m, "D": d, "pass": direction, "name": name, "median": seconds}
        for part, (m, d), direction in cells
        for name, seconds in {gpu_targets.OURS: ours, **others}.items()
    ]
    return {
        "rows": rows,
        "matmul": [{"size": 8192, "flops": 2 * 65536**2 * 256 / 0.6}],
        "memory": [{"M": m, "D": 256, "over_input": 3.5} for m in (2**20, 2**21)],
        "first_use": [{"seconds": 12.0}],
        "missing": [{"part": "inf_cl", "how": "pip install inf-cl"}],
        "failed": [],
    }


@pytest.mark.parametrize(
    ("ours", "verdict", "utilisation"), [(0.5, "met", 1.2), (2.75, "missed", 0.6 / 2.75)]
)
def test_gpu_targets_are_all_judged(ours: float, verdict: str, utilisation: float) -> None:
    sizes = gpu_targets.FULL
    records = gpu_targets.judge(fake_results(sizes, ours), sizes)
    ratios = 3 * len(sizes.targets) + len(sizes.compiled) + 2 * len(sizes.latency)
    assert len(records) == ratios + 6
    by_part = {part: [r for r in records if r["part"] == part] for part in ("memory", "first_use")}
    assert [r["value"] for r in by_part["memory"]] == [2**21, 3.5]
    assert [r["value"] for r in by_part["first_use"]] == [12.0]
    assert {r["verdict"] for part in by_part.values() for r in part} == {"met"}
    assert [r["verdict"] for r in records if r["part"] == "inf_cl"] == ["not installed"]
    (peak,) = [r for r in records if r["target"].startswith("FLOP/s")]
    assert peak["value"] == pytest.approx(utilisation)
    timed = [r for r in records if r["part"] not in (*by_part, "inf_cl")]
    assert {r["verdict"] for r in timed} == {verdict}
    lines = gpu_targets.table(records)
    assert all(len(line) == len(gpu_targets.HEADER) for line in lines)
    assert gpu_targets.summary(records).startswith(f"{len(records)} targets: ")


def test_gpu_targets_without_a_value_say_why() -> None:
    sizes = gpu_targets.FULL
    results = {name: [] for name in gpu.SECTIONS}
    records = gpu_targets.judge(results, sizes)
    assert {r["verdict"] for r in records} == {"not run"}
    results["failed"] = [{"part": "memory", "M": 2**21, "D": 256, "name": "", "error": "OOM"}]
    results["memory"] = [{"M": 2**20, "D": 256, "over_input": 3.0}]
    rows, extra = (r for r in gpu_targets.judge(results, sizes) if r["part"] == "memory")
    assert (rows["value"], rows["verdict"]) == (2**20, "missed")
    assert (extra["value"], extra["verdict"]) == (None, "failed")


def test_gpu_benchmark_writes_json_and_page(
    fake_device: FakeDevice,
    few_sizes: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measurement, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu.Benchmark, "first_use", lambda self: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.run(few_sizes, "gpu") == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["part"] for row in content["rows"]} == {
        "matmul",
        "targets",
        "latency",
        "latency_graphed",
        "prediction",
        "fp32",
        "tf32",
    }
    assert [record["dtype"] for record in content["accuracy"][::2]] == [
        "bfloat16",
        "float16",
        "float32",
    ]
    assert all(record["gradient"] < 0.1 for record in content["accuracy"])
    assert content["memory"][0]["over_input"] == pytest.approx(31.0)
    assert content["failed"] == []
    page = (tmp_path / "gpu.md").read_text()
    for expected in ("# Fake GPU, ", "commit ", "Triton ", "three products", "not installed"):
        assert expected in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    assert "not installed: inf_cl" in capsys.readouterr().out


def test_gpu_inf_cl_has_the_same_loss(
    fake_device: FakeDevice,
    few_sizes: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cal_flash_loss(q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        logits = scale * q @ k.T
        return logits.logsumexp(1) - logits.diagonal()  # (M,), as Inf-CL's

    flash = types.SimpleNamespace(cal_flash_loss=cal_flash_loss)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu, "require", lambda module, extra: flash)
    benchmark = gpu.Benchmark(few_sizes)
    benchmark.inf_cl()
    assert [row["name"] for row in benchmark.results["rows"]] == [gpu_targets.OURS, "inf_cl"]
    assert benchmark.results["failed"] == []
    losses = capsys.readouterr().out.splitlines()[0].split()
    assert float(losses[2]) == pytest.approx(float(losses[4]), abs=2e-6)


@pytest.mark.parametrize(
    ("error", "measured"),
    [(torch.OutOfMemoryError("CUDA out of memory."), {32}), (KeyboardInterrupt(), set())],
    ids=["failed", "stopped"],
)
def test_gpu_benchmark_fails_by_size(
    error: BaseException,
    measured: set[int],
    fake_device: FakeDevice,
    few_sizes: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measurement, "RESULTS", tmp_path)

    def targets(self: Any, size: Any, direction: str) -> None:
        if size.rows == 16:
            raise error
        row = {"part": "targets", "M": size.rows, "D": size.features, "pass": direction}
        times = {"name": "mm", "of": "device", "median": 1.0, "p20": 1.0, "p80": 1.0, "rounds": 5}
        self.results["rows"].append({**row, **times})

    monkeypatch.setattr(gpu.Benchmark, "targets", targets)
    monkeypatch.setattr(gpu.Benchmark, "first_use", lambda self: None)
    assert gpu.run(few_sizes, "gpu") == 1
    content = json.loads((tmp_path / "gpu.json").read_text())
    rows = content["rows"]
    assert {row["M"] for row in rows if row["part"] == "targets"} == measured
    assert ("latency" in {row["part"] for row in rows}) == bool(measured)
    assert {(record["part"], record["M"]) for record in content["failed"]} == {("targets", 16)}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("failed: targets M=16 D=8: ")
    assert "## Failed" in (tmp_path / "gpu.md").read_text()


def ended(process: int) -> bool:
    """Whether a process is gone, or nothing of it is left but its exit code."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    return state.rsplit(")", 1)[1].split()[0] == "Z"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_gpu_check_goes_on_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    at_hand = "import os; assert os.environ['A'] == '1'; assert 'elsewhere' in os.environ['{}']"
    steps = [
        gpu_check.Step("fails", python("raise SystemExit(3)"), 60),
        gpu_check.Step("missing", ["/no/such/program"], 60),
        gpu_check.Step("needs", python(""), 60, needs=("json", "no_such_module")),
        gpu_check.Step("late", python(""), 1),
        gpu_check.Step(
            "passes",
            python(at_hand.format("PYTHONPATH")),
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
    given = {}

    def takes_all(step: Any, limit: float) -> tuple[str, float]:
        nonlocal now
        given[step.name] = limit
        now += max(limit, 0.0)
        return "stopped", limit

    steps = [
        gpu_check.Step(name, [], limit, kept)
        for name, limit, kept in (("a", 100, 0), ("b", 300, 0), ("c", 200, 50), ("d", 100, 20))
    ]
    gpu_check.run_all(steps, 300.0, takes_all, lambda: now)
    grace = gpu_check.GRACE
    assert given == {"a": 100, "b": 130 - grace, "c": 50, "d": 20}


def test_gpu_check_leaves_the_benchmark_its_time() -> None:
    steps = {step.name: step for step in gpu_check.steps()}
    assert steps["benchmark"].kept >= 120
    assert sum(step.kept for step in steps.values()) + gpu_check.GRACE < gpu_check.TOTAL / 2
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
        "    deaf = 'import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)'\n"
        "    child = subprocess.Popen([sys.executable, '-c', deaf])\n"
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
    command = gpu_check.pytest("--collect-only", "python_tests/test_package.py")
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


def test_gpu_check_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake GPU")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    for outcome, code in (("passed", 0), ("not run: no time left", 1)):
        outcomes = [("build", "passed", 1.0), ("benchmark", outcome, 1.0)]
        monkeypatch.setattr(gpu_check, "run_all", lambda steps, outcomes=outcomes: outcomes)
        assert gpu_check.main() == code


@needs_native
def test_cjepa_loss_prints_times_and_ratios() -> None:
    result = run_script("bench/cjepa_loss.py", "--quick")
    assert result.returncode == 0, result.stderr
    for text in ("prediction / byte limit, fresh gradient", "eager / native, whole", "at least 8"):
        assert text in result.stdout


@needs_native
def test_cjepa_loss_compares_equal_formulas() -> None:
    bench = importlib.import_module("cjepa_loss")
    inputs = bench.Inputs(bench.QUICK[0])
    runs = bench.candidates(inputs)
    for part in ("prediction", "whole"):
        for ours, eager in zip(runs[part](), runs[f"eager {part}"](), strict=True):
            assert relative_error(ours, eager) <= FLOOR_GRADIENT[torch.float32]


def test_training_step_measures_a_step() -> None:
    result = run_script("bench/training_step.py", "--one", "cjepa,0.1")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert 0 < measured["loss"] < measured["step"]
