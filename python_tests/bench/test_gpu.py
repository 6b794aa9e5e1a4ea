"""Tests of the GPU benchmark on a fake device: its timers, its targets and its results file.

No test asserts a measured time.
"""

from __future__ import annotations

import importlib
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import leaves, load, run_script

from cjepa_kernels.bench import formulas, records, timing
from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.bench.targets import summary

gpu, gpu_targets = load("gpu"), load("gpu_targets")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(("script", "code"), [("bench/gpu.py", 0), ("bench/gpu_check.py", 1)])
def test_gpu_scripts_say_that_there_is_none(script: str, code: int) -> None:
    result = run_script(script)
    assert result.returncode == code, result.stderr
    assert "there is no CUDA device" in result.stdout


class FakeDevice:
    """A host and a GPU with a queue of work. Time passes only when a test launches work."""

    def __init__(self) -> None:
        # Seconds: the time of the host, and the time at which the GPU has finished its queue.
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
    """Run the GPU scripts on the CPU, with a fake device in place of the GPU."""
    device = FakeDevice()
    for name, value in {
        "Event": device.event,
        "_sleep": lambda cycles: device.launch(0.0, cycles / 2e9),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 8 * 64 * 16,
        "get_device_name": lambda: "Fake GPU",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "FLUSHED_BYTES", 8)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "BACKEND", "chunked")
    monkeypatch.setattr(gpu, "graphed", lambda build: build)
    monkeypatch.setattr(gpu, "SECONDS", 0.0)
    return device


@pytest.fixture
def few_sizes() -> Any:
    """Small sizes for every part of the GPU benchmark."""
    size = Size(16, 8)
    return gpu_targets.Sizes(
        targets=(size, Size(32, 8)),
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
    def launch_kernels(launches: int) -> None:
        for _ in range(launches):
            fake_device.launch(50e-6, 10e-6)

    def launch_and_wait() -> None:
        launch_kernels(10)
        fake_device.host = fake_device.free

    idle, busy = timing.IdleDevice(), timing.BusyDevice("cpu")
    assert idle(lambda: launch_kernels(10)) == pytest.approx(510e-6)
    assert busy(lambda: launch_kernels(100)) == pytest.approx(1001e-6)
    assert busy.cycles > timing.SHORTEST_WAIT
    assert busy.of == "device"
    busy(launch_and_wait)
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
    times, errors = timing.interleaved_on_gpu(
        builds, seconds=0.0, clock=lambda: timing.BusyDevice("cpu")
    )
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
    """Results in which the loss under test takes ``ours`` seconds and each baseline 1 to 10 s."""
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
    judged = gpu_targets.judge(fake_results(sizes, ours), sizes)
    records = gpu_targets.as_records(judged)
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
    assert summary(judged, gpu_targets.COLUMNS).startswith(f"{len(records)} targets: ")


def test_gpu_targets_of_the_record_have_the_same_verdicts() -> None:
    (path,) = records.RESULTS.glob("NVIDIA-*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    judged = gpu_targets.judge(content, gpu_targets.FULL)
    assert gpu_targets.as_records(judged) == content["targets"]


def test_gpu_targets_without_a_value_say_why() -> None:
    sizes = gpu_targets.FULL
    results = {name: [] for name in gpu.SECTIONS}
    assert {target.verdict for target in gpu_targets.judge(results, sizes)} == {"not run"}
    results["failed"] = [{"part": "memory", "M": 2**21, "D": 256, "name": "", "error": "OOM"}]
    results["memory"] = [{"M": 2**20, "D": 256, "over_input": 3.0}]
    judged = gpu_targets.judge(results, sizes)
    rows, extra = (target for target in judged if target.cell["part"] == "memory")
    assert (rows.value, rows.verdict) == (2**20, "missed")
    assert (extra.value, extra.verdict) == (None, "failed")


def test_gpu_benchmark_writes_json(
    fake_device: FakeDevice,
    few_sizes: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
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
    assert content["gpu"][0]["device"] == "Fake GPU"
    verdicts = {record["target"]: record["verdict"] for record in content["targets"]}
    assert verdicts["forward+backward / three products"] in ("met", "missed")
    assert verdicts["inf_cl / forward+backward"] == "not installed"
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    assert "not installed: inf_cl" in capsys.readouterr().out


def test_gpu_inf_cl_has_the_same_loss(
    fake_device: FakeDevice,
    few_sizes: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cal_flash_loss(q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        logits = scale * q @ k.T
        return logits.logsumexp(1) - logits.diagonal()  # (M,), as Inf-CL returns it

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
    monkeypatch.setattr(records, "RESULTS", tmp_path)

    def fake_targets(self: Any, size: Any, direction: str) -> None:
        if size.rows == 16:
            raise error
        row = {"part": "targets", "M": size.rows, "D": size.features, "pass": direction}
        times = {"name": "mm", "of": "device", "median": 1.0, "p20": 1.0, "p80": 1.0, "rounds": 5}
        self.results["rows"].append({**row, **times})

    monkeypatch.setattr(gpu.Benchmark, "targets", fake_targets)
    monkeypatch.setattr(gpu.Benchmark, "first_use", lambda self: None)
    assert gpu.run(few_sizes, "gpu") == 1
    content = json.loads((tmp_path / "gpu.json").read_text())
    rows = content["rows"]
    assert {row["M"] for row in rows if row["part"] == "targets"} == measured
    assert ("latency" in {row["part"] for row in rows}) == bool(measured)
    assert {(record["part"], record["M"]) for record in content["failed"]} == {("targets", 16)}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("failed: targets M=16 D=8: ")
