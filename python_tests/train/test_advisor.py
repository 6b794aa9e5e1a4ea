"""Test the advisor's rules on constructed and on recorded metrics of training runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pydantic")

from documents import ROOT

from cjepa_kernels.train.evaluation.comparison import ArmRun, load_comparison
from cjepa_kernels.train.loop.advisor import METRICS, NOTES, Advisor, Finding

MetricsAt = Callable[[int], dict[str, float]]

# These are the epoch means of a C-JEPA run on digits in which both views shared one mask. The
# contrastive weight was 0.1 and the batch size 64.
SHARED_EPOCHS = (1, 3, 5, 8, 12, 16, 20, 40)
SHARED = {
    "contrastive_accuracy": (0.57, 0.85, 0.93, 0.963, 0.986, 0.990, 0.997, 1.0),
    "contrastive_pos_sim": (0.85, 0.85, 0.87, 0.88, 0.89, 0.90, 0.90, 0.92),
    "contrastive_neg_sim": (0.34, 0.07, 0.07, 0.05, 0.03, 0.03, 0.02, 0.02),
    "contrastive_loss": (2.41, 0.99, 0.67, 0.49, 0.30, 0.24, 0.18, 0.10),
    "jepa_loss": (0.99, 0.59, 0.39, 0.35, 0.315, 0.293, 0.277, 0.22),
}


def interpolated(
    epochs: tuple[int, ...], table: dict[str, tuple[float, ...]], weight: float = 0.1
) -> MetricsAt:
    def at(epoch: int) -> dict[str, float]:
        row = {}
        for name, values in table.items():
            right = next((i for i, e in enumerate(epochs) if e >= epoch), len(epochs) - 1)
            left = max(0, right - 1)
            span = max(1, epochs[right] - epochs[left])
            share = min(1.0, (epoch - epochs[left]) / span)
            row[name] = values[left] + share * (values[right] - values[left])
        row["term_ratio"] = weight * row["contrastive_loss"] / row["jepa_loss"]
        return row

    return at


def steady(**changes: float) -> MetricsAt:
    """Make metrics that stay the same in every epoch; without changes no rule applies to them."""
    row = {
        "contrastive_loss": 1.0,
        "contrastive_accuracy": 0.9,
        "contrastive_pos_sim": 0.8,
        "contrastive_neg_sim": 0.1,
        "jepa_loss": 0.3,
        "term_ratio": 0.5,
        "cls_std": 0.9,
    }
    return lambda epoch: {**row, **changes}


def advisor(**changes: float) -> Advisor:
    arguments = {
        "warmup_epochs": 4.0,
        "contrastive_weight": 0.1,
        "jepa_weight": 1.0,
        "batch_size": 64,
        "temperature": 0.1,
    }
    return Advisor(**{**arguments, **changes})  # type: ignore[arg-type]


def watch(
    subject: Advisor, metrics_at: MetricsAt, epochs: int = 40, first: int = 1
) -> list[Finding]:
    findings = []
    for epoch in range(first, epochs + 1):
        findings += subject.update(epoch, metrics_at(epoch))
    return findings


def rules(findings: list[Finding]) -> list[str]:
    return [finding.rule for finding in findings]


def test_a_quiet_run_has_no_findings() -> None:
    assert watch(advisor(), steady()) == []


@pytest.mark.parametrize(
    ("rule", "changes", "words"),
    [
        (
            "contrastive_at_chance",
            {"contrastive_accuracy": 0.03, "contrastive_loss": 4.8},
            "carry a gradient",
        ),
        ("high_accuracy", {"contrastive_accuracy": 0.96}, "masks independently"),
        ("contrastive_dominates", {"term_ratio": 50.0}, "contrastive_weight 0.002 (now 0.1)"),
        ("gap_not_growing", {"contrastive_neg_sim": 0.7}, "not growing"),
        (
            "collapse",
            {"contrastive_pos_sim": 0.999, "contrastive_neg_sim": 0.998},
            "almost equal",
        ),
        ("collapse", {"cls_std": 0.01}, "almost equal"),
        (
            "shared_mask_shortcut",
            {"contrastive_accuracy": 0.995, "contrastive_loss": 0.2},
            "independently",
        ),
    ],
)
def test_each_rule_fires_once(rule: str, changes: dict[str, float], words: str) -> None:
    findings = watch(advisor(), steady(**changes))
    assert rules(findings).count(rule) == 1
    finding = next(f for f in findings if f.rule == rule)
    assert words in finding.message
    assert any(character.isdigit() for character in finding.evidence)
    assert finding.note == NOTES[rule]
    # The rule waits for four epochs of warm-up and averages over three more.
    assert finding.epoch >= 7


AT_CHANCE = {"contrastive_accuracy": 0.03, "contrastive_loss": 4.8}


@pytest.mark.parametrize(
    ("temperature", "words"),
    [(1.0, "a temperature between 0.05 and 0.2 (now 1)"), (0.01, "(now 0.01)"), (0.2, None)],
)
def test_a_temperature_is_advised_where_none_was_tried(
    temperature: float, words: str | None
) -> None:
    findings = watch(advisor(temperature=temperature), steady(**AT_CHANCE))
    message = next(f for f in findings if f.rule == "contrastive_at_chance").message
    assert words in message if words else "temperature" not in message


@pytest.mark.parametrize(
    "changes",
    [
        # At temperature 1 the loss stays high although the accuracy is good.
        {"contrastive_accuracy": 0.3, "contrastive_loss": 4.5},
        {"contrastive_accuracy": 0.05, "contrastive_loss": 3.9},
        {"term_ratio": 20.0},
        {"contrastive_accuracy": 0.4, "contrastive_loss": 2.0},
    ],
    ids=["accurate", "below-chance-loss", "weight-2", "recipe"],
)
def test_what_measured_runs_showed_to_be_harmless_is_no_finding(changes: dict[str, float]) -> None:
    assert watch(advisor(), steady(**changes)) == []


def test_chance_depends_on_the_batch() -> None:
    """The same loss and accuracy mean learning in a batch of 64, but chance in a batch of 8."""
    metrics_at = steady(contrastive_accuracy=0.11, contrastive_loss=2.6)
    assert rules(watch(advisor(batch_size=8), metrics_at)) == ["contrastive_at_chance"]
    assert watch(advisor(batch_size=64), metrics_at) == []
    assert watch(advisor(batch_size=1), metrics_at) == []


@pytest.mark.parametrize(
    "spike",
    [
        AT_CHANCE,
        {"contrastive_accuracy": 1.0, "contrastive_loss": 0.1},
        {"term_ratio": 80.0},
        {"contrastive_pos_sim": 1.0, "contrastive_neg_sim": 1.0},
    ],
    ids=["at-chance", "high-accuracy", "ratio", "collapse"],
)
def test_one_noisy_epoch_is_no_finding(spike: dict[str, float]) -> None:
    def metrics_at(epoch: int) -> dict[str, float]:
        return steady(**(spike if epoch == 20 else {}))(epoch)

    assert watch(advisor(), metrics_at) == []


def test_nothing_is_said_during_warm_up() -> None:
    metrics_at = steady(**AT_CHANCE, term_ratio=80.0, contrastive_neg_sim=0.8)
    assert watch(advisor(warmup_epochs=20.0), metrics_at, epochs=20) == []


def test_a_term_that_starts_late_gets_patience() -> None:
    def metrics_at(epoch: int) -> dict[str, float]:
        return steady(contrastive_loss=max(1.0, 4.85 - 0.08 * epoch), contrastive_accuracy=0.05)(
            epoch
        )

    assert watch(advisor(), metrics_at) == []


def test_gap_that_grows_slowly_is_fine() -> None:
    def metrics_at(epoch: int) -> dict[str, float]:
        return steady(contrastive_neg_sim=0.7 - 0.015 * epoch)(epoch)

    assert watch(advisor(), metrics_at) == []


def test_weight_zero_knows_the_collapse_rule_alone() -> None:
    baseline = advisor(contrastive_weight=0.0)
    unhealthy = steady(contrastive_accuracy=0.05, term_ratio=0.0, contrastive_neg_sim=0.75)
    assert watch(baseline, unhealthy) == []
    collapsed = steady(contrastive_pos_sim=1.0, contrastive_neg_sim=1.0)
    assert rules(watch(baseline, collapsed)) == ["collapse"]


def test_other_contrastive_losses_know_the_collapse_rule_alone() -> None:
    unhealthy = steady(contrastive_accuracy=0.99, contrastive_loss=0.01, term_ratio=50.0)
    assert rules(watch(advisor(), unhealthy)) != []
    other = advisor(contrastive_type="sup_con")  # type: ignore[arg-type]
    assert watch(other, unhealthy) == []
    collapsed = steady(contrastive_pos_sim=1.0, contrastive_neg_sim=1.0)
    assert rules(watch(other, collapsed)) == ["collapse"]


@pytest.mark.parametrize("ratio", [math.inf, math.nan])
def test_a_missing_jepa_term_does_not_dominate(ratio: float) -> None:
    assert watch(advisor(jepa_weight=0.0), steady(term_ratio=ratio)) == []


def test_nan_metrics_are_no_findings() -> None:
    assert watch(advisor(), lambda epoch: dict.fromkeys(METRICS, math.nan)) == []


def recorded() -> list[tuple[str, ArmRun, dict[str, Any]]]:
    """List the name, the run and the advisor's arguments for every run of the comparisons."""
    named_runs = []
    for name in ("digits", "digits-transfer", "cifar10"):
        content = load_comparison(ROOT / "docs" / "results" / f"{name}.json")
        config = content.config
        arguments = {
            "warmup_epochs": config["optimizer"]["warmup_fraction"] * config["trainer"]["epochs"],
            "batch_size": config["trainer"]["batch_size"],
            "temperature": config["loss"]["contrastive_temperature"],
        }
        named_runs += [(f"{name}-{run.arm}-{run.seed}", run, arguments) for run in content.runs]
    return named_runs


def from_history(history: list[dict[str, float]]) -> MetricsAt:
    return lambda epoch: history[epoch - 1]


@pytest.mark.parametrize(
    ("run", "arguments"),
    [pytest.param(run, arguments, id=name) for name, run, arguments in recorded()],
)
def test_it_is_silent_on_every_recorded_run_of_the_recipes(
    run: ArmRun, arguments: dict[str, Any]
) -> None:
    weights = {
        "contrastive_weight": 0.0 if run.arm == "jepa" else 0.1,
        "jepa_weight": 0.0 if run.arm == "contrastive" else 1.0,
    }
    subject = advisor(**arguments, **weights)
    assert watch(subject, from_history(run.history), epochs=len(run.history)) == []


@pytest.mark.parametrize(
    ("run", "arguments"),
    [
        pytest.param(run, arguments, id=name)
        for name, run, arguments in recorded()
        if run.arm == "jepa"
    ],
)
def test_a_term_that_trains_nothing_is_found(run: ArmRun, arguments: dict[str, Any]) -> None:
    """Judge the runs of JEPA alone, where the contrastive term is measured but has no gradient."""
    findings = watch(advisor(**arguments), from_history(run.history), epochs=len(run.history))
    assert rules(findings) == ["contrastive_at_chance", "gap_not_growing"]
    assert findings[0].epoch <= arguments["warmup_epochs"] + 9


def test_the_runs_recorded_for_the_advisor() -> None:
    runs = json.loads((ROOT / "docs/results/advisor.json").read_text(encoding="utf-8"))["runs"]
    rules_by_setting = {
        run["setting"]: rules(
            watch(
                advisor(
                    warmup_epochs=run["warmup_epochs"],
                    batch_size=run["batch_size"],
                    temperature=run["temperature"],
                    contrastive_weight=run["contrastive_weight"],
                ),
                from_history(run["history"]),
                epochs=len(run["history"]),
            )
        )
        for run in runs
    }
    collapsed = rules_by_setting.pop("learning rate 0.1")
    assert rules_by_setting == {"weight 0.2": [], "weight 0.5": [], "weight 2": []}
    assert collapsed[0] == "collapse"
    assert "contrastive_at_chance" in collapsed


def test_shared_mask_run_as_measured() -> None:
    findings = watch(advisor(), interpolated(SHARED_EPOCHS, SHARED))
    assert "shared_mask_shortcut" in rules(findings)
    shortcut = next(f for f in findings if f.rule == "shared_mask_shortcut")
    assert shortcut.epoch <= 40 / 3 + 1
    assert "independently" in shortcut.message


def test_late_perfection_is_no_shortcut() -> None:
    def metrics_at(epoch: int) -> dict[str, float]:
        late = {"contrastive_accuracy": 0.999, "contrastive_loss": 0.05}
        return steady(**(late if epoch > 25 else {}))(epoch)

    assert "shared_mask_shortcut" not in rules(watch(advisor(), metrics_at))


def test_state_survives_a_restart() -> None:
    metrics_at = interpolated(SHARED_EPOCHS, SHARED)
    uninterrupted = watch(advisor(), metrics_at)
    assert uninterrupted
    for stop in range(1, 40):
        first = advisor()
        findings = watch(first, metrics_at, epochs=stop)
        # The state holds only plain values, so that it survives a round trip through JSON.
        state = json.loads(json.dumps(first.state_dict()))
        second = advisor()
        second.load_state_dict(state)
        assert findings + watch(second, metrics_at, first=stop + 1) == uninterrupted


def test_incomplete_state_is_an_error() -> None:
    with pytest.raises(ValueError, match="state lacks epochs, fired"):
        advisor().load_state_dict({"rows": []})


def test_missing_metric_is_an_error() -> None:
    metrics = steady()(1)
    del metrics["term_ratio"]
    with pytest.raises(ValueError, match="missing: term_ratio"):
        advisor().update(1, metrics)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup_epochs", -1.0),
        ("contrastive_weight", -0.1),
        ("jepa_weight", math.inf),
        ("batch_size", 0),
        ("temperature", 0.0),
    ],
)
def test_invalid_arguments(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        advisor(**{name: value})
