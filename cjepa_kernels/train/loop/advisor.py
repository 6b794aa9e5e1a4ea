"""The advisor applies the tuning guide to the epoch means of a run and gives its evidence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cjepa_kernels.definitions import ContrastiveType

WINDOW = 3  # epochs whose median is judged, so that no rule fires on a single noisy epoch
PATIENCE = 8  # epochs after which a quantity that should have moved is expected to have moved
EARLY = 10  # epochs after warm-up within which near-perfect accuracy is suspicious

# The thresholds lie between what recorded runs that probed well reached and what runs with a fault
# reached; docs/training.md has the table, and a test derives its numbers from the records.
AT_CHANCE_LOSS = 0.85  # fraction of the loss at chance, log(2B - 1)
AT_CHANCE_ACCURACY = 12.0  # times the accuracy at chance, 1 / (2B - 1)
HIGH_ACCURACY = 0.95
SHORTCUT_ACCURACY = 0.98
SHORTCUT_LOSS = 0.25  # fraction of the loss at chance
DOMINATING_RATIO = 25.0
SEPARATED_GAP = 0.3  # a gap this wide may stand still
MIN_GAP_GROWTH = 0.1  # over PATIENCE epochs
COLLAPSE_SIMILARITY = 0.99
COLLAPSE_STD = 0.05

TRIED_TEMPERATURES = (0.05, 0.2)  # between which every temperature tried probed alike

METRICS = (
    "contrastive_loss",
    "contrastive_accuracy",
    "contrastive_pos_sim",
    "contrastive_neg_sim",
    "jepa_loss",
    "term_ratio",
)

NOTES: dict[str, str] = {  # the third column of the table in docs/training.md
    "contrastive_at_chance": (
        "8 epochs after warm-up, runs that train the term were at 0.74 of the loss at chance or "
        "below, and JEPA alone, which does not train it, at 0.93 or above. Accuracy alone says "
        "little: runs that probed well ended at 0.24 to 0.56, and temperatures from 0.05 to 0.2 "
        "left the probes where they were"
    ),
    "high_accuracy": (
        "no run that probed well went beyond 0.56; the one that did shared one mask between the "
        "views. A larger weight is no remedy: weight 0.12 changed no probe by more than the "
        "deviation between seeds"
    ),
    "contrastive_dominates": (
        "the recipes reached ratios of 1.3 (digits) and 1.5 (CIFAR-10), and weight 2 on digits a "
        "ratio of 20.7; all of them probed well. A learning rate of 0.1, with which the features "
        "collapsed, went beyond 25"
    ),
    "gap_not_growing": (
        "from 11 epochs after warm-up on, runs that train the term had a gap of 0.42 or more; "
        "where it was below 0.5 it still grew by 0.11 or more. JEPA alone had a gap of 0.20 at "
        "most, which grew by 0.09 at most. The positive similarity alone falls in runs that probed "
        "well"
    ),
    "shared_mask_shortcut": (
        "one mask for both views: accuracy 0.99 at epoch 7, few-label probe 79.4 instead of 83.6, "
        "hidden by the full-label linear probe"
    ),
    "collapse": (
        "after warm-up the negative similarity of the recorded comparisons was 0.88 at most, and "
        "the spread of CLS 0.23 or more. A learning rate of 0.1 collapsed them: a negative "
        "similarity of 1.00, few-label probe 25.0 instead of 83.5"
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
        note: The results of measured runs that bear on this rule.
    """

    rule: str
    epoch: int
    message: str
    evidence: str
    note: str


class Advisor:
    """Watches epoch means and reports each finding once, after warm-up.

    With ``contrastive_weight`` 0 (the JEPA baseline) only the collapse rule applies, since the
    contrastive metrics are then monitored and not trained. It is the only one with another
    contrastive loss than NT-Xent too, because the other thresholds come from runs with NT-Xent.

    Args:
        warmup_epochs: Length of the learning rate's warm-up in epochs (fractions allowed), >= 0.
        contrastive_weight: Weight of the contrastive term, >= 0.
        jepa_weight: Weight of the JEPA term, >= 0.
        batch_size: Pairs per batch, over all ranks, >= 1.
        temperature: Temperature of the contrastive term, > 0.
        contrastive_type: Name of the contrastive loss.

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
        contrastive_type: ContrastiveType = "nt_xent",
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
        self.contrastive_type = contrastive_type
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
        if self.contrastive_weight > 0 and self.contrastive_type == "nt_xent":
            rules += [self._shortcut, self._high_accuracy, self._at_chance]
            rules += [self._dominates, self._gap]
        findings = []
        for rule in rules:
            finding = rule(epoch)
            if finding is not None and finding.rule not in self._fired:
                self._fired.append(finding.rule)
                findings.append(finding)
        return findings

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
        return Finding(
            rule=rule,
            epoch=epoch,
            message=message,
            evidence=f"{evidence} (median of {WINDOW} epochs)",
            note=NOTES[rule],
        )

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
                if self._recent("contrastive_accuracy") < HIGH_ACCURACY
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
        return self._finding(
            "high_accuracy",
            epoch,
            "The contrastive task is almost solved, so the term has little left to teach. Make "
            "sure that the two views draw their masks independently and are augmented; if they "
            "do, make the task harder with stronger augmentation or larger batches.",
            f"contrastive accuracy {accuracy:.3f}, above {HIGH_ACCURACY}",
        )

    def _at_chance(self, epoch: int) -> Finding | None:
        accuracy, loss = self._recent("contrastive_accuracy"), self._recent("contrastive_loss")
        others = 2 * self.batch_size - 1  # rows that an anchor chooses its positive from
        if others < 2 or self._epochs < PATIENCE:
            return None
        chance = math.log(others)
        if not (loss > AT_CHANCE_LOSS * chance and accuracy < AT_CHANCE_ACCURACY / others):
            return None
        low, high = TRIED_TEMPERATURES
        temperature = (
            ""
            if low <= self.temperature <= high
            else f", and try a temperature between {low} and {high} (now {self.temperature:g})"
        )
        return self._finding(
            "contrastive_at_chance",
            epoch,
            "The contrastive term hardly learns anything: check that the two views show the same "
            "image, that the contrasted features carry a gradient and that the position "
            f"embeddings are centred{temperature}.",
            f"contrastive loss {loss:.2f} against {chance:.2f} at chance, accuracy {accuracy:.3f} "
            f"against {1 / others:.3f} at chance, {self._epochs} epochs after warm-up",
        )

    def _dominates(self, epoch: int) -> Finding | None:
        ratio = self._recent("term_ratio")
        if self.jepa_weight == 0 or not math.isfinite(ratio) or ratio <= DOMINATING_RATIO:
            return None
        suggested = self.contrastive_weight / ratio
        return self._finding(
            "contrastive_dominates",
            epoch,
            "The weighted contrastive term is further above the weighted JEPA term than in any "
            "measured run that probed well. If the JEPA loss is not close to 0, which would mean "
            f"that the features collapse, try contrastive_weight {suggested:.2g} (now "
            f"{self.contrastive_weight:g}).",
            f"ratio of the weighted terms {ratio:.2f}, above {DOMINATING_RATIO:g}",
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
