"""Losses that users build from cross_logsumexp, and identities that other losses rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from overloads import OVERLOADS
from sample_inputs import cross_logsumexp_backward_inputs, cross_logsumexp_inputs
from tolerances import FLOOR_GRADIENT, relative_error
from torch import Tensor

from cjepa_kernels import backends, cross_logsumexp, nt_xent, ops

AVAILABLE = [name for name, status in backends().items() if status.available]


def random_rows(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_symmetric_info_nce_is_cross_entropy_both_ways(backend: Any, temperature: float) -> None:
    image, text = random_rows(25, 11), random_rows(25, 11)
    out = cross_logsumexp(image, text, temperature=temperature, backend=backend)
    positive = F.cosine_similarity(image, text) / temperature
    loss = ((out.row_lse - positive).mean() + (out.column_lse - positive).mean()) / 2
    logits = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T / temperature
    labels = torch.arange(25)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(loss, expected)
    for actual, truth in zip(
        torch.autograd.grad(loss, (image, text)),
        torch.autograd.grad(expected, (image, text)),
        strict=True,
    ):
        torch.testing.assert_close(actual, truth)


def test_nt_xent_from_rectangles(backend: Any) -> None:
    """NT-Xent and its gradient follow from the two views' rectangle and each view's square."""
    z_i, z_j = random_rows(21, 8), random_rows(21, 8)
    tau = 0.4
    views = cross_logsumexp(z_i, z_j, temperature=tau, backend=backend)
    positive = F.cosine_similarity(z_i, z_j) / tau
    losses = []
    for z, other in ((z_i, views.row_lse), (z_j, views.column_lse)):
        own = cross_logsumexp(z, z, temperature=tau, backend=backend).row_lse
        without_itself = own + torch.log1p(
            -torch.exp(1 / tau - own)
        )  # removes a row's own cosine, 1
        losses.append(torch.logaddexp(without_itself, other) - positive)
    loss = torch.cat(losses).mean()
    expected = nt_xent(z_i, z_j, temperature=tau, backend="reference").loss
    torch.testing.assert_close(loss, expected)
    for actual, truth in zip(
        torch.autograd.grad(loss, (z_i, z_j)),
        torch.autograd.grad(expected, (z_i, z_j)),
        strict=True,
    ):
        torch.testing.assert_close(actual, truth)


shapes_and_options: dict[str, Any] = {
    "rows": st.integers(1, 40),
    "columns": st.integers(1, 40),
    "features": st.integers(2, 20),
    "temperature": st.floats(1e-3, 100),
    "cosine": st.booleans(),
    "seed": st.integers(0, 2**31),
    "name": st.sampled_from(AVAILABLE),
}


@settings(max_examples=30, deadline=None)
@given(**shapes_and_options)
def test_swapping_the_sides_swaps_the_outputs(
    rows: int,
    columns: int,
    features: int,
    temperature: float,
    cosine: bool,
    seed: int,
    name: Any,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (random_rows(n, features, generator=generator) for n in (rows, columns))
    options: dict[str, Any] = {
        "temperature": temperature,
        "use_cosine_similarity": cosine,
        "backend": name,
    }
    out, swapped = cross_logsumexp(x, y, **options), cross_logsumexp(y, x, **options)
    order = [swapped.column_lse, swapped.row_lse, swapped.column_max, swapped.row_max]
    for actual, expected in zip(out, order, strict=True):
        torch.testing.assert_close(actual, expected)
    upstream = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (rows, columns)]
    for actual, expected in zip(
        torch.autograd.grad(out[:2], (x, y), upstream),
        torch.autograd.grad(swapped[:2], (x, y), upstream[::-1]),
        strict=True,
    ):
        # An element is near 0 if one column has all of the weight. The error is therefore relative
        # to the largest element.
        assert relative_error(actual, expected) <= 2 * FLOOR_GRADIENT[torch.float64]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 20),
    features=st.integers(2, 12),
    temperature=st.floats(1e-3, 10),
    seed=st.integers(0, 2**31),
    name=st.sampled_from(AVAILABLE),
)
def test_rectangles_add_up_to_nt_xent(
    batch: int, features: int, temperature: float, seed: int, name: Any
) -> None:
    """Both sides include the anchor's own logit, 1 / tau, so that nothing is subtracted."""
    generator = torch.Generator().manual_seed(seed)
    z_i, z_j = (random_rows(batch, features, generator=generator) for _ in range(2))
    options: dict[str, Any] = {"temperature": temperature, "backend": name}
    own = torch.tensor(1 / temperature, dtype=torch.float64)
    expected = torch.logaddexp(nt_xent(z_i, z_j, **options).lse, own)
    views = cross_logsumexp(z_i, z_j, **options)
    actual = [
        torch.logaddexp(cross_logsumexp(z, z, **options).row_lse, other)
        for z, other in ((z_i, views.row_lse), (z_j, views.column_lse))
    ]
    torch.testing.assert_close(torch.cat(actual), expected)


@settings(max_examples=25, deadline=None)
@given(**shapes_and_options, cut=st.floats(0, 1))
def test_parts_add_up_to_the_whole(
    rows: int,
    columns: int,
    features: int,
    temperature: float,
    cosine: bool,
    seed: int,
    name: Any,
    cut: float,
) -> None:
    """The columns come in two parts, as on the ranks of a ring.

    The rows' log-sum-exps of the parts add up. Those of the columns are independent.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = (random_rows(n, features, generator=generator) for n in (rows, columns + 1))
    options: dict[str, Any] = {
        "temperature": temperature,
        "use_cosine_similarity": cosine,
        "backend": name,
    }
    whole = cross_logsumexp(x, y, **options)
    at = 1 + int(cut * (columns - 1))
    left, right = (cross_logsumexp(x, part, **options) for part in (y[:at], y[at:]))
    torch.testing.assert_close(torch.logaddexp(left.row_lse, right.row_lse), whole.row_lse)
    torch.testing.assert_close(torch.cat([left.column_lse, right.column_lse]), whole.column_lse)
    torch.testing.assert_close(torch.maximum(left.row_max, right.row_max), whole.row_max)


@pytest.mark.parametrize(("cosine", "temperature"), [(True, 0.1), (True, 0.01), (False, 1.0)])
@OVERLOADS
def test_backward_of_parts_with_the_sums_of_the_whole(
    overload: str, cosine: bool, temperature: float
) -> None:
    """A ring over ranks computes gradients from a part of y and the log-sum-exp over all of y."""
    x, y = random_rows(19, 6), random_rows(40, 6)
    inputs = cross_logsumexp_inputs(x, y, temperature=temperature, use_cosine_similarity=cosine)
    grad_row = torch.randn(19, dtype=torch.float64)
    grad_column = torch.randn(40, dtype=torch.float64)
    with torch.no_grad():
        out = ops.run("cross_logsumexp", overload, **inputs)
        whole = cross_logsumexp_backward_inputs(inputs, out) | {
            "grad_row_lse": grad_row,
            "grad_column_lse": grad_column,
        }
        expected = ops.run("cross_logsumexp_backward", overload, **whole)
        # The whole log-sum-exp can also be in the shift: lse = shift / temperature + log_sum.
        as_one_number = {
            "row_shift": out.row_lse * temperature,
            "row_log_sum": torch.zeros_like(out.row_lse),
        }
        for saved_of_rows in ({}, as_one_number):
            parts = []
            for part in (slice(0, 27), slice(27, None)):
                of_part = {
                    "y": y[part],
                    "grad_column_lse": grad_column[part].contiguous(),
                    "column_shift": out.column_shift[part].contiguous(),
                    "column_log_sum": out.column_log_sum[part].contiguous(),
                }
                arguments = whole | saved_of_rows | of_part
                parts.append(ops.run("cross_logsumexp_backward", overload, **arguments))
            torch.testing.assert_close(parts[0].grad_x + parts[1].grad_x, expected.grad_x)
            torch.testing.assert_close(torch.cat([p.grad_y for p in parts]), expected.grad_y)


@pytest.mark.skipif(
    not backends()["native"].available, reason="the compiled kernels are not installed"
)
@pytest.mark.parametrize("shape", [(4300, 700), (500, 4200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_in_several_squares(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """There are more blocks than fit into the workspace of the backward at a time."""
    sides = [torch.randn(rows, 8).to(dtype).requires_grad_() for rows in shape]
    upstream = [torch.randn(rows) for rows in shape]
    gradients = []
    for backend in ("native", "chunked"):
        out = cross_logsumexp(sides[0], sides[1], backend=backend)  # type: ignore[arg-type]
        gradients.append(torch.autograd.grad(out[:2], sides, upstream))
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 4 * FLOOR_GRADIENT[dtype]
