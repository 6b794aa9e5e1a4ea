"""The backward's launches: the gradients of NT-Xent, and of the log-sum-exps of a rectangle."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from cjepa_kernels.triton import launch
from cjepa_kernels.triton.configs import Config
from cjepa_kernels.triton.kernels import coefficients, finish
from cjepa_kernels.triton.launch import TILE, Operands
from cjepa_kernels.triton.pack import (
    Packed,
    Temperature,
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
