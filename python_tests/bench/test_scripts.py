"""The CPU benchmarks run, compare equal formulas, and judge targets. No test asserts a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from bench_scripts import ROOT, leaves, load, run_script
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error

from cjepa_kernels import backends, nt_xent, plot_style
from cjepa_kernels.bench import candidates, errors, formulas, records, script_options, targets
from cjepa_kernels.bench.candidates import DIRECTIONS
from cjepa_kernels.bench.sizes import Size, views
from docs import draw_results

bench, revisions = map(load, ("nt_xent", "revisions"))

needs_native = pytest.mark.skipif(
    not backends()["native"].available, reason=backends()["native"].reason
)
SIZE = Size(8192, 256)


def reference(z_i: torch.Tensor, z_j: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
    loss = nt_xent(z_i, z_j, temperature=formulas.TEMPERATURE, backend="reference").loss
    return loss, torch.autograd.grad(loss, (z_i, z_j))


def measured(part: str, direction: str, **seconds: float) -> list[dict[str, Any]]:
    """Rows of the results file at ``SIZE``, with the median seconds of each candidate."""
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
@pytest.mark.parametrize("name", ["eager", "lightly", "four_blocks", "hjepa", "metric_learning"])
def test_formula_equals_the_reference(name: str, batch: int) -> None:
    if name == "metric_learning":
        pytest.importorskip("pytorch_metric_learning")
    z_i, z_j = leaves(batch, 5)
    loss = candidates.find(name).make(formulas.TEMPERATURE)(z_i, z_j)
    gradients = torch.autograd.grad(loss, (z_i, z_j))
    expected_loss, expected = reference(z_i, z_j)
    assert relative_error(loss, expected_loss) <= FLOOR_VALUE[torch.float64]
    for actual, expected_gradient in zip(gradients, expected, strict=True):
        assert relative_error(actual, expected_gradient) <= FLOOR_GRADIENT[torch.float64]


@pytest.mark.parametrize("rows", [4, 34, 1200], ids=["tiny", "odd", "three_blocks"])
def test_exact_values_equal_the_reference(rows: int) -> None:
    z_i, z_j = (z.double().requires_grad_() for z in views(Size(rows, 6)))
    anchors = torch.randperm(rows)[: rows // 2 + 1].sort().values
    truth = errors.exact(z_i, z_j, anchors)
    loss, gradients = reference(z_i, z_j)
    assert relative_error(truth.loss, loss) <= FLOOR_VALUE[torch.float64]
    expected = torch.cat(gradients)[anchors]
    assert relative_error(truth.gradient, expected) <= FLOOR_GRADIENT[torch.float64]


def test_errors_see_a_wrong_gradient_in_a_checked_subset() -> None:
    def one_row_wrong(z_i: torch.Tensor, z_j: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = formulas.eager(z_i, z_j)
        return loss + (z_j[-1] - z_j[-1].detach()).sum()

    inputs = views(Size(40, 6))
    for anchors, seen in ((torch.tensor([0, 39]), True), (torch.tensor([0, 38]), False)):
        truth = errors.exact(*inputs, anchors)
        right = errors.of_formula(formulas.eager, inputs, truth, anchors)
        wrong = errors.of_formula(one_row_wrong, inputs, truth, anchors)
        assert max(right.values()) < 1e-5
        assert wrong["loss"] < 1e-5
        assert (wrong["gradient"] > 0.1) == seen


def test_checked_anchors_are_all_or_a_fixed_subset() -> None:
    assert torch.equal(errors.checked_anchors(10), torch.arange(10))
    subset = errors.checked_anchors(32768)
    assert len(subset.unique()) == errors.SUBSET
    assert torch.equal(subset, errors.checked_anchors(32768))


@pytest.mark.parametrize(
    ("part", "direction", "seconds", "verdict"),
    [
        ("targets", "forward", {"mm": 1.0, "native": 0.37}, "met"),
        ("targets", "forward", {"mm": 1.0, "native": 0.371}, "missed"),
        ("targets", "forward", {"mm": 1.0, bench.NO_GRAD: 0.371}, "no target"),
        ("targets", "forward+backward", {"mm": 1.0, "native": 0.42}, "met"),
        ("targets", "forward+backward", {"mm": 1.0, "native": 0.43}, "missed"),
        ("small", "forward", {"eager": 1.0, "native": 1.0}, "met"),
        ("small", "forward", {"eager": 1.0, "native": 1.01}, "missed"),
        ("speedups", "forward+backward", {"hjepa": 10.0, "native": 1.0}, "met"),
        ("speedups", "forward+backward", {"hjepa": 9.9, "native": 1.0}, "missed"),
        ("speedups", "forward+backward", {"four_blocks": 9.9, "native": 1.0}, "no target"),
        ("bf16", "forward", {"native": 1.6, "native-bf16": 1.0}, "met"),
        ("bf16", "forward", {"native": 1.5, "native-bf16": 1.0}, "missed"),
        ("sweep", "forward", {"mm": 1.0, "native": 1.0}, "no target"),
    ],
    ids=lambda value: "not met" if value == "missed" else None,
)
def test_verdict(part: str, direction: str, seconds: dict[str, float], verdict: str) -> None:
    rows = measured(part, direction, **seconds)
    (comparison,) = bench.compare(part, rows, bf16_instructions=True)
    assert comparison.verdict == comparison.record()["verdict"] == verdict


def test_bf16_has_no_target_without_its_instructions() -> None:
    rows = measured("bf16", "forward", native=1.0, **{bench.BF16: 1.0})
    (comparison,) = bench.compare("bf16", rows, bf16_instructions=False)
    assert comparison.verdict == "no target"


def test_every_target_is_measured_by_a_whole_run() -> None:
    cells = bench.plan(bench.FULL, bench.PARTS)
    timed = {(cell.part, cell.size, cell.direction) for cell in cells}
    assert {("targets", *case) for case in bench.OVER_MM} <= timed
    small = {("small", size, d) for size in bench.OVER_EAGER_AT for d in DIRECTIONS}
    assert small <= timed
    speedups = {
        (cell.size, name) for cell in cells if cell.part == "speedups" for name in cell.names
    }
    assert bench.SPEEDUPS.keys() <= speedups


def test_summary_names_what_is_not_met() -> None:
    rows = [
        *measured("targets", "forward", mm=1.0, native=0.3),
        *measured("targets", "forward+backward", mm=1.0, native=0.5),
    ]
    comparisons = bench.compare("targets", rows, bf16_instructions=False)
    lines = targets.summary(comparisons, ["M", "pass"]).splitlines()
    assert lines[0] == "2 targets: 1 met, 1 missed"
    assert lines[1] == "  missed: M 8192, pass forward+backward: 0.500, at most 0.42"


def test_a_missing_library_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    monkeypatch.delitem(sys.modules, "pytorch_metric_learning.losses", raising=False)
    names = ("eager", "metric_learning")
    cell = bench.Cell("speedups", Size(8, 4), "forward+backward", names)
    rows = bench.measure(cell, 0.0)
    assert [row["name"] for row in rows] == ["eager"]
    printed = capsys.readouterr().out
    assert "pytorch-metric-learning is left out: " in printed
    assert "the extra [bench] of cjepa_kernels" in printed


@pytest.mark.parametrize("name", [bench.BF16, bench.NO_GRAD])
def test_a_variant_of_native_that_fails_is_left_out_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_call = bench.make_call

    def fail_for_the_variant(cell: Any, candidate: str) -> Any:
        if candidate == name:
            raise RuntimeError("no such instruction")
        return make_call(cell, candidate)

    monkeypatch.setattr(bench, "make_call", fail_for_the_variant)
    cell = bench.Cell("bf16", Size(8, 4), "forward", ("eager", name))
    assert [row["name"] for row in bench.measure(cell, 0.0)] == ["eager"]
    printed = capsys.readouterr().out
    assert printed == f"{bench.VARIANTS[name]} is left out: RuntimeError: no such instruction\n"


@needs_native
def test_quick_run_prints_every_table_and_writes_nothing() -> None:
    before = {path: path.read_bytes() for path in records.RESULTS.iterdir()}
    result = run_script("bench/nt_xent.py", "--quick", "--no-save")
    assert result.returncode == 0, result.stderr
    headings = [bench.HEADINGS[part] for part in bench.PARTS]
    lines = result.stdout.splitlines()
    positions = [lines.index(heading) for heading in headings]
    assert positions == sorted(positions)
    assert " targets: " in result.stdout
    assert before == {path: path.read_bytes() for path in records.RESULTS.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64"], "an even M of 4 or more and a D of 2 or more, got '64'"),
        (["--sizes", "63x8"], "an even M of 4 or more and a D of 2 or more, got '63x8'"),
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
        bench.main()
    assert message in capsys.readouterr().err


@needs_native
def test_results_are_written_with_their_environment_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    sections = bench.run(bench.QUICK, list(bench.PARTS), 0.0, compiled=False)
    path = records.write_results("nt_xent_cpu", **sections)
    results = json.loads(path.read_text())
    expected_keys = {"device", "threads", "instruction_set", "torch", "python", "commit", "date"}
    assert expected_keys <= results["environment"].keys()
    for row in results["rows"]:
        assert {"M", "D", "pass", "name", "median", "p20", "p80", "rounds"} <= row.keys()
        assert row["over_mm"] is None or row["over_mm"] > 0
        assert row["over_eager"] is None or row["over_eager"] > 0
    assert {entry["part"] for entry in results["targets"]} == set(bench.PARTS)
    svg = plot_style.svg(lambda: draw_results.draw_nt_xent(results))
    ElementTree.fromstring(svg)
    assert plot_style.INK not in svg
    assert "var(--ink)" in svg


def test_memory_verdict() -> None:
    memory = load("nt_xent_memory")
    record = {"backend": "native", "M": 131072, "extra_bytes": 5e8, "seconds": 1.0}
    for over_input, verdict in ((4.0, "met"), (4.1, "missed")):
        assert memory.target_of({**record, "over_input": over_input}).verdict == verdict
    assert memory.target_of({**record, "M": 4096, "over_input": 1.0}).verdict == "no target"


@pytest.mark.parametrize("rows", [None, "8", "8,16"], ids=["default", "fewer", "as_the_default"])
def test_memory_is_recorded_for_the_default_rows_alone(
    rows: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = load("nt_xent_memory")

    def measure(rows: int, backend: str) -> dict[str, Any]:
        return {"backend": backend, "M": rows, "D": 4, "extra_bytes": 32, "over_input": 1.0}

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(memory, "ROWS", "8,16")
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", *([] if rows is None else ["--rows", rows])])
    memory.main()
    is_whole = rows != "8"
    assert (tmp_path / "nt_xent_memory_cpu.json").exists() == is_whole
    assert ("not written" in capsys.readouterr().out) == (not is_whole)


@pytest.mark.parametrize(
    ("arguments", "seconds", "message"),
    [(["--quick"], 0.1, "not written"), (["--no-save"], 3.0, ""), ([], 3.0, "written: ")],
    ids=["quick", "no_save", "whole"],
)
def test_only_a_whole_run_is_recorded(
    arguments: list[str],
    seconds: float,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    options = script_options.read_options(None, seconds=3.0, quick_seconds=0.1)
    assert options.seconds == seconds
    script_options.save(options, "name", [{"M": 4}])
    assert (tmp_path / "name.json").exists() == (not arguments)
    printed = capsys.readouterr().out
    assert printed.startswith(message)
    assert bool(printed) == bool(message)


def test_micro_benchmarks_run_once_without_timing() -> None:
    result = run_script("-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/test_micro.py")
    assert result.returncode == 0, result.stdout


@needs_native
def test_cjepa_loss_prints_times_and_ratios() -> None:
    result = run_script("bench/prediction_loss.py", "--quick")
    assert result.returncode == 0, result.stderr
    for text in ("prediction / byte limit, fresh gradient", "eager / native, whole", "at least 8"):
        assert text in result.stdout


@needs_native
def test_cjepa_loss_compares_equal_formulas() -> None:
    bench = load("prediction_loss")
    inputs = bench.Inputs(bench.QUICK[0])
    runs = bench.candidates(inputs)
    for part in ("prediction", "whole"):
        for ours, eager in zip(runs[part](), runs[f"eager {part}"](), strict=True):
            assert relative_error(ours, eager) <= FLOOR_GRADIENT[torch.float32]


@needs_native
def test_training_step_measures_a_step() -> None:
    worker = revisions.Worker(ROOT)
    request = {"task": "training_step", "configuration": "cjepa", "seconds": 0.1}
    try:
        measured = worker.measure(request)
    finally:
        worker.close()
    assert 0 < measured["loss"] < measured["step"]
