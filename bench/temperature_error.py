"""Errors of loss and gradient against the temperature, for views that are nearly equal.

    python bench/temperature_error.py [--no-save]

Late in training a positive's probability is close to 1, and the textbook formula subtracts two
nearly equal numbers. Nothing is timed. docs/draw_results.py draws the results.
"""

from __future__ import annotations

import torch

from cjepa_kernels.bench import candidates, errors
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.script_options import read_options, save
from cjepa_kernels.tables import print_table

TEMPERATURES = (0.5, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
PAIRS, FEATURES, SEEDS = 257, 130, range(5)
FORMULAS = {"textbook": candidates.EAGER, "here": candidates.OURS}
KEYS = [f"{name}_{quantity}" for quantity in ("loss", "gradient") for name in FORMULAS]


def measure(temperature: float) -> Record:
    """The largest errors over all seeds, in fp32, for views that are 10 % apart."""
    row: Record = {"temperature": temperature}
    anchors = torch.arange(2 * PAIRS)
    for seed in SEEDS:
        z_i, noise = torch.randn(2, PAIRS, FEATURES, generator=torch.Generator().manual_seed(seed))
        views = (z_i.requires_grad_(), (z_i + 0.1 * noise).detach().requires_grad_())
        truth = errors.exact(*views, anchors, temperature=temperature)
        for name, candidate in FORMULAS.items():
            formula = candidates.find(candidate).make(temperature)
            for quantity, error in errors.of_formula(formula, views, truth, anchors).items():
                key = f"{name}_{quantity}"
                row[key] = max(row.get(key, 0.0), error)
    return row


def main() -> None:
    options = read_options(__doc__)
    rows = [measure(temperature) for temperature in TEMPERATURES]
    print_table(
        ["temperature", *KEYS],
        [[str(row["temperature"]), *(f"{row[key]:.0e}" for key in KEYS)] for row in rows],
    )
    save(options, "temperature_error_cpu", rows, pairs=PAIRS, features=FEATURES)


if __name__ == "__main__":
    main()
