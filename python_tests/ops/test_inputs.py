"""Unusual inputs: tensors made under inference_mode, two dtypes in one call, all kinds of views."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager import textbook_nt_xent
from ranks import Ranks
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor

from cjepa_kernels import (
    ContrastiveJEPALoss,
    HJEPALoss,
    NTXentLoss,
    cross_logsumexp,
    nt_xent,
    prediction_loss,
    reference,
)
from cjepa_kernels.reference import FLOATING

Pool = Callable[[int], Ranks]
PAIRS = [pair for pair in itertools.product(FLOATING, repeat=2) if pair[0] != pair[1]]


def names(pairs: list[tuple[torch.dtype, torch.dtype]]) -> list[str]:
    return ["-".join(str(dtype).removeprefix("torch.") for dtype in pair) for pair in pairs]


def both_lse(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    out = cross_logsumexp(x, y, **options)
    return out.row_lse.sum() + (2 * out.column_lse).sum()


def contrastive(z_i: Tensor, z_j: Tensor, **options: Any) -> Tensor:
    return nt_xent(z_i, z_j, **options).loss


LOSSES = {"nt_xent": contrastive, "cross_logsumexp": both_lse}


@pytest.fixture(params=LOSSES)
def loss_of(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return LOSSES[request.param]


def of_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.detach().clone()


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("side", [0, 1])
def test_keys_of_inference_mode(
    backend: str, loss_of: Callable[..., Tensor], side: int, cosine: bool
) -> None:
    """The query's gradient belongs to the keys of the forward, even if they change later."""
    options: dict[str, Any] = {"backend": backend, "use_cosine_similarity": cosine}
    views = [torch.randn(6, 8) for _ in range(2)]
    query = views[1 - side].requires_grad_()
    keys, results = of_inference_mode(views[side]), []
    for key in (views[side], keys):
        views[side] = key
        loss = loss_of(*views, **options)
        if key is keys:
            # A memory bank may store the next keys before the backward.
            with torch.inference_mode():
                keys.copy_(torch.randn(6, 8))
        results.append((loss.detach(), torch.autograd.grad(loss, query)[0]))
    assert keys.is_inference()
    assert results[0][1].abs().max() > 0
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_mask_and_temperature_of_inference_mode(backend: str) -> None:
    z_i, z_j = torch.randn(2, 6, 8).unbind()
    z_i.requires_grad_()
    mask, temperature = torch.rand(6, 6) < 0.3, torch.tensor(0.2)
    results = []
    for make in (torch.clone, of_inference_mode):
        loss = nt_xent(z_i, z_j, mask=make(mask), temperature=make(temperature), backend=backend)  # type: ignore[arg-type]
        of_lse = both_lse(z_i, make(z_j), temperature=make(temperature), backend=backend)
        results.append([loss.loss, *torch.autograd.grad(loss.loss + of_lse, z_i)])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_everything_of_inference_mode(backend: str) -> None:
    """Without a gradient, tensors of inference_mode give no error and the same values."""
    views = torch.randn(2, 6, 8).unbind()
    expected = nt_xent(*views, backend=backend)  # type: ignore[arg-type]
    inside = [of_inference_mode(z) for z in views]
    assert torch.equal(nt_xent(*inside, backend=backend).loss, expected.loss)  # type: ignore[arg-type]
    with torch.inference_mode():
        assert torch.equal(nt_xent(*inside, backend=backend).loss, expected.loss)  # type: ignore[arg-type]


def test_sides_and_masks_of_the_prediction_loss_of_inference_mode(backend: str) -> None:
    """The teacher's next forward may overwrite the targets before the backward."""
    prediction = torch.randn(2, 5, 8, requires_grad=True)
    target, mask = torch.randn(2, 5, 8), torch.rand(2, 5) < 0.7
    results = []
    for make in (torch.clone, of_inference_mode):
        sides = make(target), make(mask)
        loss = prediction_loss(
            prediction,
            sides[0],
            mask=sides[1],
            normalize_embeddings=False,
            loss_type="mse",
            backend=backend,  # type: ignore[arg-type]
        )
        if make is of_inference_mode:
            with torch.inference_mode():
                sides[0].zero_()
        results.append((loss.detach(), torch.autograd.grad(loss, prediction)[0]))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_keys_of_inference_mode_under_compile() -> None:
    """The operators save copies of the keys, as the plain formula does by normalising."""

    def step(query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        return contrastive(query, keys, mask=mask) + both_lse(query, keys)

    query = torch.randn(6, 8, requires_grad=True)
    keys, mask = torch.randn(6, 8), torch.rand(6, 6) < 0.3
    expected = torch.autograd.grad(step(query, keys, mask), query)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager_decomp_partition")
    loss = compiled(query, of_inference_mode(keys), of_inference_mode(mask))
    assert torch.equal(torch.autograd.grad(loss, query)[0], expected)


def inference_keys_on_ranks(strategy: Any) -> tuple[Tensor, Tensor]:
    rank = torch.distributed.get_rank()
    z_i, z_j = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(rank)).unbind()
    z_i.requires_grad_()
    gradients = []
    for key in (z_j, of_inference_mode(z_j)):
        loss = nt_xent(z_i, key, group=torch.distributed.group.WORLD, strategy=strategy).loss
        gradients.append(torch.autograd.grad(loss, z_i)[0])
    return gradients[0], gradients[1]


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_keys_of_inference_mode_on_ranks(ranks: Pool, strategy: str) -> None:
    for expected, actual in ranks(2).run(inference_keys_on_ranks, strategy):
        assert torch.equal(actual, expected)


def usual_formula(loss_of: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The loss in eager PyTorch.

    It promotes the inputs by hand, because autocast on CPUs has no ``torch.cat`` for fp16.
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    if loss_of is contrastive:
        return textbook_nt_xent(a.to(dtype), b.to(dtype)).mean()
    rows, columns = (F.normalize(z, dim=1, eps=1e-8) for z in (a, b))
    logits = rows.to(dtype) @ columns.to(dtype).T / 0.1
    return logits.logsumexp(1).sum() + (2 * logits.logsumexp(0)).sum()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=names(PAIRS))
def test_two_dtypes(
    backend: str,
    loss_of: Callable[..., Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
    autocast: bool,
) -> None:
    """The loss is that of the promoted inputs. Each gradient has the dtype of its input."""
    views = [torch.randn(9, 16).to(dtype).requires_grad_() for dtype in dtypes]
    truth_views = [z.detach().double().requires_grad_() for z in views]
    if loss_of is contrastive:
        truth = reference.nt_xent(*truth_views).loss.mean()
    else:
        both = reference.cross_logsumexp(*truth_views)
        truth = both.row_lse.sum() + (2 * both.column_lse).sum()
    truth_gradients = torch.autograd.grad(truth, truth_views)
    mode = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with mode:
        loss = loss_of(*views, backend=backend)
        eager = usual_formula(loss_of, *views)
    gradients = torch.autograd.grad(loss, views)
    eager_gradients = torch.autograd.grad(eager, views)

    wide = torch.promote_types(*dtypes)
    assert loss.dtype == wide
    rounded = torch.bfloat16 if autocast and wide != torch.float64 else wide
    error = relative_error(eager, truth)
    assert relative_error(loss, truth) <= FLOOR_VALUE[rounded] + 2 * error
    for z, gradient, expected, of_eager in zip(
        views, gradients, truth_gradients, eager_gradients, strict=True
    ):
        assert gradient.dtype == z.dtype
        # The product rounds to one dtype, and then the gradient is rounded to that of its input.
        floor = max(FLOOR_GRADIENT[z.dtype], FLOOR_GRADIENT[rounded])
        assert relative_error(gradient, expected) <= floor + 2 * relative_error(of_eager, expected)


def test_two_dtypes_are_their_promotion(backend: str, loss_of: Callable[..., Tensor]) -> None:
    """A call with two dtypes gives the bits of a call with promoted inputs."""
    for dtypes in PAIRS:
        a, b = (torch.randn(5, 8).to(dtype) for dtype in dtypes)
        wide = torch.promote_types(*dtypes)
        expected = loss_of(a.to(wide), b.to(wide), backend=backend)
        assert torch.equal(loss_of(a, b, backend=backend), expected)


def test_two_dtypes_in_modules(backend: str) -> None:
    a, b = torch.randn(2, 4, 3, 8).unbind()
    a = a.bfloat16()
    out = NTXentLoss(backend=backend, return_logits=True)(a, b)  # type: ignore[arg-type]
    expected = NTXentLoss(backend=backend, return_logits=True)(a.float(), b)  # type: ignore[arg-type]
    assert all(torch.equal(out[name], expected[name]) for name in expected)
    loss_fn = ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1), backend=backend)  # type: ignore[arg-type]
    a.requires_grad_()
    out = loss_fn([b], [b], a, b)
    assert torch.equal(out["contrastive_loss"], loss_fn([b], [b], a.float(), b)["contrastive_loss"])
    assert torch.autograd.grad(out["loss"], a)[0].dtype == torch.bfloat16


def test_equal_dtypes_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []
    convert = Tensor.to
    monkeypatch.setattr(
        Tensor, "to", lambda x, *args, **kw: converted.append(args) or convert(x, *args, **kw)
    )
    for dtype in FLOATING:
        z = torch.randn(3, 4, dtype=dtype)
        nt_xent(z, z, backend="native")
        cross_logsumexp(z, z, backend="native")
    assert converted == []


def two_dtypes_on_ranks(same: bool) -> str | float:
    z_i, z_j = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    if same:
        views = z_i.bfloat16(), z_j
    else:  # both views are bf16 on rank 0, and rank 1 promotes them to fp32
        views = z_i.bfloat16(), z_j.bfloat16() if torch.distributed.get_rank() == 0 else z_j
    group = torch.distributed.group.WORLD
    try:
        loss = nt_xent(*views, group=group).loss
    except ValueError as error:
        return str(error)
    return (loss - nt_xent(views[0].float(), views[1].float(), group=group).loss).item()


def test_two_dtypes_on_ranks(ranks: Pool) -> None:
    assert ranks(2).run(two_dtypes_on_ranks, True) == [0.0, 0.0]
    for message in ranks(2).run(two_dtypes_on_ranks, False):
        assert "dtype of z_i and z_j must be the same on every rank" in message
        assert "bfloat16" in message


def test_distributed_without_a_process_group_is_one_process(backend: str) -> None:
    assert not torch.distributed.is_initialized()
    views = torch.randn(2, 5, 8).unbind()
    for mask in (None, torch.rand(5, 5) < 0.3):
        out = NTXentLoss(distributed=True, backend=backend)(*views, mask)  # type: ignore[arg-type]
        expected = NTXentLoss(backend=backend)(*views, mask)  # type: ignore[arg-type]
        assert all(torch.equal(out[name], expected[name]) for name in expected)


def all_ranks_once_there_is_a_group() -> tuple[float, float, float]:
    rank = torch.distributed.get_rank()
    z_i, z_j = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(rank)).unbind()
    group = nt_xent(z_i, z_j, group=torch.distributed.group.WORLD).loss
    loss_fn = NTXentLoss(distributed=True)
    return loss_fn(z_i, z_j)["loss"].item(), group.item(), nt_xent(z_i, z_j).loss.item()


def test_distributed_with_a_process_group_is_all_ranks(ranks: Pool) -> None:
    for module, group, alone in ranks(2).run(all_ranks_once_there_is_a_group):
        assert module == group
        assert module != alone


# Different layouts of a (9, 6) tensor in memory.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 2)[..., 0],
    "slice": lambda x: F.pad(x, (3, 2, 1, 4), value=torch.nan)[1:10, 3:9],
    "negated": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "flipped": lambda x: x.flip(0, 1).flip(0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(backend: str, loss_of: Callable[..., Tensor], view: str) -> None:
    values = torch.randn(2, 9, 6)
    results = []
    for make in (torch.clone, VIEWS[view]):
        leaves = [make(x).requires_grad_() for x in values]
        assert view == "flipped" or torch.equal(leaves[0], values[0])
        loss = loss_of(*leaves, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) <= FLOOR_GRADIENT[torch.float32]


def test_expanded_rows(backend: str, loss_of: Callable[..., Tensor]) -> None:
    """The gradient of a row that is expanded to all rows is the sum over all rows."""
    row, other = torch.randn(1, 6, requires_grad=True), torch.randn(9, 6)
    copies = row.detach().repeat(9, 1).requires_grad_()
    (actual,) = torch.autograd.grad(loss_of(row.expand(9, 6), other, backend=backend), row)
    (expected,) = torch.autograd.grad(loss_of(copies, other, backend=backend), copies)
    assert relative_error(actual[0], expected.sum(0)) <= FLOOR_GRADIENT[torch.float32]


@pytest.mark.parametrize("side", [0, 1])
def test_one_side_alone_has_a_gradient(
    backend: str, loss_of: Callable[..., Tensor], side: int
) -> None:
    views = [torch.randn(9, 6, requires_grad=True) for _ in range(2)]
    expected = torch.autograd.grad(loss_of(*views, backend=backend), views)[side]
    views[1 - side] = views[1 - side].detach()
    (actual,) = torch.autograd.grad(loss_of(*views, backend=backend), views[side])
    assert relative_error(actual, expected) <= FLOOR_GRADIENT[torch.float32]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_temperature_of_another_dtype(
    backend: str, loss_of: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """Every dtype represents 0.25, so the result is the same.

    The gradient has the dtype of the temperature.
    """
    views = torch.randn(2, 9, 6).unbind()
    temperature = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    plain = torch.tensor(0.25, requires_grad=True)
    losses = [loss_of(*views, temperature=t, backend=backend) for t in (temperature, plain)]
    gradients = torch.autograd.grad(losses, (temperature, plain))
    assert relative_error(losses[0], losses[1]) <= FLOOR_VALUE[torch.float32]
    assert gradients[0].dtype == dtype
    floor = max(FLOOR_GRADIENT[dtype], FLOOR_GRADIENT[torch.float32])
    assert relative_error(gradients[0], gradients[1]) <= floor


def test_upstream_gradient_of_zeros(backend: str, loss_of: Callable[..., Tensor]) -> None:
    """The upstream gradient is a lazy tensor of zeros, which has no memory."""
    z = torch.randn(9, 6, requires_grad=True)
    loss = loss_of(z, torch.randn(9, 6), backend=backend)
    (gradient,) = torch.autograd.grad(loss, z, torch._efficientzerotensor(()))
    assert torch.equal(gradient, torch.zeros(9, 6))
