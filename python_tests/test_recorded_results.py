"""The recorded results: documents say what the JSON beside them says, and it meets its targets."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from bench_scripts import load

from cjepa_kernels.bench.plots import drawable
from cjepa_kernels.train.comparison import comparison_markdown, load_comparison, text_tables

ROOT = Path(__file__).parent.parent
COMPARISONS = ["digits", "digits-transfer", "cifar10"]


@pytest.mark.parametrize("name", COMPARISONS)
def test_document_repeats_its_json(name: str) -> None:
    path = ROOT / "docs" / "results" / f"{name}.json"
    comparison = load_comparison(path)
    document = path.with_suffix(".md").read_text(encoding="utf-8")
    assert comparison_markdown(comparison) in document
    assert len(comparison.seeds) >= 3
    assert {run.arm for run in comparison.runs} == {"cjepa", "jepa", "contrastive"}


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_readme_repeats_the_mean_pooled_table(name: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text_tables(load_comparison(ROOT / "docs" / "results" / f"{name}.json"))[0]
    for row in (*table.rows, tuple(f"**{cell}**" for cell in table.difference)):
        assert "| " + " | ".join(row) + " |" in readme


def test_recorded_gains_meet_the_targets() -> None:
    digits = load_comparison(ROOT / "docs" / "results" / "digits.json").paired["cjepa - jepa"]
    assert digits["mean/few_label"].mean >= 5
    assert digits["mean/knn"].mean >= 3
    cifar = load_comparison(ROOT / "docs" / "results" / "cifar10.json").paired["cjepa - jepa"]
    assert cifar["mean/linear"].mean >= 4


def test_tuning_table_repeats_its_json() -> None:
    results = ROOT / "docs" / "results"
    document = (results / "tuning.md").read_text(encoding="utf-8")
    for row in json.loads((results / "tuning.json").read_text())["rows"]:
        probes = [
            f"{statistics.mean(row[key]):.1f} ± {statistics.stdev(row[key]):.1f}"
            for key in ("mean/few_label", "mean/knn", "cls/few_label", "cls/knn")
        ]
        assert f"| {row['setting']} | {' | '.join(probes)} |" in document


def test_counted_instructions_are_those_of_the_document() -> None:
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    names = {
        "strips_kernel": "strips",
        "owned_rows_kernel": "owned rows",
        "tiles_kernel": "tiles",
        "coefficient_tiles_kernel": "coefficients",
    }
    recorded = json.loads((ROOT / "bench/results/gpu_instructions_sm90.json").read_text())
    for row in recorded["rows"]:
        if row["place"] != "edge":
            cycles = [row[f"{key}_cycles"] for key in ("product", "exponential", "issue")]
            cells = [f"{row['instructions']:.1f}", *(f"{cycle:.0f}" for cycle in cycles)]
            assert f"| {row['D']} | {names[row['kernel']]} | {' | '.join(cells)} |" in document


def test_the_whole_loss_in_the_documents_is_the_recorded_one() -> None:
    recorded = json.loads((ROOT / "bench/results/cjepa_loss_cpu.json").read_text())
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    times: dict[int, dict[str, float]] = {}
    patches: dict[int, str] = {}
    for row in recorded["rows"]:
        times.setdefault(row["B"], {})[row["name"]] = 1e3 * row["median"]
        patches[row["B"]] = "/".join(map(str, row["N"]))
    columns = ("eager prediction", "prediction", "limit, fresh gradient", "eager whole", "whole")
    for batch, of_case in times.items():
        cells = [f"{of_case[name]:.3g}" for name in columns]
        speed_up = f"{of_case['eager whole'] / of_case['whole']:.1f}"
        (line,) = (
            x for x in document.splitlines() if x.startswith(f"| {batch} | {patches[batch]} | ")
        )
        assert line.endswith(f"| {' | '.join((*cells, speed_up))} |")
        if batch == 128:
            assert f"{of_case['whole']:.1f} ms where the usual" in readme
            assert f"takes {of_case['eager whole']:.0f} ms, {speed_up} times as long" in readme
        if batch == 2048:
            assert f"dominates, {speed_up} times" in readme
    missed = [entry for entry in recorded["targets"] if entry["verdict"] == "missed"]
    assert not missed


def test_the_training_step_in_the_document_is_the_recorded_one() -> None:
    recorded = json.loads((ROOT / "bench/results/training_step_cpu.json").read_text())
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for row in recorded["rows"]:
        steps = f"{1e3 * row['step_before']:.1f} | {1e3 * row['step_after']:.1f}"
        losses = f"{1e3 * row['loss_before']:.2f} | {1e3 * row['loss_after']:.2f}"
        assert f"| `configs/{row['configuration']}.yaml` | {steps} | {losses} |" in document


def test_many_ranks_in_the_document_are_the_recorded_ones() -> None:
    document = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    costs = json.loads((ROOT / "bench/results/distributed_cost.json").read_text())
    measured = json.loads((ROOT / "bench/results/distributed_cpu.json").read_text())

    def show(x: float) -> str:
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    for key, unit in (("bytes", 2**20), ("flops", 1e12)):
        of_ranks: dict[int, list[str]] = {}
        for row in costs["rows"]:
            of_ranks.setdefault(row["ranks"], []).append(show(row[key] / unit))
        for ranks, cells in of_ranks.items():
            assert f"| {ranks:,} | {' | '.join(cells)} |" in document
    for row in costs["hidden"]:
        numbers = f"{row['D']} | {row['pairs']:,} | {row['whole_batch']:,}"
        assert f"| {row['link']} | {row['ranks']} | {numbers} |" in document
    sizes: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    for row in measured["rows"]:
        sizes.setdefault((row["M_r"], row["D"]), {})[row["name"]] = row
    for (rows, features), of in sizes.items():
        candidates = ("ring", "all_gather", "strips", "lightly")
        work = [show(1e3 * of[name]["work"]) for name in candidates]
        ratio = of["ring"]["work"] / of["strips"]["work"]
        times = [show(1e3 * of[name]["time"]) for name in ("ring", "all_gather")]
        line = " | ".join([str(rows), str(features), *work, f"{ratio:.2f}", *times])
        assert f"| {line} |" in document
        if rows >= 1024:
            assert ratio <= 0.6
    of = sizes[4096, 256]
    ratios = [of["ring"]["work"] / of[name]["work"] for name in candidates[1:]]
    assert f"the ring takes {ratios[1]:.2f} of the CPU time" in readme
    assert f"{ratios[0]:.2f} of our own all-gather and {ratios[2]:.2f} of lightly's" in readme
    memory: dict[tuple[int, int, int], list[str]] = {}
    for row in measured["memory"]:
        if not row["kept"]:
            extra = [f"{row['extra_bytes'] / 2**20:.0f}", f"{row['over_input']:.1f}"]
            memory.setdefault((row["ranks"], row["M_r"], row["D"]), []).extend(extra)
    for case, cells in memory.items():
        assert f"| {' | '.join([*map(str, case), *cells])} |" in document
    for row in measured["counts"]:
        assert row["counted"] == row["formula"]


def test_the_page_of_gpus_repeats_its_json() -> None:
    tables, judged = load("gpu_tables"), load("gpu_targets")
    page = (ROOT / "docs/results/gpu.md").read_text(encoding="utf-8")
    (path,) = (ROOT / "bench/results").glob("NVIDIA-*.json")
    assert path.name in page
    content = json.loads(path.read_text(encoding="utf-8"))
    for rows in (tables.large, tables.others, tables.small, tables.accuracy):
        assert "\n".join(rows(content)) in page
    assert judged.summary(content["targets"]) in page
    assert f"{content['matmul'][0]['flops'] / 1e12:.0f} TFLOP/s here" in page
    assert f"{content['memory'][-1]['over_input']:.2f} times the input" in page
    assert f"takes {content['first_use'][0]['seconds']:.1f} s" in page
    assert content["environment"]["commit"] in page


def test_the_targets_of_the_cpu_kernel_are_the_recorded_ones() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    recorded = json.loads((ROOT / "bench/results/nt_xent_cpu.json").read_text())["targets"]
    judged = [row for row in recorded if row["part"] == "targets" and row["target"] is not None]
    assert len(judged) == 10
    for row in judged:
        met = ", met" if row["verdict"] == "met" else ""
        size = f"| {row['M']}, {row['D']} | {row['pass'].replace('+', ' + ')} | "
        (line,) = (line for line in page.splitlines() if line.startswith(size))
        assert f"| {row['target']:.2f} | {row['ratio']:.2f}{met} |" in line
    assert sum(row["verdict"] != "met" for row in judged) == 7


def test_the_memory_of_the_cpu_kernel_is_the_recorded_one() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "bench/results/nt_xent_memory_cpu.json").read_text())["rows"]
    memory = {(row["M"], row["backend"]): f"{row['extra_bytes'] / 2**20:.0f}" for row in rows}
    for count in sorted({row["M"] for row in rows}):
        cells = [
            memory.get((count, name), "not run") for name in ("native", "chunked", "reference")
        ]
        assert f"| {count} | {' | '.join(cells)} |" in page
    largest = next(row for row in rows if row["M"] == 131072)
    assert f"{largest['over_input']:.1f} times the input" in page


def test_stages_of_the_cpu_kernel_are_the_recorded_ones() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    recorded = json.loads((ROOT / "bench/results/cpu_kernel_stages.json").read_text("utf-8"))
    assert len(recorded["tables"]) == 3
    for table in recorded["tables"].values():
        for row in (table["columns"], *table["rows"]):
            assert f"| {' | '.join(row)} |" in page


def recorded_comparisons() -> list[Path]:
    """What ``make bench-record`` wrote."""
    paths = sorted((ROOT / "docs" / "results").glob("*.json"))
    return [path for path in paths if "roofs" in json.loads(path.read_text())]


@pytest.mark.parametrize("path", recorded_comparisons(), ids=lambda path: path.stem)
def test_page_of_a_comparison_is_that_of_its_json(path: Path) -> None:
    record = load("record")
    results: dict[str, Any] = json.loads(path.read_text())
    assert record.device_name(results) == path.stem
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert page == record.page_of(results)
    images = re.findall(r"\]\((\.\./images/[^)]+)\)", page)
    assert len(images) == len(drawable(results)) >= 3
    assert all((path.parent / image).exists() for image in images)
    assert not results["environment"]["commit"].endswith("-dirty")


def test_figures_of_the_readme_are_the_recorded_ones() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    headline, tables = load("headline"), load("gpu_tables")
    (gpu_path,) = (ROOT / "bench/results").glob("NVIDIA-*.json")
    gpu = json.loads(gpu_path.read_text(encoding="utf-8"))
    cpu = json.loads((ROOT / "docs/results/amd-epyc-avx2.json").read_text(encoding="utf-8"))
    assert headline.sentence(cpu, gpu) in readme
    for row in (*headline.cpu_rows(cpu), *tables.large(gpu)):
        assert row in readme
    of = tables.milliseconds(gpu)
    called, graphed = (
        [1e3 * of(part, 1024, 256, "forward+backward", name) for name in ("triton", "eager bf16")]
        for part in ("latency", "latency_graphed")
    )
    assert f"{called[0]:.0f} against {called[1]:.0f} µs at M = 1024" in readme
    assert f"{graphed[0]:.0f} against {graphed[1]:.0f} µs. And" in readme
    assert headline.svg(lambda: headline.draw(cpu, gpu)) == headline.OUT.read_text("utf-8")
