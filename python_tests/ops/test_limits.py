"""Extreme values: temperatures, very large and very small rows, single rows, NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from overloads import INTERPRETED
from ranks import Ranks
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor

from cjepa_kernels import cross_logsumexp, nt_xent, prediction_loss, reference

SEEDS = range(2 if INTERPRETED else 10)


def few(values: list[Any], *in_interpreter: Any) -> list[Any]:
    """All values, or only some in Triton's interpreter, in which a kernel takes a second."""
    return list(in_interpreter) if INTERPRETED else values


@pytest.mark.parametrize("value", few([math.nan, math.inf, -math.inf], math.nan), ids=str)
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
def test_an_embedding_that_is_no_number_makes_the_accuracy_0(
    backend: str, masked: bool, cosine: bool, value: float
) -> None:
    """This holds even if a mask excludes the embedding from the negatives of all others."""
    z_i = torch.eye(4, 6)
    z_j = z_i.clone()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    options: dict[str, Any] = {
        "mask": mask if masked else None,
        "use_cosine_similarity": cosine,
        "backend": backend,
    }
    assert nt_xent(z_i, z_j, **options).accuracy == 1
    for view in (z_i, z_j):
        original = view[1, 2].item()
        view[1, 2] = value
        out = nt_xent(z_i, z_j, **options)
        assert out.accuracy == 0
        assert out.loss.isnan()
        view[1, 2] = original


def accuracy_with_a_nan_on_rank_1(strategy: Any, backend: Any) -> tuple[float, float]:
    group = torch.distributed.group.WORLD
    z = torch.eye(8)[4 * torch.distributed.get_rank() :][:4]
    options: dict[str, Any] = {"group": group, "strategy": strategy, "backend": backend}
    before = nt_xent(z, z, **options).accuracy.item()
    if torch.distributed.get_rank() == 1:
        z = z.clone()
        z[2, 3] = math.nan
    return before, nt_xent(z, z, **options).accuracy.item()


@pytest.mark.skipif(INTERPRETED, reason="no kernel of Triton's has a part in it")
@pytest.mark.parametrize(
    ("strategy", "backend"), [("ring", "native"), ("all_gather", "chunked"), ("auto", "reference")]
)
def test_a_nan_on_one_rank_makes_the_accuracy_0_on_all(
    ranks: Callable[[int], Ranks], strategy: str, backend: str
) -> None:
    assert ranks(2).run(accuracy_with_a_nan_on_rank_1, strategy, backend) == [(1, 0), (1, 0)]


def lse_case(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x, y = (torch.randn(n, 16) for n in (rows, columns))
    if rows > 1 and columns > 1:
        return x, y
    # The rows are nearly orthogonal to the only row of the other side, and fp32 represents their
    # cosines exactly. Their log-sum-exp is close to 0.
    one, many = (x, y) if rows == 1 else (y, x)
    one.zero_()
    many.zero_()
    one[:, 0] = many[:, 1] = 1
    many[:, 0] = 2.0 ** torch.randint(-15, -12, (len(many),)) * (1 if seed % 2 else -1)
    return x, y


@pytest.mark.parametrize("temperature", few([0.03, 0.1, 0.5, 10.0], 0.1))
@pytest.mark.parametrize(
    "shape",
    few([(1, 1), (1, 2), (2, 1), (3, 1), (1, 8), (2, 2), (40, 1), (9, 9)], (1, 1), (3, 1), (2, 2)),
    ids=str,
)
def test_log_sum_exps_near_0(backend: str, shape: tuple[int, int], temperature: float) -> None:
    """The error is relative to the largest value, which is small for a single row or column."""
    for seed in SEEDS:
        x, y = lse_case(*shape, seed)
        out = cross_logsumexp(x, y, temperature=temperature, backend=backend)  # type: ignore[arg-type]
        truth = reference.cross_logsumexp(x.double(), y.double(), temperature=temperature)
        logits = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / temperature
        for actual, expected, eager in zip(
            out, truth, (logits.logsumexp(1), logits.logsumexp(0)), strict=False
        ):
            bound = FLOOR_VALUE[torch.float32] + 2 * relative_error(eager, expected)
            assert relative_error(actual, expected) <= bound


def gradients_of_few(inputs: list[Tensor], backend: Any) -> tuple[Tensor, ...]:
    inputs = [x.requires_grad_() for x in inputs]
    out = cross_logsumexp(*inputs, backend=backend)
    return torch.autograd.grad(out.row_lse.sum() + 2 * out.column_lse.sum(), inputs)


@pytest.mark.parametrize(
    "shape", few([(1, 1), (1, 5), (5, 1), (8, 300), (9, 300)], (5, 1)), ids=str
)
def test_gradients_of_a_few_rows(backend: str, shape: tuple[int, int]) -> None:
    """The shapes lie on both sides of the number of rows from which the shift is constant."""
    x, y = lse_case(*shape, 0)
    gradients = gradients_of_few([x.clone(), y.clone()], backend)
    truth = gradients_of_few([x.double(), y.double()], "reference")
    for actual, expected in zip(gradients, truth, strict=True):
        assert relative_error(actual, expected) <= FLOOR_GRADIENT[torch.float32]


LARGE = [1e10, 1e15, 3e18, 1e19, 1e25, 1e30, 1e37, 1e38]


@pytest.mark.parametrize("size", few(LARGE, 3e18, 1e38), ids=str)
@pytest.mark.parametrize("features", few([5, 48], 5))
def test_layer_norm_of_large_targets(backend: str, features: int, size: float) -> None:
    """The results are those of float64, which can represent the squares of the targets."""
    prediction = torch.randn(3, 4, features)
    target = torch.rand(3, 4, features) * 2 - 1
    target[0, 0] += 3.0  # the deviations are small beside this mean
    target[0, 0] /= target[0, 0].abs().max()
    target *= size
    target[1, 1] = size / 1.7  # all elements of this row are equal
    target[2, 2] /= size  # this row has an ordinary size
    results = []
    for inputs in ([prediction, target], [prediction.double(), target.double()]):
        p, t = (x.clone().requires_grad_() for x in inputs)
        loss = prediction_loss(
            p,
            t,
            target_norm="layer",
            reduction="none",
            backend=backend,  # type: ignore[arg-type]
        )
        of_p, of_t = torch.autograd.grad(loss.sum(), (p, t))
        results.append((loss, of_p, of_t[0, 1], of_t[2, 2]))
    for actual, expected in zip(*results, strict=True):
        assert actual.isfinite().all()
        if expected.ndim == 3:
            # The row of equal elements is left out: rounding to fp32 may give them a deviation.
            actual, expected = actual.flatten(0, 1), expected.flatten(0, 1)
            others = torch.arange(12) != 5
            actual, expected = actual[others], expected[others]
        assert relative_error(actual, expected) <= 8 * FLOOR_GRADIENT[torch.float32]


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_large_targets_that_are_no_numbers(backend: str, value: float) -> None:
    target = 1e30 * torch.randn(3, 8)
    target[1, 3] = value
    loss = prediction_loss(
        torch.randn(3, 8),
        target,
        target_norm="layer",
        reduction="none",
        backend=backend,  # type: ignore[arg-type]
    )
    assert loss.isnan().any(dim=1).tolist() == [False, True, False]


def test_scales_of_rows_are_powers_of_two_where_they_are_needed() -> None:
    for dtype, largest in ((torch.float32, 127), (torch.float64, 1023)):
        z = torch.tensor([0.0, 1.0, 2.0**50, 1.1 * 2.0**50, 1.9 * 2.0**largest], dtype=dtype)
        scale = reference.scale_of_rows(z[:, None])[:, 0]
        assert scale.dtype == dtype
        assert scale[:3].tolist() == [1, 1, 1]
        assert torch.frexp(scale[3:]).mantissa.tolist() == [0.5, 0.5]
        assert ((z * scale)[3:] < 2.0**41).all()
        assert ((z * scale)[3:] > 2.0**38).all()
    unnumbered = torch.tensor([[math.nan], [math.inf]])
    assert reference.scale_of_rows(unnumbered).tolist() == [[1], [1]]


@pytest.mark.parametrize("temperature", few([1e-30, 1e-20, 1e-5, 1e5, 1e30], 1e-30, 1e30))
def test_temperatures_at_the_ends_of_their_range(backend: str, temperature: float) -> None:
    z_i, z_j = (
        z.requires_grad_() for z in torch.randn(2, 5, 9)
    )  # rounding may make s_ab differ from s_ba
    out = nt_xent(z_i, z_j, temperature=temperature, backend=backend)  # type: ignore[arg-type]
    truth = reference.nt_xent(z_i.double(), z_j.double(), temperature=temperature)
    assert relative_error(out.loss, truth.loss.mean()) <= FLOOR_VALUE[torch.float32]
    for actual, expected in zip(
        torch.autograd.grad(out.loss, (z_i, z_j)),
        torch.autograd.grad(truth.loss.mean(), (z_i, z_j)),
        strict=True,
    ):
        assert relative_error(actual, expected.double()) <= FLOOR_GRADIENT[torch.float32]
    both = cross_logsumexp(z_i, z_j, temperature=temperature, backend=backend)  # type: ignore[arg-type]
    of_both = reference.cross_logsumexp(z_i.double(), z_j.double(), temperature=temperature)
    assert relative_error(both.row_lse, of_both.row_lse) <= FLOOR_VALUE[torch.float32]
    assert relative_error(both.column_lse, of_both.column_lse) <= FLOOR_VALUE[torch.float32]
    as_tensor = torch.tensor(temperature)
    of_tensor = nt_xent(z_i, z_j, temperature=as_tensor, backend=backend)  # type: ignore[arg-type]
    assert relative_error(of_tensor.loss, out.loss) <= FLOOR_VALUE[torch.float32]


@pytest.mark.parametrize(
    "temperature", few([0.0, -1.0, 1e-38, 1e38, math.inf, math.nan], 1e-38, 1e38)
)
def test_a_temperature_tensor_out_of_range_gives_nan(backend: str, temperature: float) -> None:
    z_i, z_j = torch.randn(2, 6, 8).unbind()
    z_i.requires_grad_()
    tau = torch.tensor(temperature)
    out = nt_xent(z_i, z_j, temperature=tau, backend=backend)  # type: ignore[arg-type]
    both = cross_logsumexp(z_i, z_j, temperature=tau, backend=backend)  # type: ignore[arg-type]
    for value in (out.loss, out.lse, both.row_lse, both.column_lse):
        assert value.isnan().all()
    (gradient,) = torch.autograd.grad(out.loss, z_i)
    assert gradient.isnan().all()


@pytest.mark.parametrize("size", few([1e-44, 1e-38, 1e-20, 1e10, 1e18, 1e30], 1e-44, 1e30), ids=str)
@pytest.mark.parametrize("features", few([2, 7], 7))
def test_rows_of_any_size(backend: str, features: int, size: float) -> None:
    """Cosines are those of F.normalize, for subnormal rows and for rows whose squares overflow."""
    z_i, z_j = (size * torch.randn(2, 5, features)).unbind()
    out = nt_xent(z_i, z_j, temperature=0.5, backend=backend)  # type: ignore[arg-type]
    unit = F.normalize(torch.cat([z_i, z_j]), dim=1, eps=1e-8).double()
    logits = (unit @ unit.T / 0.5).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.arange(10).roll(5))
    assert relative_error(out.loss, expected) <= FLOOR_VALUE[torch.float32]
    both = cross_logsumexp(z_i, z_j, temperature=0.5, backend=backend)  # type: ignore[arg-type]
    of_both = (unit[:5] @ unit[5:].T / 0.5).logsumexp(1)
    assert relative_error(both.row_lse, of_both) <= FLOOR_VALUE[torch.float32]


def test_a_mask_row_without_negatives(backend: str) -> None:
    """The loss and gradient of a sample without negatives are 0. The others do not change."""
    z_i, z_j = torch.randn(2, 5, 8).unbind()
    z_i.requires_grad_()
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2] = True
    losses = nt_xent(z_i, z_j, mask=mask, reduction="none", backend=backend).loss  # type: ignore[arg-type]
    others = [0, 1, 3, 4]
    alone = nt_xent(z_i[others], z_j[others], reduction="none", backend=backend).loss  # type: ignore[arg-type]
    assert losses.view(2, 5)[:, 2].tolist() == [0, 0]
    assert (
        relative_error(losses.view(2, 5)[:, others].flatten(), alone) <= FLOOR_VALUE[torch.float32]
    )
    (gradient,) = torch.autograd.grad(losses.sum(), z_i)
    assert torch.equal(gradient[2], torch.zeros(8))
    assert gradient[others].abs().sum() > 0
