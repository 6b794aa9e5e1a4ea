"""NT-Xent in pure PyTorch with O(chunk x M) memory, for any device, with its own backward.

A chunk of rows at a time is multiplied with all M columns, so the M x M matrix never exists:

    m_a     = max over negatives b of s_ab,  S_a = sum over negatives b of exp((s_ab - m_a) / tau)
    x_a     = (m_a - s_pos) / tau + log S_a = LSE-_a - l_pos
    loss_a  = softplus(x_a),  r_a = sigmoid(x_a)
    dL/dz_a = (1/tau) [ sum_b (w_a exp((s_ab - m_a) / tau) + w_b exp((s_ab - m_b) / tau)) z_b
                        - (g_a r_a + g_pos r_pos) z_pos ],   w_a = g_a r_a / S_a   (z: unit rows)
    dL/dtau = -(1 / 2 tau) sum_a z_a . dL/dz_a   (L depends on tau through z.z / tau alone)

Every exponent is a difference of two similarities and at most 0. It is exact where it matters,
because no logit of size 1 / tau is ever rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.chunked.rows import (
    choose_temperature,
    chunk_rows,
    operands,
    project,
    shift_of,
    sum_of,
)
from cjepa_kernels.definitions import NTXentBackward, NTXentForward, Reduction
from cjepa_kernels.reference.rows import reduce


def _exclude(tile: Tensor, start: int, batch: int, mask: Tensor | None) -> None:
    """Set the entries of a tile that are no negatives to -inf, in place.

    Args:
        tile: (chunk, M), rows of the (M, M) matrix.
        start: First of these rows.
        batch: B.
        mask: (B, B) bool, True for a pair of samples that is no negative.
    """
    rows, columns = tile.shape
    row = torch.arange(rows, device=tile.device)
    anchor = row + start
    tile[row, anchor] = -torch.inf
    tile[row, (anchor + batch) % columns] = -torch.inf
    if mask is not None:
        sample = anchor % batch
        masked = mask[sample] | mask[:, sample].T  # (chunk, B)
        positive_or_self = sample[:, None] == torch.arange(batch, device=tile.device)
        tile.masked_fill_((masked & ~positive_or_self).repeat(1, 2), -torch.inf)


def forward(
    z_i: Tensor,
    z_j: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    product_dtype: torch.dtype | None,
    save_for_backward: bool,
) -> NTXentForward:
    """Loss, metrics and the numbers that the backward needs, of the operator ``nt_xent``."""
    if save_for_backward:
        raise ValueError("keep must be False: this back end computes the exponentials again")
    with torch.no_grad(), torch.autocast(z_i.device.type, enabled=False):
        z = operands(torch.cat([z_i, z_j]), use_cosine_similarity, eps, product_dtype)
        tau = choose_temperature(temperature_tensor, temperature)
        batch, rows = z_i.shape[0], z.shape[0]
        positive, largest_negative, total = (z.new_empty(rows) for _ in range(3))
        negative_sum, negative_count = z.new_zeros(()), z.new_zeros(())
        step = chunk_rows(rows)
        buffer = z.new_empty(step, rows)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            anchor = torch.arange(chunk.start, chunk.stop, device=z.device)
            tile = torch.mm(z[chunk], z.T, out=buffer[: len(anchor)])  # (chunk, M)
            positive[chunk] = tile[anchor - start, (anchor + batch) % rows]
            _exclude(tile, start, batch, mask)
            largest_negative[chunk] = tile.amax(dim=1)
            if mask is not None:
                is_negative = tile != -torch.inf
                negative_sum += tile.where(is_negative, 0.0).sum()
                negative_count += is_negative.sum()
            tile.sub_(shift_of(largest_negative[chunk])[:, None]).div_(tau).exp_()
            torch.sum(tile, dim=1, out=total[chunk])
        if mask is None:
            count = rows * (rows - 2)
            total_sum = z.sum(dim=0).square().sum() - z.square().sum() - positive.sum()
            negative_similarity = (
                total_sum / count if count else torch.full_like(total_sum, torch.nan)
            )
        else:
            negative_similarity = negative_sum / negative_count
        shift, log_sum = shift_of(largest_negative), total.log()
        loss = -F.logsigmoid((positive - shift) / tau - log_sum)
        return NTXentForward(
            loss=reduce(loss, reduction),
            accuracy=((positive > largest_negative) & z.isfinite().all()).to(z.dtype).mean(),
            positive_similarity=positive.mean(),
            negative_similarity=negative_similarity,
            lse=torch.logaddexp(shift / tau + log_sum, positive / tau),
            largest_negative=largest_negative,
            shift=shift,
            log_sum=log_sum,
            positive=positive,
            saved_for_backward=z.new_empty(0),
        )


def backward(
    grad_loss: Tensor,
    z_i: Tensor,
    z_j: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    positive: Tensor,
    saved_for_backward: Tensor,
    temperature: float,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    product_dtype: torch.dtype | None,
) -> NTXentBackward:
    """Gradients of z_i, z_j and the temperature, of the operator ``nt_xent_backward``."""
    with torch.no_grad(), torch.autocast(z_i.device.type, enabled=False):
        z = operands(torch.cat([z_i, z_j]), use_cosine_similarity, eps, product_dtype)
        tau = choose_temperature(temperature_tensor, temperature)
        batch, rows = z_i.shape[0], z.shape[0]
        grad_logit = torch.sigmoid((shift - positive) / tau + log_sum) * grad_loss  # (M,), g_a r_a
        weight = grad_logit / sum_of(log_sum)  # (M,), w_a
        grad = torch.zeros_like(z)  # (M, D)
        step = chunk_rows(rows)
        buffer = z.new_empty(step, rows)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            tile = buffer[: chunk.stop - start]
            torch.mm(z[chunk], z.T, out=tile)
            _exclude(tile, start, batch, mask)
            tile.sub_(shift[chunk, None]).div_(tau).exp_().mul_(weight[chunk, None])
            grad[chunk].addmm_(tile, z)
            # The exponents of column b are not taken from this tile, but from the chunk of row b.
            # s_ab and s_ba may differ by a rounding, which 1 / tau magnifies, and row b's shift was
            # computed from s_ba.
            grad.addmm_(tile.T, z[chunk])
        of_pair = grad_logit + grad_logit.roll(batch)  # (M,), g_a r_a + g_pos r_pos
        grad.addcmul_(of_pair[:, None], z.roll(batch, dims=0), value=-1)
        grad.div_(tau)
        if reduction == "mean":  # not a part of the weights, which 1/M could push out of range
            grad.div_(rows)
        grad_temperature = (grad * z).sum() / (-2 * tau)
        if use_cosine_similarity:
            project(grad, torch.cat([z_i, z_j]).to(grad.dtype), eps)
        like = shift if temperature_tensor is None else temperature_tensor
        # Copies: the outputs of an operator must not share memory.
        return NTXentBackward(
            grad_z_i=grad[:batch].to(z_i.dtype, copy=True),
            grad_z_j=grad[batch:].to(z_j.dtype, copy=True),
            grad_temperature=grad_temperature.to(like.dtype),
        )
