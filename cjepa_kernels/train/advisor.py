"""The tuning guide, alive: findings about a run from its epoch means, each with its evidence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WINDOW = 3  # epochs whose median is judged, so that no rule fires on a single noisy epoch
PATIENCE = 8  # epochs after which a quantity that should have moved is expected to have moved
EARLY = 10  # epochs after warm-up within which near-perfect accuracy is suspicious

LOW_ACCURACY = 0.8
HIGH_ACCURACY = 0.95
SHORTCUT_ACCURACY = 0.98
SHORTCUT_LOSS = 0.25  # fraction of the loss at chance, log(2B - 1)
RISING = 0.02  # accuracy gained over WINDOW epochs that counts as still rising
MIN_GAP_GROWTH = 0.01  # over PATIENCE epochs
SEPARATED_GAP = 0.5  # a gap this wide may stand still
COLLAPSE_SIMILARITY = 0.99
COLLAPSE_STD = 0.05

LOW_TEMPERATURE = 0.07
RAISED_WEIGHT = 0.12

METRICS = (
    "contrastive_loss",
    "contrastive_accuracy",
    "contrastive_pos_sim",
    "contrastive_neg_sim",
    "jepa_loss",
    "term_ratio",
)

NOTES: dict[str, str] = {  # docs/results/: digits.json, cifar10.json, tuning.json
    "low_accuracy": (
        "Low accuracy alone is no defect: with batches of 64, healthy runs ended at 0.41 (digits, "
        "40 epochs) and 0.55 (CIFAR-10, 24 epochs), and probed well; on digits, temperature 0.07 "
        "raised it by 0.01 and left the probes where they were. It depends on the batch and the "
        "augmentation; watch whether the gap between positive and negative similarity grows."
    ),
    "high_accuracy": (
        "No healthy run here came near 0.95 with batches of 64. The one that did shared one mask "
        "between the two views; a larger weight would have made that worse. On digits, weight 0.12 "
        "instead of 0.1 changed no probe by more than the deviation between seeds."
    ),
    "contrastive_dominates": (
        "Healthy digits runs (weight 0.1) reached ratios of 1.15 to 1.27 early and ended at 0.8; "
        "CIFAR-10 ended at 1.2 to 1.3, and digits with weight 0.2 at 1.65, and all of them probed "
        "well: a ratio a little above 1 needs no change."
    ),
    "gap_not_growing": (
        "The gap is what grows in healthy runs (digits: 0.02 at epoch 1, 0.46 at epoch 10, 0.67 at "
        "epoch 40), while the positive similarity alone falls (0.82 to 0.69). A plateau of a few "
        "hundred steps at the start is normal; position embeddings that are not centred keep CLS "
        "almost constant and the loss at log(2B - 1)."
    ),
    "shared_mask_shortcut": (
        "With one mask for both views (digits, seed 0), accuracy was 0.99 at epoch 7 and 1.00 at "
        "the end with a loss of 0.08, while the few-label probe fell from 83.6 to 79.4 %; the "
        "linear probe with all labels hid it."
    ),
    "collapse": (
        "In healthy runs the similarities were apart from the third epoch on, and the spread of "
        "the directions of CLS ended at 0.95 or above (1 is isotropic, 0 is collapsed); with JEPA "
        "alone it ended at 0.5 to 0.8."
    ),
}


@dataclass(frozen=True)
class Finding:
    """What the numbers of a run call for.

    Attributes:
        rule: Name of the rule, a key of ``NOTES``.
        epoch: Epoch at which the rule fired.
        message: What to try.
        evidence: The numbers behind it.
        note: What measured runs showed about this rule.
    """

    rule: str
    epoch: int
    message: str
    evidence: str
    note: str


class Advisor:
    """Watches epoch means and reports each finding once, after warm-up.

    With ``contrastive_weight`` 0 (the JEPA baseline) only the collapse rule applies, since the
    contrastive metrics are then monitored and not trained.

    Args:
        warmup_epochs: Length of the learning rate's warm-up in epochs (fractions allowed), >= 0.
        contrastive_weight: Weight of the contrastive term, >= 0.
        jepa_weight: Weight of the JEPA term, >= 0.
        batch_size: Pairs per batch, over all ranks, >= 1.
        temperature: Temperature of the contrastive term, > 0.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        warmup_epochs: float,
        contrastive_weight: float,
        jepa_weight: float,
        batch_size: int,
        temperature: float,
    ) -> None:
        for name, value in (
            ("warmup_epochs", warmup_epochs),
            ("contrastive_weight", contrastive_weight),
            ("jepa_weight", jepa_weight),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.warmup_epochs = warmup_epochs
        self.contrastive_weight = contrastive_weight
        self.jepa_weight = jepa_weight
        self.batch_size = batch_size
        self.temperature = temperature
        self._rows: list[dict[str, float]] = []  # after warm-up, the last PATIENCE + WINDOW
        self._epochs = 0  # seen after warm-up
        self._fired: list[str] = []

    def update(self, epoch: int, metrics: Mapping[str, float]) -> list[Finding]:
        """Take one epoch's means and return what is newly found.

        Args:
            epoch: Number of the epoch, counted from 1.
            metrics: The epoch means named in ``METRICS``, and optionally ``cls_std``; further keys
                are ignored.

        Returns:
            The findings of this epoch, usually none.

        Raises:
            ValueError: If a metric is missing.
        """
        missing = [name for name in METRICS if name not in metrics]
        if missing:
            raise ValueError(
                f"metrics must hold {', '.join(METRICS)}; missing: {', '.join(missing)}"
            )
        if epoch <= self.warmup_epochs:
            return []
        row = {name: float(metrics[name]) for name in METRICS}
        row["gap"] = row["contrastive_pos_sim"] - row["contrastive_neg_sim"]
        row["cls_std"] = float(metrics.get("cls_std", math.nan))
        self._rows = [*self._rows, row][-(PATIENCE + WINDOW) :]
        self._epochs += 1
        if len(self._rows) < WINDOW:
            return []
        rules = [self._collapse]
        if self.contrastive_weight > 0:
            rules += [self._shortcut, self._high_accuracy, self._low_accuracy]
            rules += [self._dominates, self._gap]
        found = []
        for rule in rules:
            finding = rule(epoch)
            if finding is not None and finding.rule not in self._fired:
                self._fired.append(finding.rule)
                found.append(finding)
        return found

    def state_dict(self) -> dict[str, Any]:
        """State as plain Python values, so that a resumed run does not repeat its findings."""
        return {
            "rows": [dict(row) for row in self._rows],
            "epochs": self._epochs,
            "fired": list(self._fired),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: The saved state.

        Raises:
            ValueError: If a part of the state is missing.
        """
        missing = {"rows", "epochs", "fired"} - set(state)
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}")
        self._rows = [dict(row) for row in state["rows"]]
        self._epochs = int(state["epochs"])
        self._fired = list(state["fired"])

    def _recent(self, name: str, ago: int = 0) -> float:
        """Median of a metric over the WINDOW epochs that end ``ago`` epochs before now."""
        end = len(self._rows) - ago
        values = [row[name] for row in self._rows[end - WINDOW : end]]
        return math.nan if any(map(math.isnan, values)) else statistics.median(values)

    def _finding(self, rule: str, epoch: int, message: str, evidence: str) -> Finding:
        return Finding(rule, epoch, message, f"{evidence} (median of {WINDOW} epochs)", NOTES[rule])

    def _collapse(self, epoch: int) -> Finding | None:
        pos, neg = self._recent("contrastive_pos_sim"), self._recent("contrastive_neg_sim")
        std = self._recent("cls_std")
        parallel = pos > COLLAPSE_SIMILARITY and neg > COLLAPSE_SIMILARITY
        if not (parallel or std < COLLAPSE_STD):
            return None
        evidence = f"positive similarity {pos:.3f}, negative similarity {neg:.3f}"
        if math.isfinite(std):
            evidence += f", spread of CLS {std:.3f}"
        if self.contrastive_weight > 0:
            advice = (
                "check that the position embeddings are centred and lower the learning rate"
                if self._recent("contrastive_accuracy") < LOW_ACCURACY
                else "check the augmentation"
            )
        else:
            advice = "nothing in the JEPA loss trains CLS itself; a contrastive weight above 0 does"
        return self._finding(
            "collapse",
            epoch,
            f"The CLS features of different images are almost equal: {advice}.",
            evidence,
        )

    def _shortcut(self, epoch: int) -> Finding | None:
        accuracy, loss = self._recent("contrastive_accuracy"), self._recent("contrastive_loss")
        chance = math.log(2 * self.batch_size - 1) if self.batch_size > 1 else 0.0
        early = self._epochs <= max(EARLY, self.warmup_epochs)
        if not (early and accuracy > SHORTCUT_ACCURACY and loss < SHORTCUT_LOSS * chance):
            return None
        return self._finding(
            "shared_mask_shortcut",
            epoch,
            "Near-perfect contrastive accuracy this early is the mark of a shortcut, usually one "
            "mask shared by the two views, which CLS then encodes: draw the masks of the two views "
            "independently, and check that the views are augmented.",
            f"accuracy {accuracy:.3f} {self._epochs} epochs after warm-up, contrastive loss "
            f"{loss:.2f} against {chance:.2f} at chance",
        )

    def _high_accuracy(self, epoch: int) -> Finding | None:
        accuracy = self._recent("contrastive_accuracy")
        if not accuracy > HIGH_ACCURACY or "shared_mask_shortcut" in self._fired:
            return None
        if self.contrastive_weight < RAISED_WEIGHT:
            advice = f"try contrastive_weight {RAISED_WEIGHT} (now {self.contrastive_weight:g})"
        else:
            advice = (
                f"contrastive_weight is already {self.contrastive_weight:g}, so make the task "
                "harder with stronger augmentation or larger batches"
            )
        return self._finding(
            "high_accuracy",
            epoch,
            "The contrastive task is almost solved. Make sure first that the two views draw their "
            f"masks independently; then {advice}.",
            f"contrastive accuracy {accuracy:.3f}, above {HIGH_ACCURACY}",
        )

    def _low_accuracy(self, epoch: int) -> Finding | None:
        accuracy = self._recent("contrastive_accuracy")
        if not accuracy < LOW_ACCURACY:
            return None
        gained = math.nan
        if len(self._rows) >= 2 * WINDOW:
            gained = accuracy - self._recent("contrastive_accuracy", ago=WINDOW)
        # Before there is a comparison, or while it still rises, low accuracy says nothing yet.
        if not gained < RISING and self._epochs < PATIENCE:
            return None
        if self.temperature > LOW_TEMPERATURE:
            advice = f"try temperature {LOW_TEMPERATURE} (now {self.temperature:g})"
        else:
            advice = (
                f"temperature is already {self.temperature:g}, so try a smaller batch (fewer "
                f"negatives; now {self.batch_size}), weaker augmentation, or more epochs"
            )
        evidence = f"contrastive accuracy {accuracy:.3f}, below {LOW_ACCURACY}"
        if math.isfinite(gained):
            evidence += f", {gained:+.3f} against {WINDOW} epochs before"
        return self._finding(
            "low_accuracy",
            epoch,
            f"Positives are often not the nearest: {advice}.",
            evidence,
        )

    def _dominates(self, epoch: int) -> Finding | None:
        ratio = self._recent("term_ratio")
        if self.jepa_weight == 0 or not math.isfinite(ratio) or ratio <= 1:
            return None
        suggested = self.contrastive_weight / ratio
        return self._finding(
            "contrastive_dominates",
            epoch,
            "The weighted contrastive term is above the weighted JEPA term; it should not "
            f"dominate: if it stays there, try contrastive_weight {suggested:.2g} "
            f"(now {self.contrastive_weight:g}).",
            f"ratio of the weighted terms {ratio:.2f}",
        )

    def _gap(self, epoch: int) -> Finding | None:
        if len(self._rows) < PATIENCE + WINDOW:
            return None
        now, before = self._recent("gap"), self._recent("gap", ago=PATIENCE)
        if not (now < SEPARATED_GAP and now - before < MIN_GAP_GROWTH):
            return None
        return self._finding(
            "gap_not_growing",
            epoch,
            "The gap between positive and negative similarity is not growing: check that the "
            "contrasted features carry a gradient (contrastive_on_context), that the position "
            "embeddings are centred, and try a higher learning rate or a longer run.",
            f"gap {now:.3f} now, {before:.3f} {PATIENCE} epochs before",
        )
