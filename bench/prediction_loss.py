"""Time of the prediction loss and of the whole C-JEPA loss, with eager PyTorch beside them.

    python bench/prediction_loss.py [--seconds 4] [--quick] [--no-save]

The times are medians of interleaved runs of forward + backward in fp32. The prediction loss has
three levels with weights 1, 0.5 and 0.25, L2-normalises both sides and takes smooth-L1. NT-Xent
takes the CLS rows of features (B, N+1, D), whose gradients are computed too. Each case gives

    prediction   the prediction term alone, and its byte limit: the time to read both sides twice
                 and to write a gradient that is allocated afresh, or one that exists already
    contrastive  NT-Xent alone, on contiguous rows
    whole        ``ContrastiveJEPALoss`` with the gradients of all inputs

The script reports a target that is missed and goes on. It writes
bench/results/prediction_loss_cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss
from cjepa_kernels.bench import formulas
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.script_options import read_options, require_native, save
from cjepa_kernels.bench.targets import AT_LEAST, AT_MOST, Target, print_targets
from cjepa_kernels.bench.timing import interleaved
from cjepa_kernels.tables import print_table

WEIGHTS = (1.0, 0.5, 0.25)
CONTRASTIVE_WEIGHT = 0.1


@dataclass(frozen=True)
class Case:
    """Pairs, patches of each level and features, with the targets of the ratios."""

    batch: int
    patches: tuple[int, int, int]
    features: int
    speedup: float | None = None
    over_limit: float | None = None
    whole_speedup: float | None = None

    @property
    def name(self) -> str:
        return f"B={self.batch} N={'/'.join(map(str, self.patches))} D={self.features}"


FULL = (
    Case(64, (196, 49, 16), 768, speedup=10, over_limit=2, whole_speedup=8),
    Case(128, (196, 49, 16), 768, speedup=10, over_limit=2, whole_speedup=8),
    Case(2048, (16, 4, 1), 384, whole_speedup=5),
    Case(16, (16, 4, 1), 192),
)
QUICK = (Case(4, (9, 4, 1), 16, speedup=10, over_limit=2, whole_speedup=8),)


class Inputs:
    """Random inputs of a case. Those that a training step differentiates require gradients."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        shapes = [(case.batch, n, case.features) for n in case.patches]
        self.predictions = [torch.randn(shape).requires_grad_() for shape in shapes]
        self.targets = [torch.randn(shape) for shape in shapes]
        with_cls = (case.batch, case.patches[0] + 1, case.features)
        self.features = [torch.randn(with_cls).requires_grad_() for _ in range(2)]
        rows = (case.batch, case.features)
        self.rows = [torch.randn(rows).requires_grad_() for _ in range(2)]
        self.existing = [torch.empty(shape) for shape in shapes]


def candidates(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The calls to time, by name."""
    prediction = HJEPALoss(hierarchy_weights=list(WEIGHTS))
    whole = ContrastiveJEPALoss(
        prediction, contrastive_weight=CONTRASTIVE_WEIGHT, contrastive_on_context=True
    )
    p, t, features, rows = inputs.predictions, inputs.targets, inputs.features, inputs.rows

    def eager_prediction() -> Tensor:
        return formulas.hjepa_prediction(p, t, list(WEIGHTS))

    def eager_whole() -> Tensor:
        contrastive = formulas.eager(features[0][:, 0], features[1][:, 0])
        return eager_prediction() + CONTRASTIVE_WEIGHT * contrastive

    def read_four_times() -> None:
        for x in (*p, *t) * 2:
            x.detach().sum()

    def fresh_limit() -> None:
        read_four_times()
        for x in p:
            torch.empty_like(x, requires_grad=False).fill_(1.0)

    def existing_limit() -> None:
        read_four_times()
        for x in inputs.existing:
            x.fill_(1.0)

    return {
        "prediction forward": lambda: prediction(p, t)["loss"],
        "prediction": lambda: torch.autograd.grad(prediction(p, t)["loss"], p),
        "eager prediction": lambda: torch.autograd.grad(eager_prediction(), p),
        "limit, fresh gradient": fresh_limit,
        "limit, existing gradient": existing_limit,
        "contrastive": lambda: torch.autograd.grad(whole.contrastive(*rows)["loss"], rows),
        "eager contrastive": lambda: torch.autograd.grad(formulas.eager(rows[0], rows[1]), rows),
        "whole": lambda: torch.autograd.grad(whole(p, t, *features)["loss"], p + features),
        "eager whole": lambda: torch.autograd.grad(eager_whole(), p + features),
    }


def measure(case: Case, seconds: float) -> tuple[list[Record], list[Target]]:
    """Times of a case, and its ratios with their targets."""
    times = interleaved(candidates(Inputs(case)), seconds=seconds)
    cell = {"B": case.batch, "N": list(case.patches), "D": case.features}
    medians = {name: row["median"] for name, row in times.items()}
    rows = [
        {**cell, "name": name, "share_of_whole": medians[name] / medians["whole"], **row}
        for name, row in times.items()
    ]
    limit, fresh, existing = "prediction / byte limit", "fresh gradient", "existing gradient"
    targets = [
        Target({**cell, "name": name}, medians[over] / medians[under], target, bound)
        for name, over, under, bound, target in (
            (
                "eager / native, prediction",
                "eager prediction",
                "prediction",
                AT_LEAST,
                case.speedup,
            ),
            ("eager / native, contrastive", "eager contrastive", "contrastive", AT_LEAST, None),
            ("eager / native, whole", "eager whole", "whole", AT_LEAST, case.whole_speedup),
            (f"{limit}, {fresh}", "prediction", f"limit, {fresh}", AT_MOST, case.over_limit),
            (f"{limit}, {existing}", "prediction", f"limit, {existing}", AT_MOST, None),
        )
    ]
    return rows, targets


def main() -> None:
    options = read_options(__doc__, seconds=20.0, quick_seconds=0.05)
    require_native()
    rows: list[Record] = []
    targets: list[Record] = []
    for case in QUICK if options.quick else FULL:
        print(f"\n{case.name}", flush=True)
        of_case, judged = measure(case, options.seconds)
        print_table(
            ["", "ms", "p20", "p80", "share of the whole"],
            [
                [
                    row["name"],
                    *(f"{1e3 * row[key]:.3f}" for key in ("median", "p20", "p80")),
                    f"{100 * row['share_of_whole']:.0f} %",
                ]
                for row in of_case
            ],
        )
        print_targets(judged, ["name"])
        rows += of_case
        targets += [target.record() for target in judged]
    save(options, "prediction_loss_cpu", rows, targets=targets)


if __name__ == "__main__":
    main()
