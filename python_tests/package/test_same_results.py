"""The comparison of two revisions: different values get different fingerprints, and cases run."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from result_cases import cases_of, fingerprint, run_cases
from same_results import GROUPS, differences, fingerprints_of, fingerprints_of_file

ONE = torch.ones(3)


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([1.0, 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))]),
        ONE.double(),
        ONE.reshape(3, 1),
        torch.tensor([1.0, 1.0, float("nan")]),
        None,
    ],
    ids=["last_bit", "dtype", "shape", "nan", "nothing"],
)
def test_a_fingerprint_tells_apart(other: Any) -> None:
    assert fingerprint(other) != fingerprint(ONE)


def test_a_fingerprint_tells_zeros_apart() -> None:
    assert fingerprint(torch.tensor(0.0)) != fingerprint(torch.tensor(-0.0))


def test_a_fingerprint_does_not_depend_on_strides() -> None:
    for x in (torch.randn(4, 6).T, torch.randn(2, 6)[:1, ::6]):
        assert fingerprint(x) == fingerprint(torch.tensor(x.tolist()))


def test_cases_of_a_revision_are_the_same_twice_and_a_changed_one_is_found() -> None:
    chosen = [case for case in cases_of("functions", quick=True) if "chunked" in case[0]]
    names = [
        next(name for name, _ in chosen if name.startswith(stem))
        for stem in ("nt_xent", "cross_logsumexp", "prediction_loss", "HJEPALoss", "operator")
    ]
    first, second = (run_cases(case for case in chosen if case[0] in names) for _ in range(2))
    assert len(first) == len(names)
    assert not [case for case, results in first.items() if "error" in results]
    assert differences(first, second) == []
    for case, result in itertools.product(names, ["loss", "row_lse"]):
        if result in first[case]:
            changed = copy.deepcopy(first)
            changed[case][result] += "1"
            (line,) = differences(first, changed)
            assert line.startswith(f"{case}, {result}: ")
    del second[names[0]]
    assert differences(first, second) == [f"{names[0]}: only in BASE"]
    assert differences(second, first) == [f"{names[0]}: only in this tree"]


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in ("training", "ranks")])
def test_every_case_has_a_name_of_its_own(group: str) -> None:
    names = [name for name, _ in cases_of(group, quick=True)]
    assert len(names) > 100
    assert len(set(names)) == len(names)


def test_times_and_dates_of_a_run_are_left_out() -> None:
    run = {"history": [{"loss": 0.5}], "seconds": 2.0, "finished": "today"}
    assert dict(fingerprints_of(run)) == {"history[0].loss": "0.5"}


def test_a_table_is_compared_by_its_cells(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,0.5\n", encoding="utf-8")
    fingerprints = dict(fingerprints_of_file(tmp_path / "metrics.csv"))
    assert fingerprints == {"[0].epoch": "'1'", "[0].loss": "'0.5'"}
