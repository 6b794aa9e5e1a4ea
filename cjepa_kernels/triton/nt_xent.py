"""NT-Xent: what the forward and the backward launch."""

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
    z_i: Tensor,
    z_j: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    cosine: bool,
    eps: float,
    reduction_name: str,
    product_dtype: torch.dtype | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Loss, metrics and what backward needs; arguments and results as in ``ops.NT_XENT``."""
    if keep:
        raise ValueError("keep must be False: this back end computes the exponentials again")
    tau = Temperature(temperature, temperature_tensor)
    operands = Operands.of(z_i.dtype, product_dtype)
    z = operands.pack((z_i, z_j), cosine=cosine, eps=eps)
    tiles = Tiles(z, z, operands, tau, tau.constant_shift(cosine), mask)
    none = reduction_name == "none"
    floats = tiles._floats
    loss = floats(z.rows) if none else z_i.new_empty((), dtype=torch.float32)
    scalars = [z_i.new_empty((), dtype=torch.float32) for _ in range(3)]
    lse, hardest, shift, log_sum, positive = (floats(z.rows) for _ in range(5))
    several = len(tiles.panels) > 1
    running_sum, running_max = (floats(z.padded_rows if several else 0) for _ in range(2))
    programs = tiles.row_blocks * (TILE // launch.ROWS)
    features = z.sums.shape[1] // reduction.FEATURES.value
    partial = z_i.new_empty(3 * programs + features, dtype=torch.float64)
    for panel in tiles:
        # Rows below the panel have nothing in it.
        blocks = tiles.row_blocks if panel.is_last else panel.last
        reduction.nt_xent_rows_kernel[(blocks * (TILE // launch.ROWS),)](
            tiles.row_sum, tiles.row_max, tiles.column_sum, tiles.column_max,
            running_sum, running_max, tiles.positive, loss, lse, hardest, shift, log_sum, positive,
            partial, z.sums, z.squares, tiles.kept_sum, tiles.kept_count, z.counter, loss, *scalars,
            tau.argument, z.rows, tiles.row_blocks, panel.first, panel.last, tiles.run,
            len(z.squares),
            len(tiles.kept_sum), 1 / z.rows if reduction_name == "mean" else 1.0,
            CONSTANT=tiles.constant, TAU_TENSOR=tau.is_tensor, FIRST=panel.is_first,
            LAST=panel.is_last, NONE=none, MASKED=mask is not None, WIDTH=z.sums.shape[1], BM=TILE,
            ROWS=launch.ROWS, SLOTS=launch.SLOTS, num_warps=4,
        )  # fmt: skip
    kept = z_i.new_empty(0, dtype=torch.float32)
    return loss, *scalars, lse, hardest, shift, log_sum, positive, kept


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
    tau = Temperature(temperature, temperature_tensor)
    operands = Operands.of(z_i.dtype, product_dtype)
    largest = grad_loss if grad_loss.ndim == 0 else grad_loss.abs().amax()
    upstream = Upstream(
        shift, log_sum, positive, grad_loss, largest, tau, tau.constant_shift(cosine)
    )
    z = operands.pack((z_i, z_j), cosine=cosine, eps=eps, upstream=upstream)
    gradients = Gradients(z, z, operands, tau, cosine, eps, mask)
    sums, _ = gradients.products()
    like = shift if temperature_tensor is None else temperature_tensor
    mean = 1 / z.rows if reduction == "mean" else 1.0
    # L is a function of z z^T / tau, so dL/dtau = -(1 / 2 tau) sum z . dL/dz (Euler).
    grads, of_temperature = gradients.finish(z, sums, largest, mean, -0.5, like)
    return grads[0], grads[1], of_temperature
