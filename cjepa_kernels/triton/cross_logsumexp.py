"""The log-sum-exps of both sides of a rectangle: what the forward and the backward launch."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.triton import launch
from cjepa_kernels.triton.gradients import Gradients
from cjepa_kernels.triton.kernels import reduction
from cjepa_kernels.triton.launch import TILE, Operands
from cjepa_kernels.triton.pack import Temperature, Upstream
from cjepa_kernels.triton.tiles import Tiles


def forward(
    x: Tensor,
    y: Tensor,
    temperature_tensor: Tensor | None,
    temperature: float,
    cosine: bool,
    eps: float,
    product_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """Log-sum-exps, maxima and what backward needs; as in ``ops.CROSS_LOGSUMEXP``."""
    tau = Temperature(temperature, temperature_tensor)
    operands = Operands.of(x.dtype, product_dtype)
    packed_x, packed_y = (operands.pack((z,), cosine=cosine, eps=eps) for z in (x, y))
    constant = tau.constant_shift(cosine) and min(len(x), len(y)) > launch.FEW
    tiles = Tiles(packed_x, packed_y, operands, tau, constant)
    floats = tiles._floats
    of_rows = [floats(len(x)) for _ in range(4)]
    of_columns = [floats(len(y)) for _ in range(4)]
    several = len(tiles.panels) > 1
    running = [floats(packed_x.padded_rows if several else 0) for _ in range(2)]

    whole = len(x) // TILE, len(y) // TILE
    for panel in tiles:
        for columns in (False, True):
            sums, maxima = (
                (tiles.column_sum, tiles.column_max) if columns else (tiles.row_sum, tiles.row_max)
            )
            reduction.logsumexp_kernel[(panel.blocks if columns else tiles.row_blocks,)](
                sums, maxima, *running, *(of_columns if columns else of_rows), tau.argument,
                len(y) if columns else len(x),
                panel.blocks * TILE if columns else packed_x.padded_rows, panel.first, panel.blocks,
                tiles.row_blocks, *whole, tiles.run,
                COLUMNS=columns, CONSTANT=tiles.constant, TAU_TENSOR=tau.is_tensor,
                FIRST=columns or panel.is_first, LAST=columns or panel.is_last, BM=TILE,
                SLOTS=launch.SLOTS, num_warps=4,
            )  # fmt: skip
    (row_lse, row_max, row_shift, row_log_sum), (lse, largest, shift, log_sum) = of_rows, of_columns
    return row_lse, lse, row_max, largest, row_shift, row_log_sum, shift, log_sum


def backward(
    grad_row_lse: Tensor,
    grad_column_lse: Tensor,
    x: Tensor,
    y: Tensor,
    temperature_tensor: Tensor | None,
    row_shift: Tensor,
    row_log_sum: Tensor,
    column_shift: Tensor,
    column_log_sum: Tensor,
    temperature: float,
    cosine: bool,
    eps: float,
    product_dtype: torch.dtype | None,
    of_x: bool,
    of_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and the temperature; as in ``ops.CROSS_LOGSUMEXP_BACKWARD``."""
    tau = Temperature(temperature, temperature_tensor)
    operands = Operands.of(x.dtype, product_dtype)
    largest = torch.maximum(grad_row_lse.abs().amax(), grad_column_lse.abs().amax())
    constant = tau.constant_shift(cosine)
    by_row = Upstream(row_shift, row_log_sum, None, grad_row_lse, largest, tau, constant)
    by_column = Upstream(
        column_shift, column_log_sum, None, grad_column_lse, largest, tau, constant
    )
    packed_x = operands.pack((x,), cosine=cosine, eps=eps, upstream=by_row)
    packed_y = operands.pack((y,), cosine=cosine, eps=eps, upstream=by_column)
    with_x = of_x or not of_y  # one of both, for the temperature
    gradients = Gradients(packed_x, packed_y, operands, tau, cosine, eps, of_x=with_x, of_y=of_y)
    sums_x, sums_y = gradients.products()
    like = row_shift if temperature_tensor is None else temperature_tensor
    # L is a function of x y^T / tau, so dL/dtau = -(1 / tau) sum x . dL/dx, and so for y (Euler).
    grad_x, grad_y, of_temperature = x.new_empty(0, x.shape[1]), y.new_empty(0, x.shape[1]), like
    if of_y:
        (grad_y,), of_temperature = gradients.finish(packed_y, sums_y, largest, 1.0, -1.0, like)
    if with_x:
        (along_x,), of_temperature = gradients.finish(packed_x, sums_x, largest, 1.0, -1.0, like)
        grad_x = along_x if of_x else grad_x
    return grad_x, grad_y, of_temperature
