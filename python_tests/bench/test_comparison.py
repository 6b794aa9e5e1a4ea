"""``cjepa bench``: its formulas, its measurements, the files that it writes, and its errors."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from bench_scripts import leaves, load
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from rich.console import Console
from typer.testing import CliRunner, Result

from cjepa_kernels import nt_xent, plot_style
from cjepa_kernels.bench import (
    candidates,
    cli,
    comparison,
    errors,
    formulas,
    machine,
    memory,
    plots,
    report,
    tensor_bytes,
    timing,
)
from cjepa_kernels.bench.candidates import CANDIDATES, EAGER, MM, OURS
from cjepa_kernels.bench.comparison import Comparison, Settings
from cjepa_kernels.bench.sizes import Size, views
from cjepa_kernels.cli.application import app

SIZE = Size(64, 16)
TINY = Settings(
    sizes=(Size(16, 8), Size(32, 8)),
    seconds=0.0,
    compiled=False,
    temperatures_at=Size(16, 8),
    temperatures=(0.5, 0.1),
)


@pytest.fixture
def small_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPU_EDGE", 32)
    monkeypatch.setattr(machine, "CPU_COPY", 2**16)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda name, size, **_: 8 * size.rows)


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize("name", ["eager", "lightly", "four_blocks", "hjepa", "metric_learning"])
def test_formula_makes_its_tensors_on_the_device_of_the_views(name: str) -> None:
    if name == "metric_learning":
        pytest.importorskip("pytorch_metric_learning")
    formula = candidates.find(name).make(0.2)
    z_i, z_j = leaves(7, 5)
    expected = nt_xent(z_i, z_j, temperature=0.2, backend="reference").loss
    with torch.device("cpu" if name == "metric_learning" else "meta"):
        loss = formula(z_i, z_j)
    assert relative_error(loss, expected) <= FLOOR_VALUE[torch.float64]


@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.005])
def test_exact_values_hold_at_every_temperature(temperature: float) -> None:
    z_i, z_j = leaves(20, 12)
    truth = errors.exact(z_i, z_j, torch.arange(40), temperature=temperature)
    loss = nt_xent(z_i, z_j, temperature=temperature, backend="reference").loss
    gradient = torch.cat(torch.autograd.grad(loss, (z_i, z_j)))
    assert relative_error(truth.loss, loss) <= FLOOR_VALUE[torch.float64]
    assert relative_error(truth.gradient, gradient) <= FLOOR_GRADIENT[torch.float64]


@pytest.mark.parametrize("name", ["inf_cl", "siglip_kernel"])
def test_another_loss_of_the_same_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries get the inputs that they expect: unit rows, and positives on the diagonal."""

    def cal_flash_loss(
        q: torch.Tensor, k: torch.Tensor, *, scale: torch.Tensor, head_dim: int
    ) -> torch.Tensor:
        assert q.shape[1] % head_dim == 0
        logits = scale * q @ k.T
        return logits.logsumexp(1) - logits.diagonal()

    def fused_siglip_loss(
        x: torch.Tensor, y: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        assert y.is_contiguous()
        signs = 2 * torch.eye(len(x), dtype=x.dtype) - 1
        return -F.logsigmoid(signs * (x @ y.T * log_scale.exp() + bias)).sum() / len(x)

    library = types.SimpleNamespace(
        cal_flash_loss=cal_flash_loss, fused_siglip_loss=fused_siglip_loss
    )
    monkeypatch.setattr(candidates, "require", lambda module, extra: library)
    z_i, z_j = leaves(6, 12)
    loss = CANDIDATES[name].make(0.5)(z_i, z_j)
    torch.autograd.grad(loss, (z_i, z_j))
    z = F.normalize(torch.cat([z_i, z_j]), dim=1)
    logits = z @ z.T / 0.5
    positives = torch.arange(12).roll(6)
    if name == "inf_cl":
        expected = F.cross_entropy(logits, positives)
    else:
        target = F.one_hot(positives, 12).to(logits)
        expected = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / 12
    assert relative_error(loss, expected) <= FLOOR_VALUE[torch.float64]
    assert name in candidates.on_device("cuda")
    assert name not in candidates.on_device("cpu")


@pytest.mark.parametrize(
    ("name", "degree", "rows"), [("eager", 2, 256), ("hjepa", 2, 256), ("metric_learning", 3, 96)]
)
def test_bytes_are_those_of_a_larger_size(name: str, degree: int, rows: int) -> None:
    if name == "metric_learning":
        pytest.importorskip("pytorch_metric_learning")
    formula = CANDIDATES[name].make(0.1)
    size = Size(rows, 48)
    scaled = tensor_bytes.scaled(formula, size, torch.float32, degree=degree)
    counted = tensor_bytes.count(formula, size, torch.float32)
    for estimate, exact in zip(scaled, counted, strict=True):
        assert estimate == pytest.approx(exact, rel=0.15)


@pytest.mark.skipif(not memory.supported("cpu"), reason="peak memory is measured on Linux")
def test_peak_memory_of_a_process_is_that_of_the_formula() -> None:
    size = Size(4096, 16)
    options: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "temperature": 0.1}
    extra = memory.peak_bytes(EAGER, size, **options)
    assert extra == pytest.approx(candidates.bytes_of(EAGER, size, "fp32").peak, rel=0.3)
    with pytest.raises(RuntimeError, match="KeyError: 'absent'"):
        memory.peak_bytes("absent", size, **options)


def test_cuda_calls_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("event")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    clock = timing.clock_of("cuda:0")
    assert clock(lambda: calls.append("run")) == 0.25
    assert calls == ["wait", "event", "run", "event", "wait"]


def test_cuda_memory_is_that_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 350,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    real = views
    monkeypatch.setattr(memory, "views", lambda size, device, dtype: real(size, dtype=dtype))
    extra = memory.peak_bytes(EAGER, SIZE, device="cuda", dtype="fp32", temperature=0.1)
    assert extra == 250


def test_what_does_not_fit_is_left_out_with_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, small_roofs: None, no_processes: None
) -> None:
    """With 1 MiB of free memory the plain formula fits at M = 64 but not at M = 1024."""
    monkeypatch.setattr(machine, "free_memory", lambda device: 2**20)
    sizes = (SIZE, Size(1024, 16))
    messages: list[str] = []
    settings = Settings(sizes=sizes, seconds=0.0, compiled=False, temperatures=())
    results = Comparison(settings, messages.append).run()
    linear = {
        name for name, candidate in candidates.on_device("cpu").items() if candidate.degree == 1
    }
    assert EAGER in report.by_name(results, "rows", sizes[0])
    assert report.by_name(results, "rows", sizes[1]).keys() == linear
    assert OURS in linear
    skipped = report.by_name(results, "left_out", sizes[1])
    assert skipped.keys() >= {MM, EAGER, "lightly", "hjepa"}
    assert skipped[EAGER]["needed_bytes"] > 3 * 4 * 1024**2
    assert skipped[EAGER]["reason"] == (
        "needs 0.0 GiB, and at most 80 % of the free 0.0 GiB may be taken"
    )
    assert any("plain formula is left out: needs" in line for line in messages)


def test_what_takes_long_is_called_once_and_then_not_at_all(
    monkeypatch: pytest.MonkeyPatch, no_processes: None
) -> None:
    calls: list[int] = []

    def make(temperature: float) -> Callable[..., torch.Tensor]:
        def slow(z_i: torch.Tensor, z_j: torch.Tensor) -> torch.Tensor:
            calls.append(2 * len(z_i))
            return formulas.eager(z_i, z_j, temperature=temperature)

        return slow

    slow = candidates.Candidate("eager", "slow", make)
    by_name = {OURS: CANDIDATES[OURS], EAGER: slow}
    settings = Settings(sizes=TINY.sizes, seconds=0.0, longest=1.0)
    run = Comparison(settings, lambda text: None)
    monkeypatch.setattr(
        comparison, "clock_of", lambda device: lambda call: call() and 2.0 if calls else 0.1
    )
    run.seconds[OURS] = (16, 1e-3)
    for size in (Size(16, 8), Size(64, 8)):
        run.measure(size, by_name)
    reasons = [row["reason"] for row in run.results["left_out"] if row["name"] == EAGER]
    assert reasons == ["takes 2.0 s a call", "would take about 32 s a call"]
    assert calls == [16, 16]


def test_a_failure_costs_one_candidate(no_processes: None) -> None:
    def make(temperature: float) -> Callable[..., torch.Tensor]:
        def fails(z_i: torch.Tensor, z_j: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("no more\nof this")

        return fails

    by_name = {OURS: CANDIDATES[OURS], EAGER: candidates.Candidate(EAGER, "plain formula", make)}
    run = Comparison(TINY, lambda text: None)
    run.measure(SIZE, by_name)
    assert report.by_name(run.results, "rows", SIZE).keys() == {MM, OURS}
    (failed,) = run.results["failed"]
    assert (failed["name"], failed["error"]) == (EAGER, "OutOfMemoryError: no more")


def test_the_command_writes_results_page_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_roofs: None
) -> None:
    monkeypatch.setattr(cli, "QUICK", TINY)
    out = tmp_path / "out"
    result = bench("--quick", "--sizes", "32x8,16x8", "--device", "cpu", "--out", out)
    assert result.exit_code == 0, result.output
    results = json.loads((out / "results.json").read_text())
    assert report.sizes_of(results) == [Size(16, 8), Size(32, 8)]
    expected_keys = {"device", "instruction_set", "threads", "torch", "commit", "date", "command"}
    assert {*expected_keys, "backend", "pytorch_metric_learning"} <= results["environment"].keys()
    for row in results["rows"]:
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
    assert results["roofs"].keys() == {"flops", "bandwidth"}
    measured = {row["name"] for row in results["rows"]} - {MM}
    assert measured >= {OURS, EAGER, "lightly", "hjepa"}
    assert {row["name"] for row in results["errors"]} == measured
    assert all(row["gradient"] < 1e-4 for row in results["errors"])
    swept = {(row["dtype"], row["temperature"]) for row in results["temperatures"]}
    assert swept == {(dtype, t) for dtype in ("fp32", "bf16", "fp16") for t in (0.5, 0.1)}
    if memory.supported("cpu"):
        assert {row["name"] for row in results["memory"]} == measured
    page = (out / "results.md").read_text()
    for sentence in report.verdict(results):
        assert f"- {sentence}" in page
        assert sentence in result.stdout
    for name in plots.drawable(results):
        for suffix in ("", "-dark"):
            png = (out / f"{name}{suffix}.png").read_bytes()
            assert png.startswith(b"\x89PNG")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


SIZES_EXPECTED = "expected MxD with an even M of 4 or more and a D of 2 or more"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "63x8"], f"--sizes: {SIZES_EXPECTED}, got '63x8'"),
        (["--sizes", "64"], f"--sizes: {SIZES_EXPECTED}, got '64'"),
        (["--sizes", "64x1"], f"--sizes: {SIZES_EXPECTED}, got '64x1'"),
        (["--dtype", "fp64"], "--dtype: expected one of fp32, bf16, fp16, got 'fp64'"),
        (["--temperature", "0"], "--temperature: expected a positive number, got 0"),
        (["--temperature", "nan"], "--temperature: expected a positive number, got nan"),
        (["--seconds", "-1"], "--seconds: expected 0 or more, got -1"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["--out", __file__], "--out: expected a directory to write to, got"),
    ],
    ids=["odd", "no_features", "one", "dtype", "temperature", "nan", "seconds", "device", "out"],
)
def test_bad_options_are_refused_before_any_work(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("measured"))
    result = bench("--quick", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_missing_gpu_is_named() -> None:
    result = bench("--device", "cuda")
    assert result.exit_code == 2
    assert "there is no CUDA device here" in result.stderr


def test_a_missing_library_is_left_out_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, small_roofs: None, no_processes: None
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    monkeypatch.delitem(sys.modules, "pytorch_metric_learning.losses", raising=False)
    results = Comparison(TINY, lambda text: None).run()
    (missing,) = results["missing"]
    assert missing["name"] == "metric_learning"
    assert "pip install --no-build-isolation '.[bench]'" in missing["how"]
    assert "pytorch-metric-learning is left out: " in report.markdown(results)


def test_a_stopped_run_leaves_the_sizes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_roofs: None, no_processes: None
) -> None:
    measure = Comparison.measure

    def stops(self: Comparison, size: Size, by_name: Any) -> None:
        if size.rows == 32:
            raise KeyboardInterrupt
        measure(self, size, by_name)

    monkeypatch.setattr(Comparison, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        cli.run(TINY, tmp_path, Console(quiet=True))
    results = json.loads((tmp_path / "results.json").read_text())
    assert report.sizes_of(results) == [Size(16, 8)]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md"}


def test_recording_writes_one_page_with_plots_that_follow_the_reader(
    tmp_path: Path, small_roofs: None, no_processes: None
) -> None:
    record = load("record")
    results = Comparison(TINY, lambda text: None).run()
    results["environment"] |= {"device": "AMD EPYC (TM)", "instruction_set": "avx2"}
    paths = record.record(results, tmp_path)
    assert paths[0] == tmp_path / "results" / "amd-epyc-tm-avx2.json"
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(results))
    page = paths[1].read_text()
    images = paths[2:]
    assert len(images) == len(plots.PLOTS)
    for image in images:
        svg = image.read_text()
        ElementTree.fromstring(svg)
        assert plot_style.INK not in svg
        assert "var(--ink)" in svg
        assert f"(../images/{image.name})" in page
    results["environment"]["cuda"] = "13.0"
    results["settings"]["dtype"] = "bf16"
    results["environment"]["device"] = "NVIDIA H100 80GB HBM3"
    assert record.device_name(results) == "nvidia-h100-80gb-hbm3-bf16"
