"""The forward's launches: NT-Xent, and the log-sum-exps of both sides of a rectangle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cjepa_kernels.triton import launch
from cjepa_kernels.triton.kernels import similarity
from cjepa_kernels.triton.launch import TILE, Operands, Panel
from cjepa_kernels.triton.pack import Packed, Temperature, round_up


class Tiles:
    """Sums and maxima of the tiles of X Y^T, a panel of columns at a time.

    Attributes:
        row_sum, row_max: (blocks of the panel, padded rows), of each row over a block's columns.
        column_sum, column_max: (row blocks, columns of the panel), of each column over a block's
            rows.
        positive: (padded rows,) similarity of each row and its positive, where X is Y.
        kept_sum, kept_count: Of the similarities that a user's mask leaves, in any number of parts.
    """

    def __init__(
        self,
        x: Packed,
        y: Packed,
        operands: Operands,
        temperature: Temperature,
        constant: bool,
        mask: Tensor | None = None,
    ) -> None:
        self.x, self.y, self.operands, self.temperature = x, y, operands, temperature
        self.constant, self.self_contrast = constant, x is y
        self.mask = None if mask is None else mask | mask.T
        self.row_blocks = x.padded_rows // TILE
        self.column_blocks = y.padded_rows // TILE
        self.panels, self.group = launch.column_panels(self.row_blocks, self.column_blocks)
        self.small = self.row_blocks * self.column_blocks <= launch.SMALL**2
        strips = constant and mask is None and not self.small and launch.fits_a_strip(x)
        strips = strips and launch.has("strips", x)
        self.run = launch.run_blocks(self.row_blocks) if strips else 1
        size = max(panel.blocks for panel in self.panels) * self.row_blocks * TILE
        self.row_sum, self.row_max = self._floats(size), self._floats(size)
        self.column_sum, self.column_max = self._floats(size), self._floats(size)
        self.positive = self._floats(x.padded_rows if self.self_contrast else 0)
        kept = sum(map(self._programs, self.panels)) if mask is not None else 0
        self.kept_sum = x.z.new_zeros(kept, dtype=torch.float32)
        self.kept_count = x.z.new_zeros(kept, dtype=torch.int32)

    def _floats(self, size: int) -> Tensor:
        return self.x.z.new_empty(size, dtype=torch.float32)

    def __iter__(self) -> Iterator[Panel]:
        """Compute a panel, then hand it out."""
        kept = 0
        for panel in self.panels:
            if self.small or self.mask is not None:
                self._launch(panel, "all", self._programs(panel), kept)
                kept += self._programs(panel) if self.mask is not None else 0
            else:
                if self.x.rows < TILE or self.y.rows < TILE:
                    pass  # no tile is whole
                elif self.run > 1:
                    self._launch_strips(panel)
                else:
                    self._launch(panel, "inner", self._programs(panel), 0)
                edge = self._edge_programs(panel)
                if edge > 0:
                    self._launch(panel, "edge", edge, 0)
            yield panel

    def _programs(self, panel: Panel) -> int:
        group = self.group
        first, last = panel.first // group, round_up(panel.last, group) // group
        if self.self_contrast:
            squares = last * (last + 1) // 2 - first * (first + 1) // 2
        else:
            squares = (last - first) * (round_up(self.row_blocks, group) // group)
        return squares * group * group

    def _edge_programs(self, panel: Panel) -> int:
        ragged_columns = panel.is_last and self.y.rows % TILE != 0
        if self.self_contrast:
            return panel.blocks + (self.row_blocks - 1 if ragged_columns else 0)
        along = panel.blocks if self.x.rows % TILE != 0 else 0
        if not ragged_columns:
            return along
        return along + self.row_blocks - (along > 0)  # the corner is in one of them

    def _launch(self, panel: Panel, place: str, programs: int, kept: int) -> None:
        x, y = self.x, self.y
        plain = place == "inner" and x.planes == 1 and launch.has("inner_tiles", x)
        config = launch.config("inner_tiles" if plain else "tiles", x)
        depth = self.operands.depth_block(x.features)
        x_tiles, y_tiles = (launch.blocks_of(z.z, TILE, depth) for z in (x, y))
        mask = self.mask if self.mask is not None else self.positive
        along = panel.blocks
        if place == "edge" and not self.self_contrast and x.rows % TILE == 0:
            along = 0
        similarity.tiles_kernel[(programs,)](
            x_tiles, y_tiles, self.row_sum, self.row_max, self.column_sum, self.column_max,
            self.positive, self.kept_sum[kept:], self.kept_count[kept:], self.temperature.argument,
            mask, x.rows, y.rows, x.padded_rows, y.padded_rows,
            self.row_blocks, self.column_blocks, panel.first, panel.last, along,
            SELF=self.self_contrast, MASKED=self.mask is not None, CONSTANT=self.constant,
            TAU_TENSOR=self.temperature.is_tensor, PLACE=place, DEPTH=x.padded_features,
            PLANES=x.planes, BM=TILE, BK=depth, GROUP=self.group,
            PRECISION=self.operands.precision, TMA=launch.has_tma(x.z.device),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def _launch_strips(self, panel: Panel) -> None:
        x, y, config = self.x, self.y, launch.config("strips", self.x)
        x_tiles = launch.blocks_of(x.z, config.rows, x.padded_features)
        y_tiles = launch.blocks_of(y.z, TILE, y.padded_features)
        runs = -(-(x.rows // TILE) // self.run)
        similarity.strips_kernel[(panel.blocks * runs,)](
            x_tiles, y_tiles, self.row_sum, self.row_max, self.column_sum, self.column_max,
            self.temperature.argument, self.row_blocks, x.rows // TILE, panel.first, panel.last,
            y.rows // TILE, self.run,
            SELF=self.self_contrast, TAU_TENSOR=self.temperature.is_tensor,
            WIDTH=x.padded_features, TILE=TILE, BM=config.rows, PIPELINED=config.pipelined,
            FOLD=config.fold, PRECISION=self.operands.precision, TMA=launch.has_tma(x.z.device),
            num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
