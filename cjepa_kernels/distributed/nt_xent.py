"""NT-Xent of a group: features travel between the ranks, similarities never.

Rank r holds M_r of the M rows. Its own block of S is the NT-Xent operator's; against the rows of
other ranks there are rectangles, which the operator of the log-sum-exp of both sides computes:

    LSE-_a   = log of the sum of exp(LSE-) of the own block and of all rectangles of row a
    x_a      = LSE-_a - l_pos,  loss_a = softplus(x_a),  r_a = sigmoid(x_a)
    dL/ds_ab = (1/tau) [ g_a r_a exp(l_ab - LSE-_a) + g_b r_b exp(l_ab - LSE-_b) ]   over ranks too

The last line is the rectangle's backward with g r as the upstream gradients of both sides: what
travels with a row is (g r, LSE-). A positive is always of the own rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import chunked, reference
from cjepa_kernels.distributed.blocks import STRATEGIES, Blocks, Options
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.group import GlobalBatch, Setting, agree
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


def nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    temperature: Tensor | None,
    options: Options,
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """NT-Xent of this rank's pairs with negatives from every rank of the group.

    Args:
        z_i: (B_r, D); B_r may be 0, which is an error on every rank.
        z_j: Same shape.
        temperature: () in place of the options' number.
        options: The same on every rank.
        group: The ranks.

    Returns:
        As ``NTXentOutput``, of this rank's rows; the metrics are those of all ranks.

    Raises:
        ValueError: On all ranks alike, if one of them has no pair or asks for something else.
        RuntimeError: A rank ended, or did not take part in time.
    """
    batch = agree(z_i, _settings(z_i, temperature, options), group)
    if options.overload == REFERENCE:
        return _reference(z_i, z_j, temperature, options, batch, group)
    strategy = choose_strategy(options.strategy, batch, z_i)
    options = replace(options, strategy=strategy)
    function: Any = _GroupNTXent.apply
    outputs: tuple[Tensor, ...] = function(z_i, z_j, temperature, options, batch, group)
    return outputs


def _settings(z: Tensor, temperature: Tensor | None, options: Options) -> list[Setting]:
    yes_or_no = (False, True)
    number = options.temperature
    if temperature is not None and temperature.device.type == "cpu":
        number = temperature.item()  # elsewhere reading it would have the host wait
    return [
        Setting("the dtype of z_i and z_j", z.dtype, reference.FLOATING),
        Setting("autocast's dtype", options.product_dtype, (None, *reference.FLOATING)),
        Setting("whether backend is the reference", options.overload == REFERENCE, yes_or_no),
        Setting("requires_grad of z_i, z_j or temperature", options.needs_gradient, yes_or_no),
        Setting("whether temperature is a tensor", temperature is not None, yes_or_no),
        Setting("temperature", number),
        Setting("use_cosine_similarity", options.cosine, yes_or_no),
        Setting("eps", options.eps),
        Setting("reduction", options.reduction, reference.REDUCTIONS),
        Setting("strategy", options.strategy, STRATEGIES),
    ]


class _GroupNTXent(torch.autograd.Function):
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
            left = forward(z_i, z_j, blocks, batch, exchange)
            outputs = _finish(z_i, z_j, left.rows, left.positive, blocks, batch, exchange)
        lse = left.rows[:, :2].to(left.positive.dtype)
        ctx.save_for_backward(z_i, z_j, temperature, lse, left.positive, left.kept, left.others)
        ctx.options, ctx.batch, ctx.group = options, batch, group
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        z_i, z_j, temperature, lse, positive, kept, others = ctx.saved_tensors
        options, batch = ctx.options, ctx.batch
        backward = ring_backward if options.strategy == "ring" else gather_backward
        with torch.no_grad(), torch.autocast(z_i.device.type, enabled=False):
            exchange = Exchange(ctx.group, backward=True)
            blocks = Blocks(options, temperature, z_i.dtype)
            upstream = grad_loss.to(positive.dtype).expand(len(positive))
            if options.reduction == "mean":
                upstream = upstream * (batch.ranks / batch.rows)
            shift, log_sum = lse.unbind(dim=1)
            pull = torch.sigmoid((shift - positive) / blocks.tau + log_sum) * upstream
            weights = torch.stack([pull.to(positive.dtype), shift, log_sum], dim=1)  # (M_r, 3)
            state = Backward(z_i, z_j, upstream, weights, positive, kept, others)
            grad, grad_temperature = backward(state, blocks, batch, exchange)
            if temperature is not None:
                grad_temperature = grad_temperature.to(temperature.dtype)
            gradients = [grad[: len(z_i)].to(z_i.dtype), grad[len(z_i) :].to(z_j.dtype)]
        if torch.is_grad_enabled():
            apply: Any = _NoSecondDerivative.apply
            *gradients, grad_temperature = apply(
                z_i, z_j, temperature, *gradients, grad_temperature
            )
        wanted = zip(ctx.needs_input_grad, (*gradients, grad_temperature), strict=False)
        return (*(gradient if needed else None for needed, gradient in wanted), *(None,) * 3)


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients as functions of what they were taken of, which refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, z_i: Tensor, z_j: Tensor, tau: Any, *gradients: Tensor) -> Any:
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("nt_xent of a group has no second derivative")


def _finish(
    z_i: Tensor,
    z_j: Tensor,
    rows: Tensor,
    positive: Tensor,
    blocks: Blocks,
    batch: GlobalBatch,
    exchange: Exchange,
) -> tuple[Tensor, ...]:
    """Loss and LSE of the own rows, the metrics of all."""
    options, tau = blocks.options, blocks.tau
    shift, log_sum, hardest = rows.unbind(dim=1)
    own = positive.double()
    loss = -torch.nn.functional.logsigmoid((own - shift) / tau - log_sum)
    lse = torch.logaddexp(shift / tau + log_sum, own / tau)
    # |sum z|^2 - sum |z|^2 - sum s_pos over the negatives: sums of rows, no pass over pairs.
    hits = (own > hardest).sum(dtype=torch.float64)
    sums = torch.cat([own.new_zeros(z_i.shape[1] + 1), torch.stack([own.sum(), hits])])
    for z in (z_i, z_j):
        unit = chunked.operands(z, options.cosine, options.eps, options.product_dtype)
        sums[:-3] += unit.sum(dim=0, dtype=torch.float64)
        sums[-3] += unit.square().sum(dtype=torch.float64)
    exchange.all_reduce(sums)
    squares, positives, hits = sums[-3:].unbind()
    hits = hits.where(~squares.isnan(), 0.0)  # of any rank: kernels may leave a NaN out of maxima
    negatives = batch.rows * (batch.rows - 2)
    negative = (sums[:-3].square().sum() - squares - positives) / (negatives or torch.nan)
    metrics = hits / batch.rows, positives / batch.rows, negative
    outputs = (_reduce(loss, options, batch), *metrics, lse)
    return tuple(output.to(positive.dtype) for output in outputs)


def _reduce(loss: Tensor, options: Options, batch: GlobalBatch) -> Tensor:
    if options.reduction == "mean":
        return loss.sum() * (batch.ranks / batch.rows)
    return reference.reduce(loss, options.reduction)


def _reference(
    z_i: Tensor,
    z_j: Tensor,
    temperature: Tensor | None,
    options: Options,
    batch: GlobalBatch,
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    pairs = gather_pairs(z_i, z_j, batch, group)
    with torch.autocast(z_i.device.type, enabled=False):
        terms = reference.nt_xent(
            pairs.z_i,
            pairs.z_j,
            temperature=options.temperature if temperature is None else temperature,
            use_cosine_similarity=options.cosine,
            eps=options.eps,
        )
        loss, lse = (x.view(2, -1)[:, pairs.own].flatten() for x in (terms.loss, terms.lse))
        return _reduce(loss, options, batch), *terms[1:4], lse
