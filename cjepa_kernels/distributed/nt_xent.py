"""NT-Xent of a group of ranks, which exchange features and never similarities.

Rank r holds M_r of the M rows. The operator ``nt_xent`` computes its own block of S, and the
operator ``cross_logsumexp`` the rectangles of its rows and the rows of other ranks:

    LSE-_a   = log of the sum of exp(LSE-) of the own block and of all rectangles of row a
    x_a      = LSE-_a - l_pos,  loss_a = softplus(x_a),  r_a = sigmoid(x_a)
    dL/ds_ab = (1/tau) [ g_a r_a exp(l_ab - LSE-_a) + g_b r_b exp(l_ab - LSE-_b) ]   over ranks too

The last line is the rectangle's backward with g r as the upstream gradients of both sides, so a row
travels with (g r, LSE-). A row and its positive are always on the same rank.

The decoupled loss (DCL) is x_a itself, and r_a is 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import reference
from cjepa_kernels.chunked.rows import operands
from cjepa_kernels.definitions import STRATEGIES, NTXentOutput
from cjepa_kernels.distributed import group as ranks_of_group
from cjepa_kernels.distributed.blocks import Blocks, Options
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.group import YES_OR_NO, GlobalBatch, Setting, shared_settings
from cjepa_kernels.distributed.reference import gather_pairs
from cjepa_kernels.distributed.strategies import (
    Backward,
    choose_strategy,
    gather_backward,
    gather_forward,
    ring_backward,
    ring_forward,
)

REFERENCE = "reference"
SETTINGS = 12  # the number of settings that the ranks compare


def agree(
    z_i: Tensor,
    temperature: Tensor | None,
    options: Options,
    group: dist.ProcessGroup,
    *,
    has_labels: bool,
) -> GlobalBatch:
    """Exchange the numbers of pairs, and check that all ranks have the same options.

    Args:
        z_i: (B_r, D); B_r may be 0, which is an error on every rank.
        temperature: () in place of the options' number.
        options: The same on every rank.
        group: The ranks.
        has_labels: Whether samples have labels, the same on every rank.

    Raises:
        ValueError: On all ranks alike, if a rank has no pair or another value of an option, or
            refused its arguments.
        RuntimeError: A rank ended, or did not take part before the timeout.
    """
    settings = shared_settings(
        "z_i, z_j",
        z_i,
        temperature=options.temperature if temperature is None else temperature,
        product_dtype=options.product_dtype,
        is_reference=options.overload == REFERENCE,
        needs_gradient=options.needs_gradient,
        use_cosine_similarity=options.use_cosine_similarity,
        eps=options.eps,
        reduction=options.reduction,
    )
    settings += [
        Setting("strategy", options.strategy, STRATEGIES),
        Setting("decoupled", options.decoupled, YES_OR_NO),
        Setting("whether labels are given", has_labels, YES_OR_NO),
    ]
    if len(settings) != SETTINGS:
        raise RuntimeError(f"expected {SETTINGS} settings, got {len(settings)}")
    batch = ranks_of_group.agree(z_i, settings, group)
    if options.decoupled and batch.rows == 2:
        raise ValueError(
            'decoupled must be False (and contrastive_type not "dcl") without negatives, whose '
            "log-sum-exp is -inf, got one pair in "
            "all ranks together"
        )
    return batch


def refuse(device: torch.device, group: dist.ProcessGroup) -> None:
    """Tell the other ranks, which are in :func:`agree`, that this rank refuses its arguments."""
    ranks_of_group.refuse(device, group, settings=SETTINGS)


def nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: Tensor | None,
    options: Options,
    batch: GlobalBatch,
    group: dist.ProcessGroup,
) -> NTXentOutput:
    """NT-Xent of this rank's pairs with negatives from every rank of the group.

    Args:
        z_i: (B_r, D).
        z_j: Same shape.
        temperature: () in place of the options' number.
        options: The same on every rank.
        batch: The pairs of all ranks, as :func:`agree` returned them.
        group: The ranks.

    Returns:
        The loss and the log-sum-exps of this rank's rows, and the metrics of all ranks.

    Raises:
        RuntimeError: A rank ended, or did not take part before the timeout.
    """
    if options.overload == REFERENCE:
        return _reference(
            z_i, z_j, temperature=temperature, options=options, batch=batch, group=group
        )
    strategy = choose_strategy(options.strategy, batch, z_i)
    options = replace(options, strategy=strategy)
    function: Any = _GroupNTXent.apply
    inputs = Inputs(
        z_i=z_i, z_j=z_j, temperature=temperature, options=options, batch=batch, group=group
    )
    return NTXentOutput(*function(*inputs))


class Inputs(NamedTuple):
    """Inputs of the autograd function, or whether each needs a gradient."""

    z_i: Any  # Tensor (B_r, D)
    z_j: Any  # Tensor (B_r, D)
    temperature: Any  # Tensor () or None
    options: Any
    batch: Any
    group: Any


class InputGradients(NamedTuple):
    """Gradients of the autograd function's inputs; options, batch and group have none."""

    z_i: Tensor | None  # (B_r, D)
    z_j: Tensor | None  # (B_r, D)
    temperature: Tensor | None  # ()
    options: None = None
    batch: None = None
    group: None = None


class _GroupNTXent(torch.autograd.Function):
    """The loss of the own rows, in a group of ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        z_i: Tensor,
        z_j: Tensor,
        temperature: Tensor | None,
        options: Options,
        batch: GlobalBatch,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, ...]:
        forward = ring_forward if options.strategy == "ring" else gather_forward
        with torch.autocast(z_i.device.type, enabled=False):
            exchange, blocks = Exchange(group), Blocks(options, temperature, z_i.dtype)
            results = forward(z_i=z_i, z_j=z_j, blocks=blocks, batch=batch, exchange=exchange)
            out = _finish(
                z_i,
                z_j,
                rows=results.rows,
                positive=results.positive,
                blocks=blocks,
                batch=batch,
                exchange=exchange,
            )
        saved = Saved(
            z_i=z_i,
            z_j=z_j,
            temperature=temperature,
            shift_and_log_sum=results.rows[:, :2].to(results.positive.dtype),
            positive=results.positive,
            saved_for_backward=results.saved_for_backward,
            others=results.others,
        )
        ctx.save_for_backward(*saved)
        ctx.options, ctx.batch, ctx.group = options, batch, group
        ctx.mark_non_differentiable(
            out.accuracy, out.positive_similarity, out.negative_similarity, out.lse
        )
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return InputGradients(z_i=None, z_j=None, temperature=None)
        saved = Saved(*ctx.saved_tensors)
        z_i, z_j, temperature = saved.z_i, saved.z_j, saved.temperature
        positive = saved.positive
        options, batch = ctx.options, ctx.batch
        backward = ring_backward if options.strategy == "ring" else gather_backward
        with torch.no_grad(), torch.autocast(z_i.device.type, enabled=False):
            exchange = Exchange(ctx.group, backward=True)
            blocks = Blocks(options, temperature, z_i.dtype)
            upstream = grad_loss.to(positive.dtype).expand(len(positive))
            if options.reduction == "mean":
                upstream = upstream * (batch.ranks / batch.rows)
            shift, log_sum = saved.shift_and_log_sum.unbind(dim=1)
            grad_logit = upstream  # g r
            if not options.decoupled:
                grad_logit = torch.sigmoid((shift - positive) / blocks.tau + log_sum) * upstream
            # (M_r, 3)
            weights = torch.stack([grad_logit.to(positive.dtype), shift, log_sum], dim=1)
            state = Backward(
                z_i=z_i,
                z_j=z_j,
                upstream=upstream,
                weights=weights,
                positive=positive,
                saved_for_backward=saved.saved_for_backward,
                others=saved.others,
            )
            grad, grad_temperature = backward(state, blocks, batch, exchange)
            if temperature is not None:
                grad_temperature = grad_temperature.to(temperature.dtype)
            grad_z_i, grad_z_j = grad[: len(z_i)].to(z_i.dtype), grad[len(z_i) :].to(z_j.dtype)
        if torch.is_grad_enabled():
            apply: Any = _NoSecondDerivative.apply
            gradients = (grad_z_i, grad_z_j, grad_temperature)
            grad_z_i, grad_z_j, grad_temperature = apply(z_i, z_j, temperature, *gradients)
        needs = Inputs(*ctx.needs_input_grad)
        return InputGradients(
            z_i=grad_z_i if needs.z_i else None,
            z_j=grad_z_j if needs.z_j else None,
            temperature=grad_temperature if needs.temperature else None,
        )


class Saved(NamedTuple):
    """Tensors that the forward saves for the backward."""

    z_i: Tensor  # (B_r, D)
    z_j: Tensor  # (B_r, D)
    temperature: Tensor | None  # ()
    shift_and_log_sum: Tensor  # (M_r, 2), LSE- over the negatives of all ranks
    positive: Tensor  # (M_r,) similarity of each row and its positive
    saved_for_backward: Tensor  # of the own block
    others: Tensor  # features of other ranks


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients as functions of the inputs, whose own gradient is an error."""

    @staticmethod
    def forward(ctx: Any, z_i: Tensor, z_j: Tensor, tau: Any, *gradients: Tensor) -> Any:
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("nt_xent of a group has no second derivative")


def _finish(
    z_i: Tensor,
    z_j: Tensor,
    *,
    rows: Tensor,
    positive: Tensor,
    blocks: Blocks,
    batch: GlobalBatch,
    exchange: Exchange,
) -> NTXentOutput:
    """Loss and LSE of the own rows, and the metrics of all ranks."""
    options, tau = blocks.options, blocks.tau
    shift, log_sum, largest_negative = rows.unbind(dim=1)
    own = positive.double()
    loss = (shift - own) / tau + log_sum
    if not options.decoupled:
        loss = -torch.nn.functional.logsigmoid(-loss)
    lse = torch.logaddexp(shift / tau + log_sum, own / tau)
    # The sum of s over the negatives is |sum z|^2 - sum |z|^2 - sum s_pos, from sums of rows alone.
    features = z_i.shape[1]
    row_sum, squares = own.new_zeros(features), own.new_zeros(())  # (D,) and ()
    for z in (z_i, z_j):
        unit = operands(z, options.use_cosine_similarity, options.eps, options.product_dtype)
        row_sum += unit.sum(dim=0, dtype=torch.float64)
        squares += unit.square().sum(dtype=torch.float64)
    hits = (own > largest_negative).sum(dtype=torch.float64)
    sums = torch.cat([row_sum, torch.stack([squares, own.sum(), hits])])
    exchange.all_reduce(sums)
    row_sum = sums[:features]
    squares, positives, hits = sums[features:].unbind()
    # A NaN of any rank makes the accuracy 0. Kernels may leave a NaN out of their maxima.
    hits = hits.where(~squares.isnan(), 0.0)
    negatives = batch.rows * (batch.rows - 2)
    negative = (row_sum.square().sum() - squares - positives) / (negatives or torch.nan)
    out = NTXentOutput(
        loss=_reduce(loss, options, batch),
        accuracy=hits / batch.rows,
        positive_similarity=positives / batch.rows,
        negative_similarity=negative,
        lse=lse,
    )
    return NTXentOutput(*(x.to(positive.dtype) for x in out))


def _reduce(loss: Tensor, options: Options, batch: GlobalBatch) -> Tensor:
    """The loss of this rank, whose mean over the ranks is the loss of the whole batch."""
    if options.reduction == "mean":
        return loss.sum() * (batch.ranks / batch.rows)
    return reference.reduce(loss, options.reduction)


def _reference(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: Tensor | None,
    options: Options,
    batch: GlobalBatch,
    group: dist.ProcessGroup,
) -> NTXentOutput:
    """Loss and LSE of the own rows by the formula in plain autograd, on the pairs of all ranks."""
    pairs = gather_pairs(z_i, z_j, batch, group)
    with torch.autocast(z_i.device.type, enabled=False):
        terms = reference.nt_xent(
            pairs.z_i,
            pairs.z_j,
            temperature=options.temperature if temperature is None else temperature,
            use_cosine_similarity=options.use_cosine_similarity,
            eps=options.eps,
            decoupled=options.decoupled,
        )
        loss, lse = (x.view(2, -1)[:, pairs.own].flatten() for x in (terms.loss, terms.lse))
        return NTXentOutput(
            loss=_reduce(loss, options, batch),
            accuracy=terms.accuracy,
            positive_similarity=terms.positive_similarity,
            negative_similarity=terms.negative_similarity,
            lse=lse,
        )
