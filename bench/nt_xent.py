"""Time of nt_xent beside the formulas it replaces and the one matrix product it contains.

    python bench/nt_xent.py [--sizes 256x768,2048x256] [--seconds 3] [--no-save]

Forward and forward + backward, fp32, temperature 0.1, metrics on. ``mm`` is the bare
``torch.mm(z, z.T, out=…)``; forward + backward is compared with three of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measurement import interleaved, print_table, write_results
from torch import Tensor

from cjepa_kernels import backends, nt_xent

SIZES = "64x128,256x768,2048x256,8192x128,8192x256"
TEMPERATURE = 0.1


def eager(z_i: Tensor, z_j: Tensor) -> Tensor:
    """The plain formula: normalise, one product, masked fill, cross-entropy."""
    z = F.normalize(torch.cat([z_i, z_j]), dim=1)
    logits = z @ z.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z_i)))


def four_blocks(z_i: Tensor, z_j: Tensor) -> Tensor:
    """The formula of the first C-JEPA implementation: four blocks, concatenated twice."""
    batch = len(z_i)
    z = F.normalize(torch.cat([z_i, z_j]), dim=1)
    s = z @ z.T / TEMPERATURE
    diagonal = torch.eye(batch, dtype=torch.bool)
    rows = []
    first, second = slice(0, batch), slice(batch, None)
    for own, other in ((first, second), (second, first)):
        positive = s[own, other].diagonal()[:, None]
        negatives = [s[own, own], s[own, other]]
        masked = [block.masked_fill(diagonal, float("-inf")) for block in negatives]
        rows.append(torch.cat([positive, torch.cat(masked, dim=1)], dim=1))
    return F.cross_entropy(torch.cat(rows), torch.zeros(2 * batch, dtype=torch.long))


def candidates(rows: int, features: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Callables by pass and name; all of a pass work on the same inputs."""
    z_i = torch.randn(rows // 2, features)
    z_j = (z_i + torch.randn(rows // 2, features)).requires_grad_()
    z_i.requires_grad_()
    z = F.normalize(torch.cat([z_i, z_j]).detach(), dim=1)
    out = torch.empty(rows, rows)

    losses: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: eager(z_i, z_j),
        "four_blocks": lambda: four_blocks(z_i, z_j),
    }
    for name, status in backends().items():
        if status.available and "cuda" not in status.devices:
            losses[name] = lambda name=name: (
                nt_xent(  # type: ignore[misc]
                    z_i, z_j, temperature=TEMPERATURE, backend=name
                ).loss
            )

    def both(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), (z_i, z_j))

    def products(count: int) -> Callable[[], object]:
        return lambda: [torch.mm(z, z.T, out=out) for _ in range(count)]

    return {
        "forward": {"mm": products(1), **losses},
        "forward+backward": {"mm": products(3), **{k: both(v) for k, v in losses.items()}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=SIZES, help="MxD, separated by commas; M rows = 2B")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each size and pass")
    parser.add_argument("--no-save", action="store_true", help="do not write bench/results")
    options = parser.parse_args()
    torch.manual_seed(0)
    records: list[dict[str, Any]] = []
    table = []
    for size in options.sizes.split(","):
        rows, features = map(int, size.split("x"))
        for direction, runs in candidates(rows, features).items():
            times = interleaved(runs, seconds=options.seconds)
            for name, summary in times.items():
                ratio_mm = summary["median"] / times["mm"]["median"]
                ratio_eager = summary["median"] / times["eager"]["median"]
                records.append(
                    {
                        "M": rows,
                        "D": features,
                        "pass": direction,
                        "name": name,
                        **summary,
                        "over_mm": ratio_mm,
                        "over_eager": ratio_eager,
                    }
                )
                table.append(
                    [
                        str(rows),
                        str(features),
                        direction,
                        name,
                        f"{1e3 * summary['median']:.3f}",
                        f"{1e3 * summary['p20']:.3f}-{1e3 * summary['p80']:.3f}",
                        f"{ratio_mm:.2f}",
                        f"{ratio_eager:.2f}",
                    ]
                )
            print(f"measured M={rows} D={features} {direction}", flush=True)
    print_table(["M", "D", "pass", "name", "ms", "p20-p80", "/ mm", "/ eager"], table)
    if not options.no_save:
        print(f"written: {write_results('nt_xent_cpu', records)}")


if __name__ == "__main__":
    main()
