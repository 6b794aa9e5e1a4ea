"""The tiles of S = X Y^T, their sums and maxima, a panel of columns at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from cjepa_kernels.triton import hopper, launch
from cjepa_kernels.triton.configs import TILE
from cjepa_kernels.triton.kernels.similarity import strips_kernel, tiles_kernel
from cjepa_kernels.triton.launch import Operands, Panel
from cjepa_kernels.triton.operands import round_up
from cjepa_kernels.triton.pack import Packed, cdiv
from cjepa_kernels.triton.prepare import symmetric
from cjepa_kernels.triton.recording import new_zeros, run_kernel
from cjepa_kernels.triton.temperature import Temperature

Place = Literal["all", "inner", "edge"]  # as ``tiles_kernel`` defines them


class Tiles:
    """Sums and maxima of the tiles of X Y^T; iterating computes one panel after the other.

    Attributes:
        row_sum: (column blocks of the panel, padded rows) fp32, see ``kernels/similarity.py``.
        row_max: The same shape, the maxima of the same entries.
        column_sum: (slots, columns of the panel) fp32.
        column_max: The same shape, the maxima of the same entries.
        positive: (padded rows,) fp32, the similarity of each row and its other view, where X is Y
            and has two. With ``positives`` it is (rows,), and nothing is written for a row without
            one.
        negative_sum: Parts of the sum of the similarities that a user's mask leaves, fp32.
        negative_count: How many these are, in as many parts, int32.
        run_length: Row blocks of a slot of the columns, unless ``hopper`` counts the slots.
        hopper: Launches of a Gluon kernel, which takes the inner tiles if it serves them.
    """

    def __init__(
        self,
        x: Packed,
        y: Packed,
        *,
        operator: str,
        operands: Operands,
        temperature: Temperature,
        constant: bool,
        mask: Tensor | None = None,
        positives: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> None:
        self.x, self.y, self.operands, self.temperature = x, y, operands, temperature
        self.operator, self.positives, self.classes = operator, positives, classes
        self.constant, self.self_contrast = constant, x is y
        # Any tile may hold entries that do not count.
        self.every_tile_is_masked = mask is not None or classes is not None
        self.mask = None if mask is None else symmetric(mask)
        self.row_blocks = x.padded_rows // TILE
        self.column_blocks = y.padded_rows // TILE
        self.panels, self.group = launch.column_panels(self.row_blocks, self.column_blocks)
        self.one_launch = self.row_blocks * self.column_blocks <= launch.ONE_LAUNCH_BLOCKS**2
        size = max(panel.blocks for panel in self.panels) * self.row_blocks * TILE
        self.row_sum, self.row_max = self.new_floats(size), self.new_floats(size)
        self.column_sum, self.column_max = self.new_floats(size), self.new_floats(size)
        paired_rows = 0 if positives is None else x.rows
        views_are_paired = self.self_contrast and len(x.views) == 2
        self.positive = self.new_floats(x.padded_rows if views_are_paired else paired_rows)
        parts = sum(map(self._programs, self.panels)) if mask is not None else 0
        self.negative_sum = new_zeros(x.z, parts, dtype=torch.float32)
        self.negative_count = new_zeros(x.z, parts, dtype=torch.int32)
        self.hopper = None if self.one_launch or positives is not None else hopper.select(self)
        self.strips = (
            self.hopper is None
            and constant
            and not self.every_tile_is_masked
            and positives is None  # they would take registers that a strip does not have
            and not self.one_launch
            and launch.fits_a_strip(x)
            and launch.has("strips", x)
        )
        self.run_length = launch.run_length(self.row_blocks) if self.strips else 1

    def new_floats(self, size: int) -> Tensor:
        """A (size,) tensor of fp32 on the device of the rows, not yet written."""
        return self.x.z.new_empty(size, dtype=torch.float32)

    def __iter__(self) -> Iterator[Panel]:
        """Compute a panel, then hand it out to be reduced."""
        first_part = 0
        for panel in self.panels:
            if self.one_launch or self.every_tile_is_masked:
                programs = self._programs(panel)
                self._launch_tiles(panel, "all", programs, first_part)
                first_part += programs if self.mask is not None else 0
            else:
                if self.x.rows < TILE or self.y.rows < TILE:
                    pass  # There is no whole tile.
                elif self.hopper is not None:
                    self.hopper.launch(panel)
                elif self.strips:
                    self._launch_strips(panel)
                else:
                    self._launch_tiles(panel, "inner", self._programs(panel))
                programs = self._edge_programs(panel)
                if programs > 0:
                    self._launch_tiles(panel, "edge", programs)
            yield panel

    def slot_counts(self, panel: Panel) -> Tensor:
        """(column blocks,) int32 slots of each block of the panel's columns.

        Without ``hopper`` slots are not counted, and no kernel reads the tensor.
        """
        if self.hopper is None:
            return self.negative_count
        return self.hopper.tables[panel].slots

    def _programs(self, panel: Panel) -> int:
        """Programs that take all tiles of a panel, square by square (see ``tile_of``)."""
        group = self.group
        first, last = panel.first // group, round_up(panel.last, group) // group
        if self.self_contrast:
            squares = last * (last + 1) // 2 - first * (first + 1) // 2
        else:
            squares = (last - first) * (round_up(self.row_blocks, group) // group)
        return squares * group * group

    def _edge_row_tiles(self, panel: Panel) -> int:
        """Tiles of the panel on the diagonal, or in a last row of blocks that is not whole."""
        return panel.blocks if self.self_contrast or self.x.rows % TILE != 0 else 0

    def _edge_programs(self, panel: Panel) -> int:
        """Programs that take the tiles that need a mask (see ``edge_tile``)."""
        row_tiles = self._edge_row_tiles(panel)
        if not (panel.is_last and self.y.rows % TILE != 0):
            return row_tiles
        # The corner is already among the tiles of the rows, if there are any.
        return row_tiles + self.row_blocks - (row_tiles > 0)

    def _launch_tiles(self, panel: Panel, place: Place, programs: int, first_part: int = 0) -> None:
        x, y = self.x, self.y
        plain = place == "inner" and x.planes == 1 and launch.has("inner_tiles", x)
        config = launch.config("inner_tiles" if plain else "tiles", x)
        depth = self.operands.depth_block(x.features)
        run_kernel(
            tiles_kernel, programs,
            x=launch.blocks_of(x.z, TILE, depth), y=launch.blocks_of(y.z, TILE, depth),
            row_sum=self.row_sum, row_max=self.row_max, column_sum=self.column_sum,
            column_max=self.column_max,
            positives=self.positive if self.positives is None else self.positives,
            positive=self.positive,
            negative_sum=self.negative_sum[first_part:],
            negative_count=self.negative_count[first_part:],
            temperature=self.temperature.argument,
            mask=self.positive if self.mask is None else self.mask,
            classes=self.positive if self.classes is None else self.classes,
            rows=x.rows, columns=y.rows, x_plane=x.padded_rows, y_plane=y.padded_rows,
            row_blocks=self.row_blocks, column_blocks=self.column_blocks, first_column=panel.first,
            last_column=panel.last, row_tiles=self._edge_row_tiles(panel),
            SELF=self.self_contrast, VIEWS=len(x.views), PAIRED=self.positives is not None,
            MASKED=self.mask is not None, CLASSED=self.classes is not None, CONSTANT=self.constant,
            TAU_TENSOR=self.temperature.is_tensor, PLACE=place, DEPTH=x.padded_features,
            PLANES=x.planes, BM=TILE, BK=depth, GROUP=self.group,
            PRECISION=self.operands.precision, TMA=launch.has_tma(x.z.device),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def _launch_strips(self, panel: Panel) -> None:
        x, y, config = self.x, self.y, launch.config("strips", self.x)
        whole_rows, whole_columns = x.rows // TILE, y.rows // TILE
        runs = cdiv(whole_rows, self.run_length)
        run_kernel(
            strips_kernel, panel.blocks * runs,
            x=launch.blocks_of(x.z, config.rows, x.padded_features),
            y=launch.blocks_of(y.z, TILE, y.padded_features),
            row_sum=self.row_sum, row_max=self.row_max, column_sum=self.column_sum,
            column_max=self.column_max, temperature=self.temperature.argument,
            row_blocks=self.row_blocks, whole_rows=whole_rows, first_column=panel.first,
            last_column=panel.last, whole_columns=whole_columns, run_length=self.run_length,
            SELF=self.self_contrast, TAU_TENSOR=self.temperature.is_tensor,
            WIDTH=x.padded_features, TILE=TILE, BM=config.rows, PIPELINED=config.pipelined,
            FOLD=config.fold, PRECISION=self.operands.precision, TMA=launch.has_tma(x.z.device),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
