"""The backward of the tiles: products of G with the rows of both sides, then the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cjepa_kernels.triton import hopper_gradients, launch
from cjepa_kernels.triton.configs import TILE, Config
from cjepa_kernels.triton.kernels.coefficients import (
    coefficient_tiles_kernel,
    owned_rows_kernel,
    products_kernel,
)
from cjepa_kernels.triton.kernels.finish import finish_kernel
from cjepa_kernels.triton.launch import Operands
from cjepa_kernels.triton.pack import (
    Packed,
    cdiv,
    next_power_of_2,
    row_block,
    view_arguments,
    weights_of,
)
from cjepa_kernels.triton.prepare import symmetric
from cjepa_kernels.triton.recording import run_kernel
from cjepa_kernels.triton.temperature import Temperature

PositivesOfLoss = Literal["", "logits", "similarities"]  # as ``finish_kernel`` defines them


@dataclass(frozen=True)
class Square:
    """The blocks of S of which the workspace holds G at one time.

    Attributes:
        first_row: Its first block of rows.
        first_column: Its first block of columns.
        row_blocks: Its number of row blocks.
        column_blocks: Its number of column blocks.
        diagonal: Whether it lies on the diagonal of a symmetric S.
    """

    first_row: int
    first_column: int
    row_blocks: int
    column_blocks: int
    diagonal: bool

    @property
    def tiles(self) -> int:
        """Tiles of which G is computed."""
        if self.diagonal:
            return self.row_blocks * (self.row_blocks + 1) // 2
        return self.row_blocks * self.column_blocks


class Gradients:
    """One backward: its operands with their weights, and the schedule of its tiles.

    Attributes:
        dots: (parts,) fp64 parts of the sum of G_ab s_ab, for a temperature that is a tensor.
    """

    def __init__(
        self,
        x: Packed,
        y: Packed,
        *,
        operator: str,
        operands: Operands,
        temperature: Temperature,
        cosine: bool,
        eps: float,
        mask: Tensor | None = None,
        positives: Tensor | None = None,
        classes: Tensor | None = None,
        attraction: Tensor | None = None,
        of_x: bool = True,
        of_y: bool = True,
    ) -> None:
        self.operator = operator
        self.x, self.y, self.operands, self.temperature = x, y, operands, temperature
        self.of_x, self.of_y = of_x, of_y
        self.cosine, self.eps, self.self_contrast = cosine, eps, x is y
        self.mask = None if mask is None else symmetric(mask)
        self.positives, self.classes = positives, classes
        self.attraction = attraction  # of the rows of a class, which then count for each other
        # Any tile may hold entries that do not count.
        self.every_tile_is_masked = mask is not None or classes is not None
        self.tma = launch.has_tma(x.z.device)
        self.constant = temperature.constant_shift(cosine)
        self.dots = x.z.new_empty(0, dtype=torch.float64)

    def products(self) -> tuple[Tensor, Tensor]:
        """G Y and G^T X, scaled like the weights: (splits, padded rows, padded features) fp32.

        A product that was not asked for has no rows.
        """
        by_gluon = hopper_gradients.products(self)
        if by_gluon is not None:
            return by_gluon
        plain = self.constant and not self.every_tile_is_masked
        if not (plain and launch.fits_a_strip(self.x) and launch.has("owned", self.x)):
            return self._products_by_squares()
        nothing = self.x.z.new_empty(0, dtype=torch.float32)
        by_x = self._products_by_owned_rows(self.x, self.y) if self.of_x else nothing
        if self.self_contrast:
            return by_x, by_x
        return by_x, self._products_by_owned_rows(self.y, self.x) if self.of_y else nothing

    def _products_by_owned_rows(self, x: Packed, y: Packed) -> Tensor:
        config = launch.config("owned", x)
        row_blocks = cdiv(x.rows, config.rows)
        column_blocks = cdiv(y.rows, config.columns)
        splits = launch.splits(row_blocks, column_blocks, x.z.device)
        out = x.z.new_empty(splits, x.padded_rows, x.padded_features, dtype=torch.float32)
        width = x.padded_features
        paired = "" if self.positives is None else "rows" if x is self.x else "columns"
        run_kernel(
            owned_rows_kernel, row_blocks * splits,
            x=launch.blocks_of(x.z, config.rows, width),
            y=launch.blocks_of(y.z, config.columns, width),
            out=out, row_weight=weights_of(x).weight, column_weight=weights_of(y).weight,
            **self._positive_arguments(),
            temperature=self.temperature.argument, rows=x.rows, columns=y.rows,
            padded_rows=x.padded_rows, column_blocks=column_blocks, splits=splits,
            SELF=self.self_contrast, VIEWS=len(x.views), PAIRED=paired, WIDTH=width,
            BM=config.rows, BN=config.columns, PRECISION=self.operands.precision, TMA=self.tma,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return out

    def _positive_arguments(self) -> dict[str, Tensor]:
        """The positives of X and their weights; without positives the kernels use neither."""
        weights = weights_of(self.x).positive
        return {
            "positives": weights if self.positives is None else self.positives,
            "positive_weight": weights,
        }

    def _products_by_squares(self) -> tuple[Tensor, Tensor]:
        x, y = self.x, self.y
        dtype = x.z.dtype if x.planes == 1 else torch.float32
        height, width = self._square_shape(dtype)
        g = x.z.new_empty(height * TILE, width * TILE, dtype=dtype)
        by_x, by_y = (
            z.z.new_empty(1, z.padded_rows * wanted, z.padded_features, dtype=torch.float32)
            for z, wanted in ((x, self.of_x), (y, self.of_y))
        )
        if self.self_contrast:
            by_y = by_x
        slots = height * width if self.temperature.is_tensor else 0
        self.dots = by_x.new_empty(slots, dtype=torch.float64)
        filled = 0
        for square in self._squares(height, width):
            self._fill(g, square, filled_slots=filled)
            filled = max(filled, square.tiles)
            if self.of_x:
                self._multiply(g, square, y, by_x, transposed=False)
            if self.of_y and not square.diagonal:
                self._multiply(g, square, x, by_y, transposed=True)
        self.dots = self.dots[: min(filled, slots)]
        return by_x, by_y

    def _square_shape(self, dtype: torch.dtype) -> tuple[int, int]:
        """Row blocks and column blocks of the largest squares whose G fits the workspace."""
        row_blocks, column_blocks = self.x.padded_rows // TILE, self.y.padded_rows // TILE
        largest = max(1, math.isqrt(launch.workspace_bytes() // (TILE * TILE * dtype.itemsize)))
        # A larger square would be cut to the blocks that there are.
        largest = min(largest, 2 * max(row_blocks, column_blocks))
        programs_of_block = self.x.padded_features // _product_columns(self.x)
        side = launch.square_side(largest, programs_of_block, self.x.z.device)
        return min(side, row_blocks), min(side, column_blocks)

    def _squares(self, height: int, width: int) -> Iterator[Square]:
        """The squares row by row; of a symmetric S those on and above the diagonal."""
        row_blocks, column_blocks = self.x.padded_rows // TILE, self.y.padded_rows // TILE
        for i in range(0, row_blocks, height):
            for j in range(i if self.self_contrast else 0, column_blocks, width):
                yield Square(
                    first_row=i,
                    first_column=j,
                    row_blocks=min(height, row_blocks - i),
                    column_blocks=min(width, column_blocks - j),
                    diagonal=self.self_contrast and i == j,
                )

    def _fill(self, g: Tensor, square: Square, *, filled_slots: int) -> None:
        """Write G of a square, and add its dots to the slots of the squares before it."""
        x, y = self.x, self.y
        x_weights, y_weights = weights_of(x), weights_of(y)
        depth, config = self.operands.depth_block(x.features), launch.config("coefficients", x)
        run_kernel(
            coefficient_tiles_kernel, square.tiles,
            x=launch.blocks_of(x.z, TILE, depth), y=launch.blocks_of(y.z, TILE, depth), g_out=g,
            row_weight=x_weights.weight, row_shift=x_weights.shift,
            column_weight=y_weights.weight, column_shift=y_weights.shift,
            **self._positive_arguments(),
            temperature=self.temperature.argument, mask=x.z if self.mask is None else self.mask,
            classes=x.z if self.classes is None else self.classes,
            attraction=x_weights.weight if self.attraction is None else self.attraction,
            rows=x.rows, columns=y.rows, x_plane=x.padded_rows, y_plane=y.padded_rows,
            first_row=square.first_row, first_column=square.first_column,
            row_blocks=square.row_blocks, g_stride=g.stride(0), dots=self.dots,
            filled_slots=filled_slots, multiplicity=2 if self.self_contrast else 1,
            SELF=self.self_contrast, VIEWS=len(x.views), PAIRED=self.positives is not None,
            SQUARE=square.diagonal, MASKED=self.mask is not None,
            CLASSED=self.classes is not None and self.attraction is None,
            ATTRACTED=self.attraction is not None, CONSTANT=self.constant,
            TAU_TENSOR=self.temperature.is_tensor,
            DEPTH=x.padded_features, PLANES=x.planes, BM=TILE, BK=depth,
            PRECISION=self.operands.precision, TMA=self.tma,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def _multiply(
        self, g: Tensor, square: Square, z: Packed, out: Tensor, *, transposed: bool
    ) -> None:
        """Add G Z of a square to ``out``, or G^T Z if ``transposed``."""
        first_out, first_z = square.first_row, square.first_column
        out_blocks, z_blocks = square.row_blocks, square.column_blocks
        step = 32 if g.dtype == torch.float32 else 64
        g_block = TILE, step
        if transposed:
            first_out, first_z = first_z, first_out
            out_blocks, z_blocks = z_blocks, out_blocks
            g_block = step, TILE
        config, columns = _product_config(z), _product_columns(z)
        run_kernel(
            products_kernel, out_blocks * (z.padded_features // columns),
            g=launch.blocks_of(g, *g_block), z=launch.blocks_of(z.z, step, columns), out=out,
            first_out=first_out * TILE, first_z=first_z * TILE, depth=z_blocks * TILE,
            plane=z.padded_rows, features=z.padded_features, g_stride=g.stride(0),
            TRANSPOSED=transposed, ACCUMULATE=first_z > 0, PLANES=z.planes, BM=TILE, BN=columns,
            BK=step, PRECISION=self.operands.precision, TMA=self.tma,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def finish(
        self,
        packed: Packed,
        products: Tensor,
        *,
        largest_grad: Tensor,
        grad_factor: float,
        temperature_factor: float,
        like: Tensor,
        positives: PositivesOfLoss = "",
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the views of one side, and the temperature's gradient that follows from it.

        Args:
            packed: The side.
            products: Its products with G, from ``products()``.
            largest_grad: () the largest upstream gradient, by which the weights were divided.
            grad_factor: All gradients are multiplied by it.
            temperature_factor: See ``finish_kernel``.
            like: The temperature's gradient has the dtype and device of this tensor.
            positives: See ``finish_kernel``.
        """
        views, weights = packed.views, weights_of(packed)
        grads = [view.new_empty(view.shape) for view in views]
        grad_temperature = like.new_empty(())
        width = next_power_of_2(packed.padded_features)
        rows = row_block(width)
        programs = cdiv(packed.rows, rows)
        run_kernel(
            finish_kernel, programs,
            **view_arguments(views), z=packed.z, products=products,
            **self._positive_arguments(), grad_0=grads[0], grad_1=grads[-1],
            largest_grad=largest_grad, partial=packed.z.new_empty(programs, dtype=torch.float64),
            dots=self.dots, counter=packed.counter, grad_temperature=grad_temperature,
            temperature=self.temperature.argument, rows=packed.rows, features=packed.features,
            padded_rows=packed.padded_rows, eps=self.eps, splits=products.shape[0],
            product_factor=1 / weights.scale, grad_factor=grad_factor,
            temperature_factor=temperature_factor, dot_count=self.dots.shape[0],
            POSITIVES=positives, PLANES=packed.planes, COSINE=self.cosine,
            TAU_TENSOR=self.temperature.is_tensor, VIEWS=len(views),
            PADDED=packed.padded_features, WIDTH=width, ROWS=rows, num_warps=4,
        )  # fmt: skip
        return grads, grad_temperature


def _product_config(z: Packed) -> Config:
    return launch.config("products" if z.planes == 1 else "products_split", z)


def _product_columns(z: Packed) -> int:
    """Features that a program of the product takes; they divide the padded features."""
    return math.gcd(_product_config(z).columns, z.padded_features)
