"""The log-sum-exps of the rows and the columns of a rectangle on the GPU, both directions.

forward:   pack X and Y -> tiles of S (inner tiles or strips, then edges) -> reduction
backward:  pack X and Y with weights -> G and its products -> finish, once a side
"""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.definitions import CrossLogSumExpBackward, CrossLogSumExpForward
from cjepa_kernels.triton import launch
from cjepa_kernels.triton.configs import TILE
from cjepa_kernels.triton.gradients import Gradients
from cjepa_kernels.triton.kernels.reduction import (
    FEATURE_BLOCK,
    logsumexp_kernel,
    mean_similarity_kernel,
)
from cjepa_kernels.triton.launch import Operands
from cjepa_kernels.triton.pack import Packed, Upstream, weigh_positives
from cjepa_kernels.triton.prepare import largest_magnitude
from cjepa_kernels.triton.recording import run_kernel
from cjepa_kernels.triton.temperature import Temperature
from cjepa_kernels.triton.tiles import Tiles


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
    """The operator ``cross_logsumexp``."""
    if save_for_backward:
        raise ValueError("keep must be False: this back end computes the exponentials again")
    tau = Temperature(temperature, temperature_tensor)
    operands = Operands.of(x.dtype, product_dtype)
    packed_x, packed_y = (
        operands.pack((z,), cosine=use_cosine_similarity, eps=eps) for z in (x, y)
    )
    rows, columns = x.shape[0], y.shape[0]
    constant = tau.constant_shift(use_cosine_similarity) and min(rows, columns) > launch.FEW_ROWS
    tiles = Tiles(
        packed_x,
        packed_y,
        operator="cross_logsumexp",
        operands=operands,
        temperature=tau,
        constant=constant,
        positives=positives,
    )
    floats = tiles.new_floats
    paired = positives is not None
    out = CrossLogSumExpForward(
        row_lse=floats(rows),
        column_lse=floats(columns),
        row_max=floats(rows),
        column_max=floats(columns),
        row_shift=floats(rows),
        row_log_sum=floats(rows),
        column_shift=floats(columns),
        column_log_sum=floats(columns),
        positive=tiles.positive,
        mean_similarity=x.new_empty(() if paired else 0, dtype=torch.float32),
        saved_for_backward=floats(0),
    )
    if paired:
        _mean_similarity(packed_x, packed_y, out.mean_similarity)
    several = len(tiles.panels) > 1
    running_sum, running_max = (floats(packed_x.padded_rows if several else 0) for _ in range(2))
    for panel in tiles:
        for of_columns in (False, True):
            run_kernel(
                logsumexp_kernel, panel.blocks if of_columns else tiles.row_blocks,
                sums=tiles.column_sum if of_columns else tiles.row_sum,
                maxima=tiles.column_max if of_columns else tiles.row_max,
                running_sum=running_sum, running_max=running_max,
                lse_out=out.column_lse if of_columns else out.row_lse,
                max_out=out.column_max if of_columns else out.row_max,
                shift_out=out.column_shift if of_columns else out.row_shift,
                log_sum_out=out.column_log_sum if of_columns else out.row_log_sum,
                positives=tiles.positive if positives is None else positives,
                positive=tiles.positive,
                temperature=tau.argument, rows=columns if of_columns else rows,
                other_rows=rows if of_columns else columns,
                stride=panel.blocks * TILE if of_columns else packed_x.padded_rows,
                first=panel.first, slots=panel.blocks, row_blocks=tiles.row_blocks,
                whole_rows=rows // TILE, whole_columns=columns // TILE,
                run_length=tiles.run_length, slot_counts=tiles.slot_counts(panel),
                COLUMNS=of_columns, PAIRED=paired, CONSTANT=constant, TAU_TENSOR=tau.is_tensor,
                COUNTED=tiles.hopper is not None, FIRST=of_columns or panel.is_first,
                LAST=of_columns or panel.is_last, BM=TILE, SLOTS=launch.SLOTS, num_warps=4,
            )  # fmt: skip
    return out


def _mean_similarity(x: Packed, y: Packed, out: Tensor) -> None:
    """Write the mean of all similarities of the rows of both sides."""
    width = x.feature_sums.shape[1]
    programs = width // FEATURE_BLOCK.value
    run_kernel(
        mean_similarity_kernel, programs,
        x_sums=x.feature_sums, y_sums=y.feature_sums,
        partial=out.new_empty(programs, dtype=torch.float64), counter=x.counter, mean_out=out,
        x_count=x.squared_norms.shape[0], y_count=y.squared_norms.shape[0],
        pairs=float(x.rows * y.rows), WIDTH=width, num_warps=4,
    )  # fmt: skip


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
    """The operator ``cross_logsumexp_backward``."""
    tau = Temperature(temperature, temperature_tensor)
    operands = Operands.of(x.dtype, product_dtype)
    largest_grad = largest_magnitude(
        grad_row_lse, grad_column_lse, of_positives=grad_positive, temperature=tau
    )
    constant = tau.constant_shift(use_cosine_similarity)
    packed_x, packed_y = (
        operands.pack(
            (z,),
            cosine=use_cosine_similarity,
            eps=eps,
            upstream=Upstream(
                shift=shift,
                log_sum=log_sum,
                positive=None,
                grad=grad,
                largest_grad=largest_grad,
                temperature=tau,
                constant=constant,
            ),
        )
        for z, shift, log_sum, grad in (
            (x, row_shift, row_log_sum, grad_row_lse),
            (y, column_shift, column_log_sum, grad_column_lse),
        )
    )
    if grad_positive is not None:
        weigh_positives(
            packed_x,
            grad_positive,
            largest_grad=largest_grad,
            temperature=tau,
            in_products=True,
        )
    with_x = of_x or not of_y  # The temperature's gradient needs one side.
    gradients = Gradients(
        packed_x,
        packed_y,
        operator="cross_logsumexp",
        operands=operands,
        temperature=tau,
        cosine=use_cosine_similarity,
        eps=eps,
        positives=positives,
        of_x=with_x,
        of_y=of_y,
    )
    products_x, products_y = gradients.products()
    like = row_shift if temperature_tensor is None else temperature_tensor
    grad_temperature = like
    grad_x, grad_y = x.new_empty(0, x.shape[1]), y.new_empty(0, x.shape[1])

    def finish(packed: Packed, products: Tensor) -> tuple[Tensor, Tensor]:
        # L is a function of x y^T / tau, so dL/dtau = -(1 / tau) sum of x . dL/dx (Euler). The
        # same holds for y.
        (grad,), grad_temperature = gradients.finish(
            packed,
            products,
            largest_grad=largest_grad,
            grad_factor=1.0,
            temperature_factor=-1.0,
            like=like,
        )
        return grad, grad_temperature

    if of_y:
        grad_y, grad_temperature = finish(packed_y, products_y)
    if with_x:
        grad, grad_temperature = finish(packed_x, products_x)
        grad_x = grad if of_x else grad_x
    return CrossLogSumExpBackward(grad_x, grad_y, grad_temperature)
