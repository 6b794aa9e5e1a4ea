"""The backward's launches: the gradients of NT-Xent, and of the log-sum-exps of a rectangle."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from cjepa_kernels.triton import coefficients, finish, launch
from cjepa_kernels.triton.configs import Config
from cjepa_kernels.triton.launch import TILE, Operands
from cjepa_kernels.triton.pack import (
    Packed,
    Temperature,
    Upstream,
    Weights,
    row_block,
    view_arguments,
)


class Gradients:
    """One backward: its operands with their weights, and how it goes over the tiles.

    Attributes:
        dots: Parts of sum_ab G_ab s_ab, of a temperature that is a tensor.
    """

    def __init__(
        self,
        x: Packed,
        y: Packed,
        operands: Operands,
        temperature: Temperature,
        cosine: bool,
        eps: float,
        mask: Tensor | None = None,
        of_x: bool = True,
        of_y: bool = True,
    ) -> None:
        self.x, self.y, self.operands, self.temperature = x, y, operands, temperature
        self.of_x, self.of_y = of_x, of_y
        self.cosine, self.eps, self.self_contrast = cosine, eps, x is y
        self.mask = None if mask is None else mask | mask.T
        self.tma = launch.has_tma(x.z.device)
        self.constant = temperature.constant_shift(cosine)
        self.dots = x.z.new_empty(0, dtype=torch.float64)

    def products(self) -> tuple[Tensor, Tensor]:
        """G Y and G^T X, scaled like the weights: (splits, padded rows, padded features), fp32.

        What is not asked for has no rows.
        """
        plain = self.constant and self.mask is None
        if not (plain and launch.fits_a_strip(self.x) and launch.has("owned", self.x)):
            return self._squares()
        nothing = self.x.z.new_empty(0, dtype=torch.float32)
        by_x = self._owned(self.x, self.y) if self.of_x else nothing
        if self.self_contrast:
            return by_x, by_x
        return by_x, self._owned(self.y, self.x) if self.of_y else nothing

    def _owned(self, x: Packed, y: Packed) -> Tensor:
        config = launch.config("owned", x)
        row_blocks = triton.cdiv(x.rows, config.rows)
        column_blocks = triton.cdiv(y.rows, config.columns)
        splits = launch.splits(row_blocks, column_blocks, x.z.device)
        out = x.z.new_empty(splits, x.padded_rows, x.padded_features, dtype=torch.float32)
        width = x.padded_features
        x_rows = launch.blocks_of(x.z, config.rows, width)
        y_rows = launch.blocks_of(y.z, config.columns, width)
        coefficients.owned_rows_kernel[(row_blocks * splits,)](
            x_rows, y_rows, out, _weights(x).weight, _weights(y).weight, self.temperature.argument,
            x.rows, y.rows, x.padded_rows, column_blocks, splits,
            SELF=self.self_contrast, WIDTH=width, BM=config.rows, BN=config.columns,
            PRECISION=self.operands.precision, TMA=self.tma, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
        return out

    def _squares(self) -> tuple[Tensor, Tensor]:
        x, y = self.x, self.y
        row_blocks, column_blocks = x.padded_rows // TILE, y.padded_rows // TILE
        dtype = x.z.dtype if x.planes == 1 else torch.float32
        bytes_of_tile = TILE * TILE * dtype.itemsize
        largest = max(1, math.isqrt(launch.workspace_bytes() // bytes_of_tile))
        largest = min(largest, 2 * max(row_blocks, column_blocks))  # more changes nothing below
        across = x.padded_features // self._product_columns(x)
        side = launch.square_side(largest, across, x.z.device)
        height, width = min(side, row_blocks), min(side, column_blocks)
        g = x.z.new_empty(height * TILE, width * TILE, dtype=dtype)
        by_x, by_y = (
            z.z.new_empty(1, z.padded_rows * wanted, z.padded_features, dtype=torch.float32)
            for z, wanted in ((x, self.of_x), (y, self.of_y))
        )
        if self.self_contrast:
            by_y = by_x
        tiles = height * width if self.temperature.is_tensor else 0
        self.dots = by_x.new_empty(tiles, dtype=torch.float64)
        filled = 0
        for i in range(0, row_blocks, height):
            for j in range(i if self.self_contrast else 0, column_blocks, width):
                shape = min(height, row_blocks - i), min(width, column_blocks - j)
                filled = max(filled, self._fill(g, i, j, shape, filled))
                if self.of_x:
                    self._multiply(g, shape, False, y, j, by_x, i, j > 0)
                if self.of_y and not (self.self_contrast and i == j):
                    self._multiply(g, shape, True, x, i, by_y, j, i > 0)
        self.dots = self.dots[: min(filled, tiles)]
        return by_x, by_y

    def _fill(self, g: Tensor, i: int, j: int, shape: tuple[int, int], filled: int) -> int:
        """G of the square of blocks from (i, j); the number of its tiles."""
        x, y, square = self.x, self.y, self.self_contrast and i == j
        tiles = shape[0] * (shape[0] + 1) // 2 if square else shape[0] * shape[1]
        depth, config = self.operands.depth_block(x.features), launch.config("coefficients", x)
        x_tiles, y_tiles = (launch.blocks_of(z.z, TILE, depth) for z in (x, y))
        coefficients.coefficient_tiles_kernel[(tiles,)](
            x_tiles, y_tiles, g, *_pointers(x), *_pointers(y), self.temperature.argument,
            x.z if self.mask is None else self.mask, x.rows, y.rows,
            x.padded_rows, y.padded_rows, i, j, shape[0], g.stride(0),
            self.dots, filled, 2 if self.self_contrast else 1,
            SELF=self.self_contrast, SQUARE=square, MASKED=self.mask is not None,
            CONSTANT=self.constant, TAU_TENSOR=self.temperature.is_tensor,
            DEPTH=x.padded_features, PLANES=x.planes, BM=TILE, BK=depth,
            PRECISION=self.operands.precision, TMA=self.tma, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
        return tiles

    def _multiply(
        self,
        g: Tensor,
        shape: tuple[int, int],
        transposed: bool,
        z: Packed,
        first_z: int,
        out: Tensor,
        first_out: int,
        accumulate: bool,
    ) -> None:
        own, other = shape[::-1] if transposed else shape
        config, across = _products(z), self._product_columns(z)
        step = 32 if g.dtype == torch.float32 else 64
        g_tiles = launch.blocks_of(g, *((step, TILE) if transposed else (TILE, step)))
        z_tiles = launch.blocks_of(z.z, step, across)
        coefficients.products_kernel[(own * (z.padded_features // across),)](
            g_tiles, z_tiles, out, first_out * TILE, first_z * TILE, other * TILE, z.padded_rows,
            z.padded_features, g.stride(0),
            TRANSPOSED=transposed, ACCUMULATE=accumulate, PLANES=z.planes, BM=TILE, BN=across,
            BK=step, PRECISION=self.operands.precision, TMA=self.tma, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip

    @staticmethod
    def _product_columns(z: Packed) -> int:
        return math.gcd(_products(z).columns, z.padded_features)

    def finish(
        self,
        packed: Packed,
        sums: Tensor,
        largest: Tensor,
        factor: float,
        temperature_factor: float,
        like: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the views of one side, and what it gives for the temperature."""
        views = packed.views
        grads = [view.new_empty(view.shape) for view in views]
        grad_temperature = like.new_empty(())
        width = triton.next_power_of_2(packed.padded_features)
        rows = row_block(width)
        programs = triton.cdiv(packed.rows, rows)
        partial = packed.z.new_empty(programs, dtype=torch.float64)
        pointers, strides = view_arguments(views)
        finish.finish_kernel[(programs,)](
            *pointers, packed.z, sums, _weights(packed).pull, grads[0], grads[-1], largest, partial,
            self.dots, packed.counter, grad_temperature, self.temperature.argument, packed.rows,
            packed.features, packed.padded_rows, *strides, self.eps, len(sums),
            1 / _weights(packed).scale, factor, temperature_factor, len(self.dots),
            PAIRS=len(views) == 2, PLANES=packed.planes, COSINE=self.cosine,
            TAU_TENSOR=self.temperature.is_tensor, VIEWS=len(views), PADDED=packed.padded_features,
            WIDTH=width, ROWS=rows, num_warps=4,
        )  # fmt: skip
        return grads, grad_temperature


def _products(z: Packed) -> Config:
    return launch.config("products" if z.planes == 1 else "products_split", z)


def _weights(packed: Packed) -> Weights:
    if packed.weights is None:
        raise ValueError("rows must be packed with what reaches them from upstream")
    return packed.weights


def _pointers(packed: Packed) -> tuple[Tensor, Tensor]:
    return _weights(packed).weight, _weights(packed).shift


def nt_xent_backward(
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


def cross_logsumexp_backward(
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
