"""Errors of loss and gradient against the temperature, for views that are nearly equal.

    python bench/temperature_error.py [--results RESULTS.json] [--out PICTURE.svg]

Late in training a positive's probability is close to 1, and the textbook formula subtracts two
nearly equal numbers. Prints the table of docs/numerics.md and draws its picture; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cjepa_kernels import nt_xent
from cjepa_kernels.bench.machine import environment
from cjepa_kernels.bench.records import RESULTS
from cjepa_kernels.plot_style import NATIVE, svg

OUT = Path(__file__).parent.parent / "docs" / "images" / "temperature_error.svg"
TEMPERATURES = (0.5, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
PAIRS, FEATURES, SEEDS = 257, 130, range(5)
CURVES = {"textbook": ("textbook", "#d97706", "--"), "here": ("cjepa_kernels", NATIVE, "-")}


def textbook(z_i: Tensor, z_j: Tensor, temperature: float) -> Tensor:
    """Normalise, one product, masked fill, cross-entropy."""
    z = F.normalize(torch.cat([z_i, z_j]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z_i)))


def here(z_i: Tensor, z_j: Tensor, temperature: float) -> Tensor:
    """The package's, on this device's back end."""
    return nt_xent(z_i, z_j, temperature=temperature).loss


def loss_and_gradient(loss: Tensor, views: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both detached, the gradient of all rows in one tensor."""
    return loss.detach(), torch.cat(torch.autograd.grad(loss, views))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact magnitude."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


def measure(temperature: float) -> dict[str, Any]:
    """The worst of all seeds, in fp32, for views that are 10 % apart."""
    row: dict[str, Any] = {"temperature": temperature}
    for seed in SEEDS:
        z_i, noise = torch.randn(2, PAIRS, FEATURES, generator=torch.Generator().manual_seed(seed))
        single = (z_i.requires_grad_(), (z_i + 0.1 * noise).detach().requires_grad_())
        double = tuple(z.detach().double().requires_grad_() for z in single)
        exact = nt_xent(*double, temperature=temperature, backend="reference").loss
        truth = loss_and_gradient(exact, double)
        for name, formula in (("textbook", textbook), ("here", here)):
            got = loss_and_gradient(formula(*single, temperature), single)
            for quantity, *pair in zip(("loss", "gradient"), got, truth, strict=True):
                key = f"{name}_{quantity}"
                row[key] = max(row.get(key, 0.0), relative_error(*pair))
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of the document's table."""
    return [
        f"| {row['temperature']} | "
        + " | ".join(
            f"{row[f'{name}_{quantity}']:.0e}"
            for quantity in ("loss", "gradient")
            for name in ("textbook", "here")
        )
        + " |"
        for row in rows
    ]


def draw_errors(axes: Axes, rows: list[dict[str, Any]], quantity: str) -> None:
    """Error against temperature, one curve a formula."""
    temperatures = [row["temperature"] for row in rows]
    for name, (label, colour, dash) in CURVES.items():
        errors = [row[f"{name}_{quantity}"] for row in rows]
        axes.plot(temperatures, errors, dash, marker="o", markersize=3, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1e-8, 2)
    axes.set_xticks(temperatures, [str(t) for t in temperatures])
    axes.minorticks_off()
    axes.set_xlabel("temperature τ")
    axes.set_title(f"Relative error of the {quantity}, fp32")
    axes.legend()


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The picture."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "gradient"), strict=True):
        draw_errors(axes, rows, quantity)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "temperature_error_cpu.json")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = [measure(temperature) for temperature in TEMPERATURES]
    print("\n".join(table(rows)))
    content = {"environment": environment(), "pairs": PAIRS, "features": FEATURES, "rows": rows}
    options.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    options.out.write_text(svg(lambda: draw(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
