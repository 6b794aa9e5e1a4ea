"""The log-sum-exp of each row against the other rows on the GPU, both directions.

forward:   pack -> tiles of S (inner tiles or strips, then edges) -> reduction
backward:  pack with weights, weights of the positives -> G and its products -> finish

With classes one launch takes all tiles, each with a mask, because any tile may hold two rows of one
class. With class means the forward needs no classes, and the backward subtracts the gradient of the
means from G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.definitions import SelfLogSumExpBackward, SelfLogSumExpForward
from cjepa_kernels.triton import launch
from cjepa_kernels.triton.configs import TILE
from cjepa_kernels.triton.gradients import Gradients
from cjepa_kernels.triton.kernels.reduction import self_logsumexp_kernel
from cjepa_kernels.triton.launch import Operands
from cjepa_kernels.triton.pack import Upstream, attraction, weigh_positives
from cjepa_kernels.triton.prepare import largest_magnitude
from cjepa_kernels.triton.recording import run_kernel
from cjepa_kernels.triton.temperature import Temperature
from cjepa_kernels.triton.tiles import Tiles


def forward(
    z_i: Tensor,
    z_j: Tensor | None,
    positives: Tensor | None,
    classes: Tensor | None,
    class_means: Tensor | None,
    class_weights: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    use_cosine_similarity: bool,
    eps: float,
    product_dtype: torch.dtype | None,
    save_for_backward: bool,
) -> SelfLogSumExpForward:
    """The operator ``self_logsumexp``."""
    if save_for_backward:
        raise ValueError("keep must be False: this back end computes the exponentials again")
    tau = Temperature(temperature, temperature_tensor)
    operands = Operands.of(z_i.dtype, product_dtype)
    views = (z_i,) if z_j is None else (z_i, z_j)
    z = operands.pack(views, cosine=use_cosine_similarity, eps=eps)
    tiles = Tiles(
        z,
        z,
        operator="self_logsumexp",
        operands=operands,
        temperature=tau,
        constant=tau.constant_shift(use_cosine_similarity) and z.rows > launch.FEW_ROWS,
        positives=positives,
        classes=classes if class_means is None else None,
    )
    floats = tiles.new_floats
    out = SelfLogSumExpForward(
        lse=floats(z.rows),
        largest=floats(z.rows),
        shift=floats(z.rows),
        log_sum=floats(z.rows),
        # Of two views the tiles have their own, in the order of the packed rows.
        positive=tiles.positive if z_j is None else floats(z.rows),
        saved_for_backward=floats(0),
    )
    several = len(tiles.panels) > 1
    running_sum, running_max = (floats(z.padded_rows if several else 0) for _ in range(2))
    for panel in tiles:
        # The rows below the panel have no tile in it.
        blocks = tiles.row_blocks if panel.is_last else panel.last
        run_kernel(
            self_logsumexp_kernel, blocks * (TILE // launch.REDUCTION_ROWS),
            row_sum=tiles.row_sum, row_max=tiles.row_max, column_sum=tiles.column_sum,
            column_max=tiles.column_max, running_sum=running_sum, running_max=running_max,
            tile_positive=tiles.positive, lse_out=out.lse, max_out=out.largest,
            shift_out=out.shift, log_sum_out=out.log_sum,
            positives=tiles.positive if positives is None else positives,
            class_means=tiles.positive if class_means is None else class_means,
            positive_out=out.positive, temperature=tau.argument, rows=z.rows,
            blocks=tiles.row_blocks, first_column=panel.first, last_column=panel.last,
            run_length=tiles.run_length, slot_counts=tiles.slot_counts(panel),
            CONSTANT=tiles.constant, TAU_TENSOR=tau.is_tensor, FIRST=panel.is_first,
            LAST=panel.is_last, COUNTED=tiles.hopper is not None, PAIRED=positives is not None,
            AVERAGED=class_means is not None, VIEWS=len(views), BM=TILE,
            ROWS=launch.REDUCTION_ROWS, SLOTS=launch.SLOTS, num_warps=4,
        )  # fmt: skip
    return out


def backward(
    grad_lse: Tensor,
    grad_positive: Tensor | None,
    z_i: Tensor,
    z_j: Tensor | None,
    positives: Tensor | None,
    classes: Tensor | None,
    class_weights: Tensor | None,
    temperature_tensor: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    saved_for_backward: Tensor,
    temperature: float,
    use_cosine_similarity: bool,
    eps: float,
    product_dtype: torch.dtype | None,
) -> SelfLogSumExpBackward:
    """The operator ``self_logsumexp_backward``."""
    tau = Temperature(temperature, temperature_tensor)
    operands = Operands.of(z_i.dtype, product_dtype)
    if z_j is None and positives is None:
        grad_positive = None
    largest_grad = largest_magnitude(grad_lse, of_positives=grad_positive, temperature=tau)
    z = operands.pack(
        (z_i,) if z_j is None else (z_i, z_j),
        cosine=use_cosine_similarity,
        eps=eps,
        upstream=Upstream(
            shift=shift,
            log_sum=log_sum,
            positive=None,
            grad=grad_lse,
            largest_grad=largest_grad,
            temperature=tau,
            constant=tau.constant_shift(use_cosine_similarity),
        ),
    )
    if grad_positive is not None:
        weigh_positives(
            z, grad_positive, largest_grad=largest_grad, temperature=tau, in_products=False
        )
    gradients = Gradients(
        z,
        z,
        operator="self_logsumexp",
        operands=operands,
        temperature=tau,
        cosine=use_cosine_similarity,
        eps=eps,
        positives=positives,
        classes=classes,
        attraction=None
        if class_weights is None
        else attraction(z, class_weights, grad_lse, largest_grad=largest_grad),
    )
    products, _ = gradients.products()
    grads, grad_temperature = gradients.finish(
        z,
        products,
        largest_grad=largest_grad,
        grad_factor=1.0,
        # The log-sum-exps are functions of z z^T / tau, so dL/dtau = -(1 / 2 tau) sum of z . dL/dz
        # without the part of the positives' similarities (Euler).
        temperature_factor=-0.5,
        like=shift if temperature_tensor is None else temperature_tensor,
        positives="" if grad_positive is None else "similarities",
    )
    return SelfLogSumExpBackward(
        grad_z_i=grads[0],
        grad_z_j=z_i.new_empty(0, z_i.shape[1]) if z_j is None else grads[1],
        grad_temperature=grad_temperature,
    )
