"""The advisor's rules on hand-made and on measured courses of the metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

pytest.importorskip("pydantic")

from cjepa_kernels.train.advisor import METRICS, NOTES, Advisor, Finding

Course = Callable[[int], dict[str, float]]

# Epoch means of a healthy C-JEPA run on digits (weight 0.1, batches of 64, 40 epochs).
HEALTHY_EPOCHS = (1, 3, 5, 8, 12, 16, 20, 25, 30, 35, 40)
HEALTHY = {
    "contrastive_accuracy": (0.03, 0.07, 0.10, 0.17, 0.21, 0.27, 0.31, 0.35, 0.39, 0.41, 0.41),
    "contrastive_pos_sim": (0.84, 0.85, 0.77, 0.72, 0.69, 0.68, 0.68, 0.68, 0.68, 0.70, 0.69),
    "contrastive_neg_sim": (0.82, 0.76, 0.57, 0.39, 0.25, 0.14, 0.11, 0.06, 0.04, 0.02, 0.03),
    "contrastive_loss": (5.18, 4.47, 4.06, 3.54, 3.13, 2.75, 2.60, 2.34, 2.18, 1.99, 2.06),
    "jepa_loss": (0.99, 0.57, 0.35, 0.29, 0.285, 0.28, 0.277, 0.267, 0.257, 0.249, 0.25),
}
# The same with one mask for both views.
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
) -> Course:
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


def steady(**changes: float) -> Course:
    """A quiet course: accuracy 0.9, a wide gap, a small ratio; none of the rules applies."""
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


def watch(subject: Advisor, course: Course, epochs: int = 40, first: int = 1) -> list[Finding]:
    found = []
    for epoch in range(first, epochs + 1):
        found += subject.update(epoch, course(epoch))
    return found


def rules(findings: list[Finding]) -> list[str]:
    return [finding.rule for finding in findings]


def test_a_quiet_run_has_no_findings() -> None:
    assert watch(advisor(), steady()) == []


@pytest.mark.parametrize(
    ("rule", "changes", "words"),
    [
        ("low_accuracy", {"contrastive_accuracy": 0.5}, "temperature 0.07 (now 0.1)"),
        ("high_accuracy", {"contrastive_accuracy": 0.96}, "contrastive_weight 0.12 (now 0.1)"),
        ("contrastive_dominates", {"term_ratio": 2.0}, "contrastive_weight 0.05 (now 0.1)"),
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
    found = watch(advisor(), steady(**changes))
    assert rules(found).count(rule) == 1
    finding = next(f for f in found if f.rule == rule)
    assert words in finding.message
    assert any(character.isdigit() for character in finding.evidence)
    assert finding.note == NOTES[rule]
    assert finding.epoch >= 7  # four epochs of warm-up, three to smooth over


@pytest.mark.parametrize(
    ("changes", "metrics", "rule", "words"),
    [
        ({"temperature": 0.07}, {"contrastive_accuracy": 0.5}, "low_accuracy", "already 0.07"),
        ({"temperature": 0.05}, {"contrastive_accuracy": 0.5}, "low_accuracy", "batch"),
        (
            {"contrastive_weight": 0.2},
            {"contrastive_accuracy": 0.96},
            "high_accuracy",
            "already 0.2",
        ),
    ],
)
def test_advice_beyond_the_suggested_value(
    changes: dict[str, float], metrics: dict[str, float], rule: str, words: str
) -> None:
    finding = next(f for f in watch(advisor(**changes), steady(**metrics)) if f.rule == rule)
    assert words in finding.message


@pytest.mark.parametrize(
    "spike",
    [
        {"contrastive_accuracy": 0.6},
        {"contrastive_accuracy": 1.0, "contrastive_loss": 0.1},
        {"term_ratio": 2.0},
        {"contrastive_pos_sim": 1.0, "contrastive_neg_sim": 1.0},
    ],
    ids=["low-accuracy", "high-accuracy", "ratio", "collapse"],
)
def test_one_noisy_epoch_is_no_finding(spike: dict[str, float]) -> None:
    def course(epoch: int) -> dict[str, float]:
        return steady(**(spike if epoch == 20 else {}))(epoch)

    assert watch(advisor(), course) == []


def test_nothing_is_said_during_warm_up() -> None:
    course = steady(contrastive_accuracy=0.1, term_ratio=3.0, contrastive_neg_sim=0.8)
    assert watch(advisor(warmup_epochs=20.0), course, epochs=20) == []


def test_rising_accuracy_gets_patience() -> None:
    def course(epoch: int) -> dict[str, float]:
        return steady(contrastive_accuracy=min(0.9, 0.2 + 0.09 * epoch))(epoch)

    assert watch(advisor(), course) == []


def test_gap_that_grows_slowly_is_fine() -> None:
    def course(epoch: int) -> dict[str, float]:
        return steady(contrastive_neg_sim=0.7 - 0.01 * epoch)(epoch)

    assert watch(advisor(), course) == []


def test_weight_zero_knows_the_collapse_rule_alone() -> None:
    baseline = advisor(contrastive_weight=0.0)
    unhealthy = steady(contrastive_accuracy=0.05, term_ratio=0.0, contrastive_neg_sim=0.75)
    assert watch(baseline, unhealthy) == []
    collapsed = steady(contrastive_pos_sim=1.0, contrastive_neg_sim=1.0)
    assert rules(watch(baseline, collapsed)) == ["collapse"]


@pytest.mark.parametrize("ratio", [math.inf, math.nan])
def test_a_missing_jepa_term_does_not_dominate(ratio: float) -> None:
    assert watch(advisor(jepa_weight=0.0), steady(term_ratio=ratio)) == []


def test_nan_metrics_are_no_findings() -> None:
    assert watch(advisor(), lambda epoch: dict.fromkeys(METRICS, math.nan)) == []


def test_healthy_run_as_measured() -> None:
    found = watch(advisor(), interpolated(HEALTHY_EPOCHS, HEALTHY))
    # The tuning guide's two thresholds speak; the notes say that healthy runs pass them.
    assert set(rules(found)) == {"low_accuracy", "contrastive_dominates"}


def test_shared_mask_run_as_measured() -> None:
    found = watch(advisor(), interpolated(SHARED_EPOCHS, SHARED))
    assert "shared_mask_shortcut" in rules(found)
    shortcut = next(f for f in found if f.rule == "shared_mask_shortcut")
    assert shortcut.epoch <= 40 / 3 + 1
    assert "independently" in shortcut.message


def test_late_perfection_is_no_shortcut() -> None:
    def course(epoch: int) -> dict[str, float]:
        late = {"contrastive_accuracy": 0.999, "contrastive_loss": 0.05}
        return steady(**(late if epoch > 25 else {}))(epoch)

    assert "shared_mask_shortcut" not in rules(watch(advisor(), course))


def test_state_survives_a_restart() -> None:
    course = interpolated(HEALTHY_EPOCHS, HEALTHY)
    whole = watch(advisor(), course)
    for stop in range(1, 40):
        first = advisor()
        found = watch(first, course, epochs=stop)
        state = json.loads(json.dumps(first.state_dict()))  # plain values only
        second = advisor()
        second.load_state_dict(state)
        assert found + watch(second, course, first=stop + 1) == whole


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
