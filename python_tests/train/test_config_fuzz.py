"""Test that every configuration value is refused in one line, or is documented and trains."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("lightning")
pytest.importorskip("typer")

import config_fuzz

from cjepa_kernels.train.config import ExperimentConfig

SECTIONS = list(ExperimentConfig.model_fields)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_key_with_every_kind_of_value(section: str) -> None:
    cases = [case for case in config_fuzz.cases() if case[0].partition(".")[0] == section]
    outcomes = [config_fuzz.run(key, kind, build=True) for key, kind in cases]
    faults = [f"{o.key} = {o.kind}: {o.fault}" for o in outcomes if o.fault]
    assert not faults
    accepted = Counter(outcome.accepted for outcome in outcomes)
    assert accepted[True] >= 1, "no documented value was accepted"
    assert accepted[False] >= 20


def test_there_are_enough_cases() -> None:
    kinds = Counter(key for key, _ in config_fuzz.cases())
    assert min(kinds.values()) >= 20
    assert len(kinds) >= 70


@pytest.mark.parametrize("kind", config_fuzz.ON_THE_COMMAND_LINE)
def test_every_kind_of_value_on_the_command_line(kind: str) -> None:
    assert config_fuzz.run_command(kind, config_fuzz.DOCUMENTED) == ""
