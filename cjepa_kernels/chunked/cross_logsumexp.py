"""Log-sum-exp of both sides in pure PyTorch with O(chunk x N) memory, with its own backward.

It serves any device. A chunk of rows at a time is multiplied with all N columns, and every chunk
updates the maximum and the sum of each column:

    m_a = max_b s_ab,  S_a = sum_b exp((s_ab - m_a) / tau),  LSE_a = m_a / tau + log S_a
    n_b = max_a s_ab,  S_b = sum_a exp((s_ab - n_b) / tau);  when n_b grows to n', S_b shrinks by
                       exp((n_b - n') / tau)

With the upstream gradients g_a of the rows' and h_b of the columns' log-sum-exps:

    w_a = g_a / S_a,  v_b = h_b / S_b
    dL/ds_ab = (1/tau) [ w_a exp((s_ab - m_a) / tau) + v_b exp((s_ab - n_b) / tau) ]
    dL/dx_a  = sum_b dL/ds_ab y_b,  dL/dy_b = sum_a dL/ds_ab x_a   (x, y: unit rows)
    dL/dtau  = -(1/tau) sum_a x_a . dL/dx_a   (L depends on tau through x.y / tau alone)

With positives p(a), the entries (a, p(a)) count in neither sum. With the upstream gradient u_a of
their similarities,

    dL/dx_a += u_a y_p(a),  dL/dy_p(a) += u_a x_a   (and nothing in dL/dtau)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.chunked.rows import (
    choose_temperature,
    chunk_rows,
    operands,
    project,
    shift_of,
    sum_of,
    take_positives,
)
from cjepa_kernels.definitions import CrossLogSumExpBackward, CrossLogSumExpForward


def forward(
    x: Tensor,
    y: Tensor,
    positives: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    use_cosine_similarity: bool,
    eps: float,
    product_dtype: torch.dtype | None,
    save_for_backward: bool,
) -> CrossLogSumExpForward:
    """Log-sum-exps, maxima and the numbers that the backward needs, of ``cross_logsumexp``."""
    if save_for_backward:
        raise ValueError("keep must be False: this back end computes the exponentials again")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, y = (operands(z, use_cosine_similarity, eps, product_dtype) for z in (x, y))
        tau = choose_temperature(temperature_tensor, temperature)
        rows, columns = len(x), len(y)
        positive = x.new_empty(0 if positives is None else rows)
        row_max, row_sum = x.new_empty(rows), x.new_empty(rows)
        column_max, column_sum = x.new_full((columns,), -torch.inf), x.new_zeros(columns)
        step = chunk_rows(rows, columns)
        buffers = x.new_empty(2, step, columns)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            tile, by_column = buffers[:, : chunk.stop - start]
            torch.mm(x[chunk], y.T, out=tile)  # (chunk, N)
            if positives is not None:
                positive[chunk] = take_positives(tile, positives[chunk])
            row_max[chunk] = tile.amax(dim=1)
            largest = torch.maximum(column_max, tile.amax(dim=0))
            shift = shift_of(largest)
            torch.sub(tile, shift, out=by_column).div_(tau).exp_()
            column_sum.mul_((column_max - shift).div_(tau).exp_()).add_(by_column.sum(dim=0))
            column_max = largest
            tile.sub_(shift_of(row_max[chunk])[:, None]).div_(tau).exp_()
            torch.sum(tile, dim=1, out=row_sum[chunk])
        row_log_sum, column_log_sum = row_sum.log(), column_sum.log()
        row_shift, column_shift = shift_of(row_max), shift_of(column_max)
        mean_similarity = x.new_empty(0)
        if positives is not None:
            mean_similarity = x.mean(dim=0, dtype=torch.float64) @ y.mean(
                dim=0, dtype=torch.float64
            )
        return CrossLogSumExpForward(
            row_lse=row_shift / tau + row_log_sum,
            column_lse=column_shift / tau + column_log_sum,
            row_max=row_max,
            column_max=column_max,
            row_shift=row_shift,
            row_log_sum=row_log_sum,
            column_shift=column_shift,
            column_log_sum=column_log_sum,
            positive=positive,
            mean_similarity=mean_similarity.to(x.dtype),
            saved_for_backward=x.new_empty(0),
        )


def backward(
    grad_row_lse: Tensor,
    grad_column_lse: Tensor,
    grad_positive: Tensor | None,
    x: Tensor,
    y: Tensor,
    positives: Tensor | None,
    temperature_tensor: Tensor | None,
    row_shift: Tensor,
    row_log_sum: Tensor,
    column_shift: Tensor,
    column_log_sum: Tensor,
    saved_for_backward: Tensor,
    temperature: float,
    use_cosine_similarity: bool,
    eps: float,
    product_dtype: torch.dtype | None,
    of_x: bool,
    of_y: bool,
) -> CrossLogSumExpBackward:
    """Gradients of x, y and the temperature, of the operator ``cross_logsumexp_backward``."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x_rows, y_rows = (operands(z, use_cosine_similarity, eps, product_dtype) for z in (x, y))
        tau = choose_temperature(temperature_tensor, temperature)
        row_weight = grad_row_lse / sum_of(row_log_sum)  # (M,), w_a
        column_weight = grad_column_lse / sum_of(column_log_sum)  # (N,), v_b
        with_x = of_x or not of_y  # the gradient of the temperature follows from either
        grad_x = x_rows.new_empty((x if with_x else x[:0]).shape)
        grad_y = y_rows.new_zeros((y if of_y else y[:0]).shape)
        rows, columns = len(x), len(y)
        step = chunk_rows(rows, columns)
        buffers = x_rows.new_empty(2, step, columns)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            tile, by_column = buffers[:, : chunk.stop - start]
            torch.mm(x_rows[chunk], y_rows.T, out=tile)
            if positives is not None:
                take_positives(tile, positives[chunk])
            torch.sub(tile, column_shift, out=by_column).div_(tau).exp_().mul_(column_weight)
            tile.sub_(row_shift[chunk, None]).div_(tau).exp_().mul_(row_weight[chunk, None])
            tile.add_(by_column)
            if with_x:
                torch.mm(tile, y_rows, out=grad_x[chunk])
            if of_y:
                grad_y.addmm_(tile.T, x_rows[chunk])
        grad_x.div_(tau)
        grad_y.div_(tau)
        grad, operand = (grad_x, x_rows) if with_x else (grad_y, y_rows)
        grad_temperature = (grad * operand).sum() / -tau
        grad_x = grad_x if of_x else grad_x[:0].clone()
        if positives is not None and grad_positive is not None:
            column = positives.clamp(0, columns - 1)
            weight = grad_positive.masked_fill(positives == -1, 0.0)[:, None]  # (M, 1), u_a
            if of_x:
                grad_x.addcmul_(weight, y_rows[column])
            if of_y:
                grad_y.index_add_(0, column, weight * x_rows)
        for grad, z, wanted in ((grad_x, x, of_x), (grad_y, y, of_y)):
            if use_cosine_similarity and wanted:
                project(grad, z.to(grad.dtype, copy=True), eps)
        like = row_shift if temperature_tensor is None else temperature_tensor
        return CrossLogSumExpBackward(
            grad_x=grad_x.to(x.dtype),
            grad_y=grad_y.to(y.dtype),
            grad_temperature=grad_temperature.to(like.dtype),
        )
