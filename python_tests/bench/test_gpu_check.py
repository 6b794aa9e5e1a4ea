"""``make gpu-check``: its steps, its measurements on the CPU, its record, its targets, its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_scripts import load, run_script
from repository import ROOT

from cjepa_kernels.bench import latency, sources
from cjepa_kernels.bench.sizes import Size

check_run, measure = load("gpu_check_run"), load("gpu_measure")
pages, record, steps, targets = (
    load(f"gpu_check_{name}") for name in ("page", "record", "steps", "targets")
)
runner = load("step_runner")
NOW = sources.of_files()


def measured(share: float) -> dict[str, Any]:
    """A record of a GPU in which every ratio is ``share`` of its target."""
    content: dict[str, Any] = {name: [] for name in record.SECTIONS}
    content["environment"] = {
        "device": "Fake GPU",
        "torch": "2.11.0+cu130",
        "python": "3.12.3",
        "triton": "3.6.0",
        "cuda": "13.0",
        "commit": "0123456789ab",
        "date": "2026-11-28T05:00:00+00:00",
        "command": "python bench/gpu_check.py",
        "sources": NOW,
        "variables": {"CJEPA_GLUON": "1"},
    }
    content["finished"] = True
    # The limit of the ratio to the plain formula, then to torch.compile of it.
    limits = {256: (0.30, 1.0), 1024: (0.30, 0.45), 4096: (0.30, 0.45), 16384: (1.0, 0.45)}
    for rows, (plain, compiled) in limits.items():
        medians = {"eager": 1 / plain, "compiled": 1 / compiled, "cjepa_kernels": share}
        medians |= {"reduce-overhead": share * 0.25 / 0.30, "CUDA graph": 0.1}
        for name, median in medians.items():
            time = {"median": 1e-4 * median, "p20": 1e-4, "p80": 1e-4, "rounds": 5}
            row = {"M": rows, "D": 256, "name": name, "skipped_graphs": None}
            row["launch_plans"] = 2
            times = {kind: dict(time) for kind in ("as_called", "in_a_row", "host")}
            content["latency"].append({**row, **times})
    for ratio in targets.RATIOS:
        if ratio.section == "device":
            part, direction = ratio.cell
            for size, limit in ratio.limits.items():
                for name, median in ((ratio.above, share * limit), (ratio.below, 1.0)):
                    cell = {"M": size.rows, "D": size.features, "name": name, "part": part}
                    time = {"median": 1e-3 * median, "p20": 1e-3, "p80": 1e-3, "rounds": 5}
                    content["device"].append({**cell, "pass": direction, "of": "device", **time})
    content["memory"] = [{"M": 2**21, "D": 256, "over_input": 3.05 * share, "seconds": 9.6}]
    return content


class FakeDevice:
    """A host and a GPU. Time passes only when a test launches work or waits."""

    def __init__(self) -> None:
        self.host = self.free = 0.0

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.free = max(self.free, self.host) + device

    def wait(self) -> None:
        self.host = max(self.host, self.free)


def test_the_three_times_of_a_call_tell_the_device_from_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = FakeDevice()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: device.host)

    def fail() -> None:
        raise RuntimeError("no kernel\nfor this")

    rows, errors = latency.latencies(
        {
            "device bound": lambda: lambda: device.launch(50e-6, 200e-6),
            "launch bound": lambda: lambda: device.launch(300e-6, 10e-6),
            "fails": lambda: fail,
        },
        wait=device.wait,
        seconds=0.0,
    )
    medians = {name: {time: x["median"] for time, x in row.items()} for name, row in rows.items()}
    assert medians["device bound"] == pytest.approx(
        {"as_called": 250e-6, "host": 50e-6, "in_a_row": 200e-6 + 50e-6 / 50}
    )
    assert medians["launch bound"] == pytest.approx(
        {"as_called": 310e-6, "host": 300e-6, "in_a_row": 300e-6 + 10e-6 / 50}
    )
    assert errors == {"fails": "RuntimeError: no kernel"}


def test_the_measurements_run_on_the_cpu_with_real_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two measurements as processes of the runner, the slow ones in this process."""
    size = Size(16, 8)
    folder = runner.Folder(tmp_path)
    done = []
    for part in ("latency", "memory"):
        monkeypatch.setenv("CJEPA_LINES", str(folder.lines(part)))
        monkeypatch.setattr(sys, "argv", ["", *steps.measure(part, [size])[2:]])
        assert measure.main() == 0
        done.append(runner.Outcome(part, runner.PASSED, 1.0))
    started = [
        runner.Step("compile", steps.measure("compile", [size], "--name", "prediction"), 60, "a"),
        runner.Step("loss", steps.measure("loss", [size, Size(24, 8)]), 60, "a"),
        runner.Step("usual", steps.measure("latency", [size], "--usual"), 60, "a"),
    ]
    done += runner.run_stage(started, [60.0] * 3, folder)
    assert [outcome.text for outcome in done] == ["passed"] * 5
    in_process = [runner.Step(name, [], 60) for name in ("latency", "memory")]
    made_on = check_run.environment("cpu")
    content = record.merge(made_on, [*in_process, *started], done, folder)
    assert record.check(json.loads(json.dumps(content))) == []
    assert content["errors"] == content["faults"] == []
    names = ["eager", "compiled", "cjepa_kernels", "reduce-overhead", targets.USUAL]
    assert [row["name"] for row in content["latency"]] == names
    assert all(
        row[time]["median"] > 0 for row in content["latency"] for time in ("as_called", "host")
    )
    assert [row["name"] for row in content["left_out"]] == ["CUDA graph"]
    assert {(row["M"], row["pass"]) for row in content["device"]} == {
        (rows, direction) for rows in (16, 24) for direction in ("forward", "forward+backward")
    }
    assert {row["of"] for row in content["device"]} == {"host"}
    assert [row["M"] for row in content["memory"]] == [16]
    page = pages.page(content)
    assert "There was no GPU: the times are those of the CPU and" in page
    assert "latency at M = 16, D = 8, CUDA graph was left out: needs a GPU" in page
    assert {target["verdict"] for target in content["targets"]} == {"not measured"}


def test_a_measurement_that_fails_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail_once(size: Size) -> None:
        if size.rows == 16:
            raise RuntimeError("no memory\nat all")
        measure.write("memory", M=size.rows, D=size.features, over_input=1.0, seconds=1.0)

    monkeypatch.setitem(measure.PARTS, "memory", fail_once)
    monkeypatch.setenv("CJEPA_LINES", str(tmp_path / "lines"))
    monkeypatch.setattr(sys, "argv", ["", *steps.measure("memory", [Size(16, 8), Size(24, 8)])[2:]])
    assert measure.main() == 1
    entries, faults = record.read_lines(tmp_path / "lines", "memory")
    assert faults == []
    assert [(section, entry["M"]) for section, entry in entries] == [("errors", 16), ("memory", 24)]
    assert entries[0][1]["error"] == "RuntimeError: no memory"


def test_the_check_writes_record_and_page_after_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import json, sys; sys.path.insert(0, 'bench'); import step_lines; "
        f"content = json.load(open({str(tmp_path / 'gpu_check.json')!r})); "
        "assert not content['finished'] and content['memory'][0]['M'] == 2**21; print('seen')"
    )
    write = (
        "import step_lines; step_lines.write('memory', M=2**21, D=256, over_input=3.2, seconds=1)"
    )
    prefix = "import sys; sys.path.insert(0, 'bench'); "
    todo = [
        runner.Step("memory", [sys.executable, "-c", prefix + write], 60),
        runner.Step("looks", [sys.executable, "-c", code], 60),
        runner.Step("fails", [sys.executable, "-c", "print('why'); raise SystemExit(1)"], 60),
    ]
    check = check_run.Check(todo, runner.Folder(tmp_path), check_run.environment("cpu"))
    assert not check.run()
    check.show_end()
    printed = capsys.readouterr().out
    assert "looks: passed" in printed
    assert "fails: failed (1)\n        why" in printed
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["finished"]
    assert record.check(content) == []
    verdicts = {target["target"]: target["verdict"] for target in content["targets"]}
    assert (verdicts["largest M"], verdicts["extra memory / input"]) == ("met", "missed")
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| extra memory / input | 2097152 | 256 | at most 3.1 | 3.2 | missed |" in page
    assert "| fails | failed (1) |" in page


def test_every_target_has_a_step_that_measures_it() -> None:
    sizes = {"latency": set(steps.FULL.latency), "loss": set(steps.FULL.loss)}
    sizes["prediction"] = {steps.FULL.prediction}
    for ratio in targets.RATIOS:
        assert set(ratio.limits) <= sizes[ratio.cell[0] or "latency"], ratio.title
    assert steps.FULL.memory == targets.LARGEST


def test_the_steps_fit_into_six_minutes() -> None:
    todo = steps.on_gpus(2)
    groups = runner.stages(todo)
    assert {step.name for step in groups[0]} >= {"build", "compile cjepa_kernels 256x256"}
    assert len(groups[0]) <= 20  # Processes at once on 16 cores.
    names = [step.name for step in todo]
    assert len(set(names)) == len(names)
    assert names.index("device") < names.index("latency 1024x256") < names.index("memory")
    assert check_run.TOTAL <= 345
    reserved = sum(max(step.reserved for step in group) for group in groups)
    compiling = max(step.limit for step in groups[0])
    assert check_run.TOTAL - reserved - compiling >= 120  # For the tests.
    assert all(path.exists() for path in steps.scripts_of(todo))
    usual = [step for step in todo if step.name.endswith(", usual")]
    assert all(step.environment["CJEPA_GLUON"] == "0" for step in usual)
    assert all(step.environment["CJEPA_LAUNCH_PLANS"] == "0" for step in usual)
    assert [step.reserved for step in usual] == [0.0] * 4  # They come last, if time is left.
    assert "torchrun" in names
    assert "torchrun" not in [step.name for step in steps.on_gpus(1)]


def test_tests_of_what_has_not_changed_come_last(tmp_path: Path) -> None:
    path = tmp_path / "gpu_check.json"
    assert check_run.changed_since(path, NOW) == sources.PARTS
    content = measured(1.0)
    path.write_text(json.dumps(content))
    assert check_run.changed_since(path, NOW) == sources.PARTS  # It has no tests.
    content["tests"] = [{"step": "device", "passed": 3, "failed": 0, "skipped": 0}]
    path.write_text(json.dumps(content))
    assert check_run.changed_since(path, NOW) == ()
    assert check_run.changed_since(path, NOW | {"kernels": "1"}) == ("kernels",)
    content["tests"][0]["failed"] = 1
    path.write_text(json.dumps(content))
    assert check_run.changed_since(path, NOW) == sources.PARTS

    def before_latency(changed: tuple[str, ...]) -> set[str]:
        names = [step.name for step in steps.on_gpus(1, changed)]
        tests = {"device", "plans", "kernels", "parity", "nccl"}
        assert tests <= set(names)
        return tests & set(names[: names.index("latency 1024x256")])

    assert before_latency(()) == set()
    assert before_latency(("host code",)) == {"device", "plans", "parity", "nccl"}
    assert before_latency(("kernels",)) == {"device", "kernels", "parity", "nccl"}


@pytest.mark.parametrize(("share", "verdict"), [(0.99, "met"), (1.02, "missed")])
def test_targets_are_judged(share: float, verdict: str) -> None:
    content = measured(share)
    assert record.check({**content, "targets": []}) == []
    judged = targets.judge(content)
    assert len(judged) == 25
    verdicts = {target.verdict for target in judged if target.cell["target"] != "largest M"}
    assert verdicts == {verdict}


@pytest.mark.parametrize("section", ["latency", "device", "memory"])
def test_a_target_without_a_value_is_not_measured(section: str) -> None:
    content = measured(0.9) | {section: []}
    lost = [target.cell["target"] for target in targets.judge(content) if target.value is None]
    assert lost
    assert {t.verdict for t in targets.judge(content) if t.value is None} == {"not measured"}
    text = pages.body(content, NOW)
    assert text.count("not measured") >= len(lost)


def test_the_page_shows_what_a_record_has() -> None:
    content = measured(0.9)
    content["tests"] = [
        {
            "step": "device",
            "passed": 3,
            "failed": 1,
            "skipped": 2,
            "failures": [{"test": "test_a", "reason": "assert 1 == 2"}],
            "skips": {"needs 40 GiB": 2},
        }
    ]
    content["errors"] = [
        {"M": 1, "D": 2, "name": "compiled", "part": "latency", "error": "no <g++>\nhere"}
    ]
    text = pages.body(content, NOW)
    for expected in (
        "Fake GPU, PyTorch 2.11.0, Triton 3.6.0",
        "The environment had `CJEPA_GLUON=1`.",
        "have not changed since",
        "| 1024 | 333 | 222 | 90 | 75 | 10 |",
        "| as called / plain formula | 1024 | 256 | at most 0.3 | 0.27 | met |",
        "- device, failed: `test_a`: assert 1 == 2",
        "- device, 2 skipped: needs 40 GiB",
        "- latency at M = 1, D = 2, compiled failed: no \\<g++> here",
    ):
        assert expected in text, expected
    text = pages.body(content, NOW | {"kernels": "other"})
    assert "have changed since, and the measurement has not been repeated" in text
    assert f"| kernels | `{NOW['kernels']}` | yes |" in text
    content["finished"] = False
    assert "did not come to its end" in pages.body(content, NOW)


@pytest.mark.parametrize(
    ("break_it", "fault"),
    [
        (lambda c: c["environment"].pop("sources"), "record.environment: no field 'sources'"),
        (lambda c: c.pop("memory"), "memory: expected a list"),
        (lambda c: c["latency"][0].pop("host"), "latency[0]: no field 'host'"),
        (lambda c: c["latency"][0]["host"].update(p20="1"), "latency[0].host.p20: unexpected '1'"),
        (lambda c: c["device"][3].update(M=True), "device[3].M: unexpected True"),
        (lambda c: c.update(finished=1), "record.finished: unexpected 1"),
    ],
    ids=["no hashes", "no section", "no field", "text", "truth", "number"],
)
def test_a_record_that_does_not_fit_the_schema_is_found(break_it: Any, fault: str) -> None:
    content = measured(1.0)
    assert record.check(content) == []
    break_it(content)
    assert record.check(content) == [fault]


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({}, None),
        ({"cuda": None}, "was made without a GPU"),
        ({"commit": "0123-dirty"}, "is of code that is no commit: 0123-dirty"),
        ({"commit": None}, "is of code that is no commit: None"),
        ({"torch": 2}, "is no record of gpu_check.py: record.environment.torch: unexpected 2"),
    ],
    ids=["good", "no GPU", "dirty", "no commit", "schema"],
)
def test_the_documents_take_over_records_of_gpus_alone(
    change: dict[str, Any], refusal: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    path = tmp_path / "gpu_check.json"
    content = measured(1.0)
    content["environment"] |= change
    path.write_text(json.dumps(content))
    refused = record.take_over(path)
    assert (refused is None) == (refusal is None)
    assert refusal is None or refusal in refused
    assert (tmp_path / "results" / "gpu_check.json").exists() == (refusal is None)


def test_the_record_of_the_repository_fits_the_schema() -> None:
    path = ROOT / "bench" / "results" / record.NAME
    if not path.exists():
        pytest.skip("make gpu-check has not been recorded yet")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert record.check(content) == []
    assert [t["verdict"] for t in content["targets"]] == [t.verdict for t in targets.judge(content)]


def test_gpu_scripts_need_no_other_library() -> None:
    """The scripts need only PyTorch and Triton; pytest and hypothesis for their tests."""
    missing = ("matplotlib", "rich", "typer", "lightning", "torchvision", "pandas", "sklearn")
    block_imports = (
        f"import sys; sys.modules |= dict.fromkeys({missing}); sys.path.insert(0, 'bench')"
    )
    result = run_script("-c", f"{block_imports}; import gpu, gpu_check_run, gpu_measure")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", ["gpu.py", "gpu_check.py", "gpu_machine_code.py"])
def test_gpu_scripts_show_their_options(script: str) -> None:
    if script == "gpu_machine_code.py":
        pytest.importorskip("triton")
    result = run_script(f"bench/{script}", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {script}")
