"""The report of ``cjepa bench``: its sentences, files and plots."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from cjepa_kernels import plot_style
from cjepa_kernels.bench import (
    candidates,
    cli,
    comparison,
    plots,
    records,
    report,
    timing,
)
from cjepa_kernels.bench.candidates import BOTH, CANDIDATES, EAGER, FORWARD, MM, OURS
from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.bench.verdict import Ratio, ratio_of

SIZE = Size(64, 16)


def rows_of(size: Size, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of the results, in which the forward pass takes half of the time."""
    cell = {"M": size.rows, "D": size.features}
    return [
        {
            **cell,
            "pass": direction,
            "name": name,
            "median": m,
            "p20": 0.9 * m,
            "p80": 1.1 * m,
            "rounds": 5.0,
            "bytes_moved": None,
        }
        for name, both in seconds.items()
        for direction, m in ((BOTH, both), (FORWARD, both / 2))
    ]


def results_of(
    times: dict[Size, dict[str, float]], extra: dict[Size, dict[str, int]], **sections: Any
) -> dict[str, Any]:
    """Results of a comparison that measured the given seconds and bytes."""
    empty: dict[str, Any] = {section: [] for section in comparison.SECTIONS}
    return {
        **empty,
        "environment": {"backend": "native", "missing_backend": None},
        "settings": {"sizes": [str(size) for size in times]},
        "complete": True,
        "roofs": {"flops": 1e11, "bandwidth": 1e10},
        "rows": [row for size, seconds in times.items() for row in rows_of(size, seconds)],
        "memory": [
            {"M": size.rows, "D": size.features, "name": name, "extra_bytes": value}
            for size, values in extra.items()
            for name, value in values.items()
        ],
        **sections,
    }


def with_intervals(
    results: dict[str, Any], intervals: dict[tuple[int, str], tuple[Any, Any, int]]
) -> dict[str, Any]:
    """Add to the results the ratios of the medians, with these intervals and numbers of rounds."""
    medians = {
        (row["M"], row["name"]): row["median"] for row in results["rows"] if row["pass"] == BOTH
    }
    for row in results["rows"]:
        key = (row["M"], row["name"])
        if row["pass"] == BOTH and key in intervals:
            value = medians[key] / medians[row["M"], OURS]
            row["over_ours"] = Ratio(value, *intervals[key]).record()
    return results


def test_verdict_repeats_the_largest_common_size() -> None:
    size = Size(8192, 256)
    results = results_of(
        {Size(4096, 256): {OURS: 0.06, EAGER: 0.3}, size: {OURS: 0.245, EAGER: 1.261}},
        {size: {OURS: 171 << 20, EAGER: 1239 << 20}},
    )
    assert report.verdict(results) == [
        "At M = 8192, D = 256 on this machine forward + backward costs 245 ms and 171 MiB with "
        "cjepa_kernels; the plain formula 1261 ms and 1239 MiB: 5.1 x the time, 7.2 x the memory.",
        "This record keeps no ratios of single rounds, so it cannot say which differences between "
        "the medians are more than noise.",
        "No other candidate of the same loss has a lower median at any size.",
    ]


def test_verdict_names_where_ours_is_slower_and_where_others_have_no_room() -> None:
    small, large = Size(256, 256), Size(32768, 256)
    left_out = {
        "M": large.rows,
        "D": large.features,
        "name": EAGER,
        "reason": "needs 18.9 GiB, 16.0 GiB are free",
        "needed_bytes": 1,
    }
    record = {"dtype": "fp32", "temperature": 0.1}
    results = results_of(
        {
            small: {OURS: 0.002, EAGER: 0.001, "lightly": 0.003, MM: 0.0001, "inf_cl": 0.0001},
            large: {OURS: 5.0},
        },
        {large: {OURS: 175 << 20}},
        left_out=[left_out],
        errors=[
            {"M": 256, "D": 256, "name": name, "loss": 0.0, "gradient": error, **record}
            for name, error in ((OURS, 2e-6), (EAGER, 1e-6))
        ],
        temperatures=[
            {**record, "temperature": temperature, "name": name, "gradient": error}
            for temperature, name, error in (
                (0.1, OURS, 1e-6),
                (0.1, EAGER, 1e-6),
                (0.02, OURS, 8e-6),
                (0.02, EAGER, 0.7),
                (0.01, OURS, 1e-5),
                (0.01, EAGER, 0.6),
            )
        ],
    )
    with_intervals(results, {(256, EAGER): (0.475, 0.525, 9), (256, "lightly"): (1.4, 1.6, 9)})
    assert report.verdict(results) == [
        "At M = 256, D = 256 on this machine forward + backward costs 2 ms with cjepa_kernels; "
        "the plain formula 1 ms: 0.5 x the time (99 % interval 0.47 to 0.53).",
        "At M = 32768 cjepa_kernels takes 5000 ms and 175 MiB; the plain formula needs 18.9 GiB, "
        "16.0 GiB are free.",
        "cjepa_kernels is slower than the plain formula at M = 256 (2.00 x its time, 99 % interval "
        "1.90 to 2.11).",
        "In the other comparison with another candidate of the same loss cjepa_kernels is faster.",
        "The largest error of a gradient against float64 is 2.0e-06 with cjepa_kernels and "
        "1.0e-06 with the plain formula.",
        "From temperature 0.02 down the plain formula's gradient in fp32 is off by 60 % or more; "
        "that of cjepa_kernels by 1.0e-05 at most.",
    ]


def test_a_verdict_needs_an_interval_on_one_side() -> None:
    times = {
        Size(256, 256): {OURS: 1.0, EAGER: 0.99, "lightly": 3.0},
        Size(512, 256): {OURS: 1.0, EAGER: 0.7, "lightly": 0.9},
        Size(1024, 256): {OURS: 1.0, EAGER: 0.13, "lightly": 0.8},
    }
    results = with_intervals(
        results_of(times, {}),
        {
            (256, EAGER): (0.985, 1.015, 40),
            (256, "lightly"): (2.5, 3.5, 40),
            (512, EAGER): (0.6, 0.75, 8),
            (512, "lightly"): (0.8, 1.25, 64),
            (1024, EAGER): (None, None, 3),
            (1024, "lightly"): (0.5, 4.0, 16),
        },
    )
    assert report.verdict(results)[1:] == [
        "cjepa_kernels is slower than the plain formula at M = 512 (1.43 x its time, 99 % interval "
        "1.33 to 1.67).",
        "cjepa_kernels is as fast as the plain formula, within 2 %, at M = 256.",
        "Too noisy to tell whether cjepa_kernels is faster or slower than lightly's formula at "
        "M = 512 (our time is 0.80 to 1.25 x its time, 99 % interval), M = 1024 (our time is 0.25 "
        "to 2.00 x its time, 99 % interval).",
        "Too noisy to tell whether cjepa_kernels is faster or slower than the plain formula at "
        "M = 1024 (3 rounds; 8 are needed).",
        "In the other comparison with another candidate of the same loss cjepa_kernels is faster.",
    ]
    # The largest M had three rounds, which are too few for an interval.
    assert "(99 % interval" not in report.verdict(results)[0]
    cells = [dict(zip(report.HEADER, row, strict=True)) for row in report.table(results)]
    assert [row["99 % interval"] for row in cells[:3]] == ["", "0.98 to 1.01", "2.50 to 3.50"]
    assert [row["time / ours"] for row in cells[:3]] == ["1.00", "0.99", "3.00"]


def test_a_verdict_in_our_favour_is_of_every_comparison() -> None:
    times = {Size(256, 256): {OURS: 1.0, EAGER: 2.0, "lightly": 3.0, MM: 0.1, "inf_cl": 0.1}}
    intervals = {(256, EAGER): (1.8, 2.2, 8), (256, "lightly"): (2.5, 3.5, 8)}
    assert report.verdict(with_intervals(results_of(times, {}), intervals)) == [
        "At M = 256, D = 256 on this machine forward + backward costs 1000 ms with cjepa_kernels; "
        "the plain formula 2000 ms: 2.0 x the time (99 % interval 1.80 to 2.20).",
        "In all 2 comparisons with another candidate of the same loss cjepa_kernels is faster.",
    ]


def test_an_old_record_gives_medians_and_no_verdict() -> None:
    times = {Size(256, 256): {OURS: 1.0, EAGER: 0.5, "lightly": 1.2}}
    assert report.verdict(results_of(times, {}))[1:] == [
        "This record keeps no ratios of single rounds, so it cannot say which differences between "
        "the medians are more than noise.",
        "The median of cjepa_kernels is above that of the plain formula at M = 256 (2.00 x its "
        "median).",
    ]


def test_the_busy_machine_of_three_calls_gets_no_verdict(tmp_path: Path) -> None:
    """Three rounds whose times overlap are too few to say that one is faster or as fast."""
    times = {OURS: [0.4, 9.0, 0.3], EAGER: [0.5, 0.05, 0.9]}
    row = {"M": 256, "D": 256, "pass": BOTH, "bytes_moved": None}
    results = results_of({Size(256, 256): {OURS: 1.0}}, {})
    results["rows"] = [
        {**row, "name": OURS, **timing.summarise(times[OURS])},
        {
            **row,
            "name": EAGER,
            **timing.summarise(times[EAGER]),
            "over_ours": ratio_of(times[OURS], times[EAGER]).record(),
        },
    ]
    path = tmp_path / "results.json"
    path.write_text(records.as_json(results))
    sentences = " ".join(report.verdict(report.load(path)))
    assert "Too noisy to tell whether cjepa_kernels is faster or slower" in sentences
    assert "as fast as" not in sentences
    assert " is faster." not in sentences


def test_verdict_names_the_temperatures_that_a_dtype_has_no_gradient_for() -> None:
    sweep = [
        {"M": 64, "D": 16, "dtype": dtype, "temperature": temperature, "name": name, "gradient": e}
        for dtype, temperature, name, e in (
            ("bf16", 0.01, OURS, 0.02),
            ("fp16", 0.02, OURS, 1.0),
            ("fp16", 0.01, OURS, math.nan),
            ("fp16", 0.1, OURS, 1e-3),
            ("fp16", 0.1, EAGER, 1.0),
        )
    ]
    assert report.verdict(results_of({SIZE: {OURS: 1.0}}, {}, temperatures=sweep))[-1] == (
        "With fp16 inputs the gradient of cjepa_kernels is off by 10 % or more at temperature "
        "0.01, 0.02: numbers this small round to 0 in fp16, not in bf16 or fp32."
    )


def test_verdict_says_that_the_kernels_are_missing() -> None:
    environment = {"backend": "chunked", "missing_backend": "cjepa_kernels._C is not built"}
    results = results_of({SIZE: {OURS: 1.0}}, {}, environment=environment)
    assert report.verdict(results)[0] == (
        "cjepa_kernels ran its chunked back end, not its kernels: cjepa_kernels._C is not built."
    )


def test_a_run_that_was_cut_off_says_so() -> None:
    results = results_of({SIZE: {OURS: 1.0}}, {}, complete=False)
    results["settings"]["sizes"] = ["64x16", "128x16"]
    assert report.verdict(results)[0] == (
        "This run was cut off: 128x16, the errors against the temperature not measured."
    )


def test_a_candidate_whose_forward_failed_has_an_empty_cell() -> None:
    results = results_of({SIZE: {OURS: 1.0, EAGER: 2.0}}, {})
    results["rows"] = [
        row for row in results["rows"] if (row["name"], row["pass"]) != (EAGER, FORWARD)
    ]
    cells = dict(zip(report.HEADER, report.table(results)[1], strict=True))
    assert cells["loss"] == "plain formula"
    assert cells["forward ms"] == ""
    assert cells["forward + backward ms"] == "2000"
    assert cells["rounds"] == "5"


def test_results_are_json_whatever_the_errors_are(tmp_path: Path) -> None:
    error = {"M": 64, "D": 16, "dtype": "fp16", "temperature": 0.01, "name": EAGER, "loss": 1.0}
    results = results_of({SIZE: {OURS: 1.0}}, {}, errors=[{**error, "gradient": math.nan}])
    path = tmp_path / "results.json"
    path.write_text(records.as_json(results))
    assert "NaN" not in path.read_text()
    assert math.isnan(report.load(path)["errors"][0]["gradient"])


def test_no_roofline_without_bytes() -> None:
    results = results_of({SIZE: {OURS: 1.0}}, {})
    assert "roofline" not in plots.drawable(results)
    results["rows"][0]["bytes_moved"] = 1e6
    assert "roofline" in plots.drawable(results)


@pytest.mark.parametrize("name", ["time", "roofline"])
def test_plots_of_times_have_error_bars_from_p20_to_p80(name: str) -> None:
    results = results_of({SIZE: {OURS: 1.0, EAGER: 2.0}}, {})
    for row in results["rows"]:
        row["bytes_moved"] = 1e6
    (axes,) = plots.drawable(results)[name][1]().axes
    ends = {
        tuple(round(float(y), 6) for y in segment[:, 1])
        for bar in axes.containers
        for collection in bar.lines[2]
        for segment in collection.get_segments()
    }
    if name == "time":
        assert ends == {(900.0, 1100.0), (1800.0, 2200.0)}
    else:
        rate = 6 * SIZE.rows**2 * SIZE.features / 1e9
        expected = {(rate / (1.1 * m), rate / (0.9 * m)) for m in (1.0, 2.0)}
        assert ends == {tuple(round(end, 6) for end in pair) for pair in expected}


def test_a_directory_that_cannot_be_written_to_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out: expected a directory to write to, got .*file"):
        cli.prepare(tmp_path / "file")
    with pytest.raises(ValueError, match=r"--out: expected a directory to write to, got .*below"):
        cli.prepare(tmp_path / "file" / "below")


def test_plots_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    assert set(cli.PLOTS) == set(plots.PLOTS)
    (tmp_path / "temperature-dark.png").write_text("old")
    (tmp_path / "mine.png").write_text("a file of the user")
    cli.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_a_slow_candidate_does_not_take_the_rounds_of_a_quick_one() -> None:
    seconds = {"slow": 1.0, "quick": 0.01}
    calls = {name: lambda name=name: name for name in seconds}
    times = timing.interleaved(
        calls, seconds=2.0, least=3, clock=lambda call: seconds[str(call())], shares=True
    )
    assert times["slow"]["rounds"] == 3
    assert 100 <= times["quick"]["rounds"] <= 101


def test_a_write_that_fails_keeps_the_file_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = results_of({SIZE: {OURS: 1.0}}, {})
    path = tmp_path / "results.json"
    path.write_text("before")
    monkeypatch.setattr(cli, "as_json", lambda results: "new")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        cli.save(results, tmp_path)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_labels_keep_their_order_and_their_distance() -> None:
    heights = plot_style.spread([0.5, 0.501, 0.502, 0.9], 0.06)
    gaps = [b - a for a, b in itertools.pairwise(heights)]
    assert all(gap >= 0.06 - 1e-4 for gap in gaps)
    assert math.isclose(heights[1], 0.501, abs_tol=1e-3)
    assert plot_style.spread([0.1, 0.5], 0.06) == [0.1, 0.5]


def test_no_candidate_lacks_a_style_or_a_title() -> None:
    assert plots.STYLES.keys() == {*CANDIDATES, MM}
    assert candidates.TITLES.keys() == {*CANDIDATES, *candidates.FURTHER_CANDIDATES, MM}
