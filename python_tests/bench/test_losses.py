"""The losses beside NT-Xent: their formulas, their benchmark, and its targets. No test asserts a
time."""

from __future__ import annotations

import argparse
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import leaves, load
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor
from typer.testing import CliRunner

from cjepa_kernels import backends, info_nce, nt_xent, sup_con
from cjepa_kernels.bench import (
    candidates,
    cli,
    loss_comparison,
    losses,
    memory,
    records,
    script_options,
)
from cjepa_kernels.bench.candidates import Candidate
from cjepa_kernels.bench.losses import COMPARED, LOSSES, classes, classes_of_rows
from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.cli.application import app
from docs import generate_figures

bench, memories, measure = map(load, ("losses", "losses_memory", "gpu_measure"))

needs_native = pytest.mark.skipif(
    not backends()["native"].available, reason=backends()["native"].reason
)
TEMPERATURE = 0.1


def reference(name: str, z_i: Tensor, z_j: Tensor) -> Tensor:
    """The loss by the reference back end."""
    options: dict[str, Any] = {"temperature": TEMPERATURE, "backend": "reference"}
    if name in ("info_nce", "clip"):
        return info_nce(z_i, z_j, symmetric=name == "clip", **options).loss
    if name == "sup_con":
        return sup_con(torch.cat([z_i, z_j]), classes_of_rows(z_i), **options).loss
    if name == "labels":
        options["labels"] = classes(len(z_i), z_i.device)
    return nt_xent(z_i, z_j, decoupled=name == "decoupled", **options).loss


CASES = [
    pytest.param(name, candidate, id=f"{name}-{candidate.name}")
    for name, loss in LOSSES.items()
    for candidate in loss.candidates().values()
    if candidate.name != candidates.OURS
]


@pytest.mark.parametrize("batch", [2, 7, 150])
@pytest.mark.parametrize(("name", "candidate"), CASES)
def test_formula_equals_the_reference(name: str, candidate: Candidate, batch: int) -> None:
    if candidate.name.startswith("metric_learning"):
        pytest.importorskip("pytorch_metric_learning", reason="compares with the library itself")
    z_i, z_j = leaves(batch, 5)
    loss = candidate.make(TEMPERATURE)(z_i, z_j)
    expected_loss = reference(name, z_i, z_j)
    assert relative_error(loss, expected_loss) <= FLOOR_VALUE[torch.float64]
    pairs = zip(
        torch.autograd.grad(loss, (z_i, z_j)),
        torch.autograd.grad(expected_loss, (z_i, z_j)),
        strict=True,
    )
    for actual, expected in pairs:
        assert relative_error(actual, expected) <= FLOOR_GRADIENT[torch.float64]


def test_classes_are_fixed_and_as_many_as_asked_for() -> None:
    drawn = classes(4096, torch.device("cpu"))
    assert len(drawn.unique()) == losses.CLASSES
    assert torch.equal(drawn, classes.__wrapped__(4096, torch.device("cpu")))


def test_names_are_unique_and_every_target_has_its_candidate() -> None:
    names = [name for loss in LOSSES.values() for name in loss.candidates()]
    assert len(names) == len(set(names))
    assert not set(names) - {candidates.OURS} & candidates.TITLES.keys()
    for loss in LOSSES.values():
        others = {one.name for one in loss.others}
        assert loss.limits.keys() | {loss.exact} <= others
    assert {name for name, loss in LOSSES.items() if loss.limits} == set(bench.TIMED)
    assert COMPARED.rows in bench.ROWS


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A measurement whose memory costs no processes, with the names that were asked for."""
    asked: list[tuple[str, Size]] = []

    def peak_bytes(name: str, size: Size, **options: Any) -> int:
        asked.append((name, size))
        return 7

    monkeypatch.setattr(memory, "peak_bytes", peak_bytes)
    measurement = loss_comparison.Measurement(0.0, say=lambda text: None)
    measurement.asked = asked
    return measurement


@needs_native
@pytest.mark.parametrize("name", ["clip", "labels"])
def test_a_measurement_has_times_ratios_memory_and_errors(name: str, quick: Any) -> None:
    quick.measure(name, 64)
    loss = LOSSES[name]
    cell = {"loss": name, "M": 64, "D": 256}
    rows = {row["name"]: row for row in quick.sections["rows"]}
    assert list(rows) == list(loss.candidates())
    for row in rows.values():
        assert {key: row[key] for key in cell} == cell
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["rounds"] == loss_comparison.MIN_ROUNDS
    assert "ours_over_it" not in rows[loss.ours.name]
    for other in loss.others:
        ratio = rows[other.name]["ours_over_it"]
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    assert quick.calls == {(name, one): (64, rows[one]["p20"]) for one in rows}
    assert quick.asked == [(one, Size(64 * loss.sides, 256)) for one in loss.candidates()]
    checked = {row["name"]: row for row in quick.sections["errors"]}
    assert checked.keys() == rows.keys() - {candidates.OURS}
    for row in checked.values():
        assert row["error_of_loss"] < 1e-5
        assert row["error_of_gradient"] < 1e-4
    assert quick.sections["left_out"] == []


@needs_native
def test_a_target_has_the_time_of_the_matrix_products_beside_it(
    quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter((2e9, 3e9))
    monkeypatch.setattr(loss_comparison.machine, "roofs", lambda *_: {"flops": next(rates)})
    monkeypatch.setattr(loss_comparison, "COMPARED", Size(64, 256))
    for name, rows in (("clip", 32), ("clip", 64), ("labels", 64), ("decoupled", 64)):
        quick.measure(name, rows)
    clip, labels = quick.sections["products"]  # DCL has no target.
    assert clip["flops"] == 2 * labels["flops"] == 6 * 64**2 * 256
    assert [clip["seconds"], labels["seconds"]] == [clip["flops"] / 2e9, labels["flops"] / 3e9]
    assert (clip["loss"], clip["M"], clip["D"], labels["loss"]) == ("clip", 64, 256, "labels")


@needs_native
def test_a_wrong_formula_has_a_large_error(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(temperature: float) -> Any:
        return lambda x, y: 1.5 * losses.plain_info_nce(x, y, temperature=temperature)

    loss = LOSSES["info_nce"]
    doubtful = losses.replace(loss.ours, make=wrong)
    monkeypatch.setitem(LOSSES, "info_nce", losses.replace(loss, ours=doubtful))
    quick.measure("info_nce", 64)
    errors = {row["name"]: row["error_of_loss"] for row in quick.sections["errors"]}
    assert errors["info_nce"] == pytest.approx(0.5, rel=1e-3)
    assert errors["plain_info_nce"] < 1e-5


@needs_native
def test_what_does_not_fit_takes_long_or_is_missing_is_not_run(
    quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(temperature: float) -> Any:
        raise ImportError("no such library")

    loss = LOSSES["sup_con"]
    plain, library = loss.others
    others = (plain, losses.replace(library, make=missing))
    monkeypatch.setitem(LOSSES, "sup_con", losses.replace(loss, others=others))
    quick.calls["sup_con", plain.name] = (32, 2 * loss_comparison.LONGEST)
    quick.measure("sup_con", 64)
    with monkeypatch.context() as patched:  # A candidate that has a target is waited for.
        patched.setattr(loss_comparison, "COMPARED", Size(48, 256))
        patched.setattr(loss_comparison, "LONGEST", 0.0)
        quick.measure("sup_con", 48)
        assert [row["name"] for row in quick.sections["rows"][1:]] == ["sup_con", plain.name]
        del quick.sections["rows"][1:]
    monkeypatch.setattr(loss_comparison.machine, "free_memory", lambda: 2**16)
    quick.measure("sup_con", 128)
    assert {row["name"] for row in quick.sections["rows"]} == {"sup_con"}
    reasons = [row["reason"] for row in quick.sections["left_out"] if row["name"] == plain.name]
    assert reasons[0] == f"would take about {8 * loss_comparison.LONGEST:.0f} s a call"
    assert reasons[1].endswith("and at most 80 % of the free 0.0 GiB may be taken")
    (reason, _, _) = (
        row["reason"] for row in quick.sections["left_out"] if row["name"] == library.name
    )
    assert reason == "no such library"


@pytest.mark.parametrize(
    ("name", "other", "rows", "ratio", "verdict"),
    [
        ("info_nce", "plain_info_nce", 8192, 0.28, "met"),
        ("info_nce", "plain_info_nce", 8192, 0.29, "missed"),
        ("info_nce", "plain_info_nce", 2048, 0.29, "no target"),
        ("clip", "open_clip", 8192, 0.19, "missed"),
        ("sup_con", "metric_learning_sup_con", 8192, 0.04, "met"),
        ("sup_con", "plain_sup_con", 8192, 0.11, "missed"),
        ("labels", candidates.OURS, 8192, 1.16, "missed"),
        ("labels", "plain_labels", 8192, 1.16, "no target"),
    ],
)
def test_verdict(name: str, other: str, rows: int, ratio: float, verdict: str) -> None:
    row = {"loss": name, "M": rows, "D": 256, "name": other, "ours_over_it": {"value": ratio}}
    (target,) = loss_comparison.targets_of({"rows": [row], "left_out": []})
    assert target.verdict == verdict
    without = {key: row[key] for key in ("loss", "M", "D", "name")}
    targets = loss_comparison.targets_of({"rows": [], "left_out": [without]})
    assert [target.verdict for target in targets] == ["not run"] * (verdict != "no target")


@needs_native
@pytest.mark.parametrize("arguments", [[], ["--loss", "clip"], ["--rows", "64"]], ids=str)
def test_only_a_whole_run_is_recorded(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda *_, **__: 2**20)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "TIMED", ("clip",))
    monkeypatch.setattr(bench, "ROWS", (64,))
    options = partial(script_options.read_options, command_line=[*arguments, "--seconds", "0"])
    monkeypatch.setattr(bench, "read_options", options)
    bench.main()
    printed = capsys.readouterr().out
    assert "open_clip's formula" in printed
    assert ("not written" in printed) == bool(arguments)
    if not arguments:
        content = json.loads((tmp_path / "losses_cpu.json").read_text())
        sections = {"rows", "memory", "errors", "left_out", "products"}
        assert content.keys() == {"environment", "targets", *sections}
        assert content["memory"][0]["extra_bytes"] == 2**20


@needs_native
def test_the_page_shows_what_a_record_has(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.calls["sup_con", "metric_learning_sup_con"] = (32, loss_comparison.LONGEST)
    for name in ("sup_con", "labels"):
        quick.measure(name, 64)
    for row in quick.sections["rows"]:
        row["median"] = 0.125
    judged = [{"loss": "sup_con", "other": "plain_sup_con", "ratio": None, "target": 0.1, "M": 64}]
    judged += [{"loss": "labels", "other": candidates.OURS, "ratio": 1.25, "target": 1.15, "M": 64}]
    quick.sections["products"] = [{"loss": "labels", "M": 64, "seconds": 0.1}]
    content = {"environment": loss_comparison.machine.environment(), **quick.sections}
    content["targets"] = [
        {**t, "verdict": verdict} for t, verdict in zip(judged, ("not run", "missed"), strict=True)
    ]
    cell = {"title": "CLIP", "M": 65536, "over_input": 3.456}
    sizes = {"input_bytes": 2**27, "extra_bytes": 2**28}
    fields = generate_figures.Fields
    found = {
        "losses": fields(
            {
                name: part if name == "environment" else [*map(fields, part)]
                for name, part in content.items()
            }
        ),
        "losses_memory": fields(
            environment=content["environment"], rows=[fields({**cell, **sizes})]
        ),
    }
    monkeypatch.setattr(generate_figures, "record_of_losses", found.get)
    lines = generate_figures.losses_cpu().splitlines()
    assert lines[0].startswith("Measured by `")
    assert "| SupCon | pytorch-metric-learning | 64 | not run |  |  |  |" in lines
    (ours,) = (
        line for line in lines if line.startswith("| SupCon | cjepa_kernels | 64 | 125 |  |")
    )
    assert ours.split(" | ")[5] == "0.0"
    ratios = [line for line in lines if line.startswith("| NT-Xent with labels | plain formula")]
    assert re.search(r"\| 64 \| 125 \| [\d.]+ \([\d.]+ to [\d.]+\) \| 0.0 \| [\d.e-]+ \|$", *ratios)
    assert sum(line.startswith(("| SupCon", "| NT-Xent")) for line in lines) == 6
    targets = generate_figures.losses_targets()
    assert "| SupCon | plain formula | 0.1 | - | not run | not run |" in targets
    assert (
        "| NT-Xent with labels | NT-Xent without labels | 1.15 | 0.800 | 1.250 | missed |"
        in targets
    )
    assert "| CLIP | 65,536 | 128 | 256 | 3.46 |" in generate_figures.losses_memory()
    monkeypatch.setattr(generate_figures, "record_of_losses", lambda name: None)
    assert "no record yet: `python bench/losses.py`" in generate_figures.losses_targets()


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (losses.parse_losses, "clip,siglip", r"expected losses of info_nce, .*; got \['siglip'\]"),
        (bench.parse_rows, "64,63", "even numbers of 4 rows or more, got '64,63'"),
        (bench.parse_rows, "many", "got 'many'"),
    ],
    ids=["loss", "odd", "word"],
)
def test_bad_options_are_refused(parse: Any, text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse(text)


@pytest.mark.parametrize("native", [True, False], ids=["native", "pure_python"])
def test_the_command_compares_other_losses(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda *_, **__: 2**20)
    monkeypatch.setattr(cli, "missing_backend", lambda device: None if native else "not built")
    arguments = ["bench", "--losses", "info_nce, decoupled", "--sizes", "64x16,32x8"]
    arguments += ["--seconds", "0", "--temperature", "0.2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert ("the chunked back end is timed: not built" in result.output) == (not native)
    assert re.search(r"decoupled +64 +plain formula .* \(.* to .*\) +1\.0 ", result.output)
    content = json.loads((tmp_path / "losses.json").read_text())
    assert content["settings"] == {"dtype": "fp32", "temperature": 0.2, "seconds": 0.0}
    assert content["environment"]["command"]
    measured = {(row["loss"], row["M"], row["D"], row["name"]) for row in content["rows"]}
    assert measured == {
        (name, rows, features, one)
        for name in ("info_nce", "decoupled")
        for rows, features in ((32, 8), (64, 16))
        for one in LOSSES[name].candidates()
    }
    # Errors are those at the temperature that was asked for.
    assert all(row["error_of_loss"] < 1e-5 for row in content["errors"])
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip,siglip"], "--losses: expected losses of info_nce, clip, sup_con, labels, "),
        (["clip", "--dtype", "bf16"], "--dtype: expected fp32 with --losses, got 'bf16'"),
        (["clip", "--sizes", "63x8"], "--sizes: "),
    ],
    ids=["loss", "dtype", "size"],
)
def test_bad_options_of_the_command_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "run_losses", lambda *_: pytest.fail("measured"))
    result = CliRunner().invoke(app, ["bench", "--losses", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_memory_has_a_target_at_the_large_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def peak_bytes(name: str, size: Size, **options: Any) -> int:
        asked.append(name)
        return 4 * 4 * size.rows * size.features

    monkeypatch.setattr(memory, "peak_bytes", peak_bytes)
    for rows, verdict in ((memories.ROWS, "met"), (512, "no target")):
        record = memories.measure("clip", "CLIP", rows, LOSSES["clip"].size(rows, 256))
        assert record["over_input"] == 4.0
        assert record["input_bytes"] == 2 * 4 * rows * 256
        assert memories.target_of(record).verdict == verdict
    worse = {**record, "M": memories.ROWS, "over_input": 4.1}
    assert memories.target_of(worse).verdict == "missed"
    assert asked == ["clip", "clip"]


def test_peak_memory_finds_the_candidates_of_every_loss() -> None:
    for loss in LOSSES.values():
        for name, candidate in loss.candidates().items():
            assert losses.find(name).title == candidate.title
    assert losses.find("native") is candidates.find("native")
    with pytest.raises(KeyError):
        losses.find("siglip")


def test_the_check_of_a_gpu_measures_every_loss_and_names_a_missing_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(temperature: float) -> Any:
        raise ImportError("no such library")

    loss = LOSSES["sup_con"]
    others = (loss.others[0], losses.replace(loss.others[1], make=missing))
    monkeypatch.setitem(LOSSES, "sup_con", losses.replace(loss, others=others))
    written: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(measure, "write", lambda section, **row: written.append((section, row)))
    monkeypatch.setattr(measure, "DEVICE_SECONDS", 0.0)
    measure.losses(Size(32, 8))
    timed = {(row["part"], row["name"]) for section, row in written if section == "device"}
    expected = {(name, one) for name, of in LOSSES.items() for one in of.candidates()}
    assert timed == expected - {("sup_con", others[1].name)}
    ((part, name, reason),) = (
        (row["part"], row["name"], row["reason"])
        for section, row in written
        if section == "left_out"
    )
    assert (part, name) == ("sup_con", others[1].name)
    assert reason == "no such library"
