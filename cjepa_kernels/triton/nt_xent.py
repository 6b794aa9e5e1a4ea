"""NT-Xent on the GPU, both directions.

forward:   pack -> tiles of S (inner tiles or strips, then edges) -> reduction to the loss
backward:  pack with weights -> G and its products -> finish

A forward that saves its rows leaves out the first step of the backward. For a reduced loss it also
saves their weights. Without a reduction the backward computes these first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.definitions import NTXentBackward, NTXentForward
from cjepa_kernels.triton import launch
from cjepa_kernels.triton.configs import TILE
from cjepa_kernels.triton.gradients import Gradients
from cjepa_kernels.triton.kernels.reduction import FEATURE_BLOCK, nt_xent_rows_kernel
from cjepa_kernels.triton.launch import Operands
from cjepa_kernels.triton.pack import Upstream, Weights, restore
from cjepa_kernels.triton.prepare import largest_magnitude
from cjepa_kernels.triton.recording import run_kernel
from cjepa_kernels.triton.saved_rows import SavedRows, form_of, saved_bytes
from cjepa_kernels.triton.temperature import Temperature
from cjepa_kernels.triton.tiles import Tiles


def forward(
    z_i: Tensor,
    z_j: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    use_cosine_similarity: bool,
    eps: float,
    reduction: str,
    product_dtype: torch.dtype | None,
    save_for_backward: bool,
) -> NTXentForward:
    """The operator ``nt_xent``."""
    tau = Temperature(temperature, temperature_tensor)
    operands = Operands.of(z_i.dtype, product_dtype)
    saved: SavedRows | None = None
    if save_for_backward:
        form = form_of(z_i, product_dtype, reduction)
        saved = SavedRows(z_i.new_empty(saved_bytes(form), dtype=torch.uint8), form)
    z = operands.pack(
        (z_i, z_j),
        cosine=use_cosine_similarity,
        eps=eps,
        out=None if saved is None else saved.z,
    )
    tiles = Tiles(
        z,
        z,
        operator="nt_xent",
        operands=operands,
        temperature=tau,
        constant=tau.constant_shift(use_cosine_similarity),
        mask=mask,
    )
    none = reduction == "none"
    floats = tiles.new_floats

    def scalar() -> Tensor:
        return z_i.new_empty((), dtype=torch.float32)

    out = NTXentForward(
        loss=floats(z.rows) if none else scalar(),
        accuracy=scalar(),
        positive_similarity=scalar(),
        negative_similarity=scalar(),
        lse=floats(z.rows),
        largest_negative=floats(z.rows),
        shift=floats(z.rows),
        log_sum=floats(z.rows),
        positive=floats(z.rows),
        saved_for_backward=floats(0) if saved is None else saved.memory,
    )
    numbers = None if saved is None else saved.weights
    weights = None if numbers is None else Weights.of(numbers, operands.rounded)
    several = len(tiles.panels) > 1
    running_sum, running_max = (floats(z.padded_rows if several else 0) for _ in range(2))
    width = z.feature_sums.shape[1]
    programs = z.padded_rows // launch.REDUCTION_ROWS
    partial = z_i.new_empty(3 * programs + width // FEATURE_BLOCK.value, dtype=torch.float64)
    for panel in tiles:
        # The rows below the panel have no tile in it.
        blocks = tiles.row_blocks if panel.is_last else panel.last
        run_kernel(
            nt_xent_rows_kernel, blocks * (TILE // launch.REDUCTION_ROWS),
            row_sum=tiles.row_sum, row_max=tiles.row_max, column_sum=tiles.column_sum,
            column_max=tiles.column_max, running_sum=running_sum, running_max=running_max,
            tile_positive=tiles.positive, row_loss_out=out.loss, lse_out=out.lse,
            largest_negative_out=out.largest_negative, shift_out=out.shift,
            log_sum_out=out.log_sum, positive_out=out.positive, partial=partial,
            feature_sums=z.feature_sums, squared_norms=z.squared_norms,
            negative_sum=tiles.negative_sum, negative_count=tiles.negative_count,
            counter=z.counter, loss_out=out.loss, accuracy_out=out.accuracy,
            positive_similarity_out=out.positive_similarity,
            negative_similarity_out=out.negative_similarity, temperature=tau.argument,
            weight_out=out.shift if weights is None else weights.weight,
            weight_shift_out=out.shift if weights is None else weights.shift,
            positive_weight_out=out.shift if weights is None else weights.positive,
            weight_scale=1.0 if weights is None else weights.scale,
            rows=z.rows, blocks=tiles.row_blocks, first_column=panel.first,
            last_column=panel.last, run_length=tiles.run_length,
            slot_counts=tiles.slot_counts(panel),
            feature_sum_count=z.squared_norms.shape[0], negative_slots=tiles.negative_sum.shape[0],
            loss_factor=1 / z.rows if reduction == "mean" else 1.0,
            CONSTANT=tiles.constant, TAU_TENSOR=tau.is_tensor, FIRST=panel.is_first,
            LAST=panel.is_last, COUNTED=tiles.hopper is not None, NONE=none,
            MASKED=mask is not None, WEIGH=weights is not None, WIDTH=width, BM=TILE,
            ROWS=launch.REDUCTION_ROWS, SLOTS=launch.SLOTS, num_warps=4,
        )  # fmt: skip
    return out


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
    reduction: str,
    product_dtype: torch.dtype | None,
) -> NTXentBackward:
    """The operator ``nt_xent_backward``."""
    tau = Temperature(temperature, temperature_tensor)
    operands = Operands.of(z_i.dtype, product_dtype)
    largest_grad = largest_magnitude(grad_loss)
    upstream = Upstream(
        shift=shift,
        log_sum=log_sum,
        positive=positive,
        grad=grad_loss,
        largest_grad=largest_grad,
        temperature=tau,
        constant=tau.constant_shift(use_cosine_similarity),
    )
    views = z_i, z_j
    form = form_of(z_i, product_dtype, reduction)
    # Rows of another form are of no use. PyTorch's setting for tf32 may have changed meanwhile.
    if saved_for_backward.numel() == saved_bytes(form):
        z = restore(views, SavedRows(saved_for_backward, form), upstream)
    else:
        z = operands.pack(views, cosine=use_cosine_similarity, eps=eps, upstream=upstream)
    gradients = Gradients(
        z,
        z,
        operator="nt_xent",
        operands=operands,
        temperature=tau,
        cosine=use_cosine_similarity,
        eps=eps,
        mask=mask,
    )
    products, _ = gradients.products()
    (grad_z_i, grad_z_j), grad_temperature = gradients.finish(
        z,
        products,
        largest_grad=largest_grad,
        grad_factor=1 / z.rows if reduction == "mean" else 1.0,
        # L is a function of z z^T / tau, so dL/dtau = -(1 / 2 tau) sum of z . dL/dz (Euler).
        temperature_factor=-0.5,
        like=shift if temperature_tensor is None else temperature_tensor,
        positives="logits",
    )
    return NTXentBackward(grad_z_i, grad_z_j, grad_temperature)
