"""NT-Xent in pure PyTorch with O(chunk x M) memory: any device, its own backward.

Rows are taken a chunk at a time against all M columns, so the M x M matrix never exists:

    h_a     = max over negatives b of s_ab,  S_a = sum over negatives b of exp((s_ab - h_a) / tau)
    x_a     = (h_a - s_pos) / tau + log S_a = LSE-_a - l_pos
    loss_a  = softplus(x_a),  r_a = sigmoid(x_a)
    dL/dz_a = (1/tau) [ sum_b (w_a exp((s_ab - h_a) / tau) + w_b exp((s_ab - h_b) / tau)) z_b
                        - (g_a r_a + g_pos r_pos) z_pos ],   w_a = g_a r_a / S_a   (z: unit rows)
    dL/dtau = -(1 / 2 tau) sum_a z_a . dL/dz_a   (L depends on tau through z.z / tau alone)

Every exponent is at most 0 and the difference of two similarities, exact where it matters: no
logit of size 1 / tau is ever rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.reference import embed_rows, positive_temperature, reduce

# 2^21 elements are 8 MB in fp32: the working set of a chunk stays near the caches, and at
# M = 32768 it is 64 rows, still enough for the matrix product to run at full speed.
CHUNK_ELEMENTS = 2**21
MIN_CHUNK_ROWS = 32


def chunk_rows(rows: int, columns: int | None = None) -> int:
    """Rows taken at a time against all columns, of which there are as many as rows unless given.

    Memory is ``chunk_rows(M, N) * N`` numbers per buffer.
    """
    return min(rows, max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // (columns or rows)))


def operands(z: Tensor, cosine: bool, eps: float, product_dtype: torch.dtype | None) -> Tensor:
    """(M, D) rows of the product, rounded to the product's dtype, held in the accumulation one."""
    rows = embed_rows(z, cosine, eps)
    return rows.to(product_dtype or z.dtype).to(rows.dtype)


def project(grad: Tensor, z: Tensor, eps: float) -> None:
    """In place: (grad - (grad . u) u) / norm with u the unit row; 0 where the norm is <= eps.

    Args:
        grad: (M, D) gradient of the unit rows; becomes the gradient of the rows themselves.
        z: (M, D) the rows in the dtype of ``grad``, overwritten.
        eps: Lower bound on the norm used for normalisation.
    """
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    unit = z.div_(norm.clamp(min=eps))
    along = (grad * unit).sum(dim=1, keepdim=True)
    grad.addcmul_(along, unit, value=-1).div_(norm)
    grad.masked_fill_(norm <= eps, 0.0)


def _exclude(tile: Tensor, start: int, batch: int, mask: Tensor | None) -> None:
    """Set to -inf, in place, what is no negative in rows start.. of the (M, M) matrix."""
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
    cosine: bool,
    eps: float,
    reduction: str,
    product_dtype: torch.dtype | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Loss, metrics and what backward needs; arguments and results as in ``ops.NT_XENT``."""
    if keep:
        raise ValueError("keep must be False: this back end computes the exponentials again")
    with torch.no_grad(), torch.autocast(z_i.device.type, enabled=False):
        z = operands(torch.cat([z_i, z_j]), cosine, eps, product_dtype)
        tau = positive_temperature(
            temperature if temperature_tensor is None else temperature_tensor
        )
        batch, rows = z_i.shape[0], z.shape[0]
        positive, hardest, total = (z.new_empty(rows) for _ in range(3))
        kept_sum, kept_count = z.new_zeros(()), z.new_zeros(())
        step = chunk_rows(rows)
        buffer = z.new_empty(step, rows)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            anchor = torch.arange(chunk.start, chunk.stop, device=z.device)
            tile = torch.mm(z[chunk], z.T, out=buffer[: len(anchor)])  # (chunk, M)
            positive[chunk] = tile[anchor - start, (anchor + batch) % rows]
            _exclude(tile, start, batch, mask)
            hardest[chunk] = tile.amax(dim=1)
            if mask is not None:
                kept = tile != -torch.inf
                kept_sum += tile.where(kept, 0.0).sum()
                kept_count += kept.sum()
            tile.sub_(_shift(hardest[chunk])[:, None]).div_(tau).exp_()
            torch.sum(tile, dim=1, out=total[chunk])
        if mask is None:
            count = rows * (rows - 2)
            total_sum = z.sum(dim=0).square().sum() - z.square().sum() - positive.sum()
            negative_similarity = (
                total_sum / count if count else torch.full_like(total_sum, torch.nan)
            )
        else:
            negative_similarity = kept_sum / kept_count
        shift, log_sum = _shift(hardest), total.log()
        loss = -torch.nn.functional.logsigmoid((positive - shift) / tau - log_sum)
        return (
            reduce(loss, reduction),  # type: ignore[arg-type]
            ((positive > hardest) & z.isfinite().all()).to(z.dtype).mean(),
            positive.mean(),
            negative_similarity,
            torch.logaddexp(shift / tau + log_sum, positive / tau),
            hardest,
            shift,
            log_sum,
            positive,
            z.new_empty(0),
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
    kept: Tensor,
    temperature: float,
    cosine: bool,
    eps: float,
    reduction: str,
    product_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z_i, z_j and the temperature; arguments as in ``ops.NT_XENT_BACKWARD``."""
    with torch.no_grad(), torch.autocast(z_i.device.type, enabled=False):
        z = operands(torch.cat([z_i, z_j]), cosine, eps, product_dtype)
        tau = positive_temperature(
            temperature if temperature_tensor is None else temperature_tensor
        )
        batch, rows = z_i.shape[0], z.shape[0]
        pull = torch.sigmoid((shift - positive) / tau + log_sum) * grad_loss  # (M,), g_a r_a
        # A row without negatives pulls on nothing: not 0 / 0.
        weight = pull / log_sum.exp().masked_fill(log_sum == -torch.inf, 1.0)
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
            # Not the columns' exponents of this tile: s_ab and s_ba may differ by a rounding, which
            # 1 / tau magnifies, and only s_ab is what row a's shift was taken from.
            grad.addmm_(tile.T, z[chunk])
        grad.addcmul_((pull + pull.roll(batch))[:, None], z.roll(batch, dims=0), value=-1)
        grad.div_(tau)
        if reduction == "mean":  # outside the weights: 1/M must not push them out of range
            grad.div_(rows)
        grad_temperature = (grad * z).sum() / (-2 * tau)
        if cosine:
            project(grad, torch.cat([z_i, z_j]).to(grad.dtype), eps)
        like = shift if temperature_tensor is None else temperature_tensor
        # Copies: the outputs of an operator must not share memory.
        return (
            grad[:batch].to(z_i.dtype, copy=True),
            grad[batch:].to(z_j.dtype, copy=True),
            grad_temperature.to(like.dtype),
        )


def _shift(hardest: Tensor) -> Tensor:
    """The hardest negative's similarity, 0 for a row without negatives."""
    return hardest.masked_fill(hardest == -torch.inf, 0.0)
