"""Errors of loss and gradients against float64, on the inputs that are timed."""

from __future__ import annotations

from typing import Any

import torch
from plan import find_formula

from cjepa_kernels.bench.errors import checked_anchors, exact, relative_error
from cjepa_kernels.bench.sizes import DTYPES, Size, views

HEADER = ["M", "D", "dtype", "rows checked", "relative error of", "native", "eager"]
QUANTITIES = ("loss", "grad_z_i", "grad_z_j")


def measure_errors(size: Size, dtype: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Errors of each name at a size: one record each, for the results file."""
    z_i, z_j = views(size, dtype=DTYPES[dtype])
    anchors = checked_anchors(size.rows)
    truth = exact(z_i, z_j, anchors)
    of_view_i = int((anchors < len(z_i)).sum())
    expected = (truth.loss, truth.gradient[:of_view_i], truth.gradient[of_view_i:])
    records = []
    for name in names:
        loss = find_formula(name, (z_i, z_j))(z_i, z_j)
        gradient = torch.cat(torch.autograd.grad(loss, (z_i, z_j)))[anchors]
        actual = (loss.detach(), gradient[:of_view_i], gradient[of_view_i:])
        errors = {
            quantity: relative_error(*pair)
            for quantity, *pair in zip(QUANTITIES, actual, expected, strict=True)
        }
        records.append(
            {
                "M": size.rows,
                "D": size.features,
                "dtype": dtype,
                "name": name,
                "rows_checked": len(anchors),
                **errors,
            }
        )
    return records


def table(records: list[dict[str, Any]]) -> list[list[str]]:
    """Rows under ``HEADER``: native beside eager, one line a quantity."""
    cases: dict[tuple[int, int, str, int], dict[str, dict[str, Any]]] = {}
    for record in records:
        key = (record["M"], record["D"], record["dtype"], record["rows_checked"])
        cases.setdefault(key, {})[record["name"]] = record
    return [
        [
            *map(str, case),
            quantity,
            *(f"{by_name[n][quantity]:.1e}" if n in by_name else "-" for n in ("native", "eager")),
        ]
        for case, by_name in cases.items()
        for quantity in QUANTITIES
    ]
