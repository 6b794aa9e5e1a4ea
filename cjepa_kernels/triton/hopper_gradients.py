"""The products of G by the Gluon kernels for Hopper GPUs, where they serve.

They serve operands of 16 bits with the constant shift, without a user's mask, without classes and
without positives, on GPUs of compute capability 9.0, for combinations that ``proved.py`` allows:
owned rows for 64, 128 and 256 features, and squares for other multiples of 256. Rows against
themselves must be those of two views. The Triton kernels in ``gradients.py`` serve everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cjepa_kernels.backends import triton_is_interpreted
from cjepa_kernels.triton import configs, gradient_schedules, hopper, launch, proved
from cjepa_kernels.triton.configs import TILE, Config, Kernel
from cjepa_kernels.triton.gradient_schedules import BOX, FEATURES_OF_JOB, Boxes, Square, Work
from cjepa_kernels.triton.hopper import Numbers, Table
from cjepa_kernels.triton.kernels.arrange import clear_kernel, reorder_kernel
from cjepa_kernels.triton.pack import Packed, cdiv, weights_of
from cjepa_kernels.triton.recording import run_kernel

if TYPE_CHECKING:
    from cjepa_kernels.triton.gradients import Gradients

LEAST_FEATURES = 64  # A row of them fills the layout of shared memory.
# Few blocks of rows against many columns leave programs idle. The Triton kernels share out more
# finely.
LEAST_BUSY = 0.7
CLEARED_NUMBERS = 8192  # of a program
REORDERED_ROWS, REORDERED_FEATURES = 32, 256  # of a program, and of its steps


def products(gradients: Gradients) -> tuple[Tensor, Tensor] | None:
    """G Y and G^T X as ``Gradients.products`` returns them; None if the Triton kernels serve."""
    if not _serves(gradients):
        return None
    owned = _entry("hopper_owned", gradients.x) if launch.fits_a_strip(gradients.x) else None
    return _by_squares(gradients) if owned is None else _by_owned_rows(gradients, owned)


def _serves(gradients: Gradients) -> bool:
    x, y = gradients.x, gradients.y
    blocks = x.padded_rows * y.padded_rows // TILE**2
    if (
        not gradients.constant
        or gradients.every_tile_is_masked
        or gradients.positives is not None
        # Of one view the row a ^ 1 counts, which these kernels leave out.
        or (gradients.self_contrast and len(x.views) == 1)
        or blocks < hopper.SMALLEST_BLOCKS**2
        or x.planes != 1
        or x.padded_features < LEAST_FEATURES
        or configs.architecture(x.z.device) != hopper.ARCHITECTURE
        or triton_is_interpreted()
    ):
        return False
    return proved.is_allowed(
        "gluon",
        architecture=hopper.ARCHITECTURE,
        dtype=x.z.dtype,
        features=x.features,
        operator=gradients.operator,
        direction="backward",
    )


def _entry(kernel: Kernel, x: Packed) -> Config | None:
    """The best entry of the table for the kernel; None if the kernel must not be used."""
    for entry in configs.entries(kernel, hopper.ARCHITECTURE, x.z.dtype, x.padded_features):
        if entry.architecture == hopper.ARCHITECTURE:
            return entry if entry.warps > 0 else None
    return None


def _numbers(make: Callable[[], Work]) -> Numbers | None:
    """The numbers of a schedule; None if it leaves programs idle."""
    work = make()
    return Numbers(work.starts, work.table, ()) if work.busy >= LEAST_BUSY else None


def _compile(kernel: Kernel, arguments: dict[str, Any]) -> None:
    hopper.kernel_of(kernel).warmup(**arguments, grid=(1,))


def _two_parts(x: Packed) -> Tensor:
    """(2, padded rows, padded features) fp32; the second part is 0, the first is not written."""
    out = x.z.new_empty(2, x.padded_rows, x.padded_features, dtype=torch.float32)
    size = out[1].numel()
    run_kernel(
        clear_kernel, cdiv(size, CLEARED_NUMBERS),
        out=out[1], size=size, BLOCK=CLEARED_NUMBERS, num_warps=4,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class OwnedRows:
    """The launch of owned rows of one side.

    Attributes:
        x: The rows.
        y: The columns.
        config: How the kernel is compiled.
        table: Its schedule.
        temperature: The temperature.
    """

    x: Packed
    y: Packed
    config: Config
    table: Table
    temperature: float

    def arguments(self, out: Tensor) -> dict[str, Any]:
        """The arguments of the kernel, by name."""
        x, y, config = self.x, self.y, self.config
        width = x.padded_features
        return {
            "own_blocks": hopper.blocks_of(x.z, hopper.TILE_ROWS, width),
            "tile_blocks": hopper.blocks_of(y.z, config.columns, width),
            "row_weight": weights_of(x).weight,
            "column_weight": weights_of(y).weight,
            "out": out,
            "starts": self.table.starts,
            "table": self.table.segments,
            "temperature": self.temperature,
            "out_rows": x.padded_rows,
            "WIDTH": width,
            "COLUMNS": config.columns,
            "STAGES": config.stages,
            "SELF": x is y,
            "PIPELINED": config.pipelined,
            "num_warps": config.warps,
            "maxnreg": hopper.REGISTERS,
        }

    def compiles(self) -> bool:
        """Whether the kernel compiles."""
        x, config = self.x, self.config
        key = (config, x.z.dtype, x.padded_features, x.z.device, x is self.y)
        out = x.z.new_empty(BOX, dtype=torch.float32)
        compile_kernel = partial(_compile, config.kernel, self.arguments(out))
        return hopper.compiles(key, config.kernel, compile_kernel)

    def launch(self) -> Tensor:
        """G Y in one or two parts."""
        x, kernel = self.x, hopper.kernel_of(self.config.kernel)
        if gradient_schedules.has_second_parts(x.padded_rows // TILE, self.table.programs):
            out = _two_parts(x)
        else:
            out = x.z.new_empty(1, x.padded_rows, x.padded_features, dtype=torch.float32)
        run_kernel(kernel, self.table.programs, **self.arguments(out))
        return out


def _by_owned_rows(gradients: Gradients, config: Config) -> tuple[Tensor, Tensor] | None:
    x, y = gradients.x, gradients.y
    sides = [(x, y)] if gradients.of_x else []
    sides += [(y, x)] if gradients.of_y and not gradients.self_contrast else []
    makes = [_owned_schedule(*side) for side in sides]
    tables = hopper.cached_tables(x.z.device, dict(makes))
    if tables is None:
        return None
    found = [
        OwnedRows(*side, config, tables[key], gradients.temperature.number)
        for side, (key, _) in zip(sides, makes, strict=True)
    ]
    if not all(one.compiles() for one in found):
        return None
    products = [one.launch() for one in found]
    nothing = x.z.new_empty(0, dtype=torch.float32)
    by_x = products[0] if gradients.of_x else nothing
    if gradients.self_contrast:
        return by_x, by_x
    return by_x, products[-1] if gradients.of_y else nothing


def _owned_schedule(x: Packed, y: Packed) -> tuple[tuple[Any, ...], Callable[[], Numbers | None]]:
    """The key of a schedule of owned rows, and what makes it."""
    row_blocks, column_blocks = x.padded_rows // TILE, y.padded_rows // TILE
    programs = hopper.programs(x.z.device)
    make = partial(
        gradient_schedules.owned, row_blocks, column_blocks, programs, self_contrast=x is y
    )
    return ("hopper_owned", row_blocks, column_blocks, programs, x is y), partial(_numbers, make)


class Squares:
    """The launches of all squares of one backward.

    Attributes:
        fill: How the kernel that writes G is compiled.
        multiply: How the kernel of the products is compiled.
        side: Blocks of the side of a square.
        boxes: The workspace.
    """

    def __init__(self, gradients: Gradients, fill: Config, multiply: Config) -> None:
        self.x, self.y, self.self_contrast = gradients.x, gradients.y, gradients.self_contrast
        self.of_x, self.of_y = gradients.of_x, gradients.of_y
        self.temperature = gradients.temperature.number
        self.fill, self.multiply = fill, multiply
        self.by_tiles = fill.kernel == "hopper_tiles"
        self.blocks = self.x.padded_rows // TILE, self.y.padded_rows // TILE
        self.programs = hopper.programs(self.x.z.device)
        box_bytes = BOX * BOX * self.x.z.dtype.itemsize
        self.side = gradient_schedules.square_side(
            *self.blocks,
            self.programs,
            self.x.padded_features,
            tile_boxes=multiply.rows // BOX,
            by_tiles=self.by_tiles,
            self_contrast=self.self_contrast,
            most_boxes=launch.workspace_bytes() // box_bytes,
        )
        self.boxes: Boxes = gradient_schedules.boxes(
            min(self.side, self.blocks[0]), min(self.side, self.blocks[1]), by_tiles=self.by_tiles
        )
        # By shape, for G; by shape and what ``results`` has for a launch, for its products.
        self.tables: dict[tuple[Square, tuple[bool, bool] | None], Table] = {}

    @property
    def squares(self) -> list[tuple[int, int, Square]]:
        """First row block, first column block and shape of each square."""
        return gradient_schedules.squares(*self.blocks, self.side, self_contrast=self.self_contrast)

    @property
    def results(self) -> list[tuple[bool, bool]]:
        """For each launch of the products of a square: whether it is of rows, and of columns."""
        if self.self_contrast:
            return [(True, True)]
        return [(True, False)] * self.of_x + [(False, True)] * self.of_y

    def make_tables(self) -> bool:
        """Make the schedules of all shapes of squares; False if one of them does not serve."""
        keys: dict[tuple[Square, tuple[bool, bool] | None], tuple[Any, ...]] = {}
        makes: dict[tuple[Any, ...], Callable[[], Numbers | None]] = {}
        for square in dict.fromkeys(square for _, _, square in self.squares):
            for of in (None, *self.results):
                key, make = self._fill_work(square) if of is None else self._work_of(square, of)
                keys[square, of], makes[key] = key, partial(_numbers, make)
        tables = hopper.cached_tables(self.x.z.device, makes)
        if tables is None:
            return False
        self.tables = {of: tables[key] for of, key in keys.items()}
        return True

    def _fill_work(self, square: Square) -> tuple[tuple[Any, ...], Callable[[], Work]]:
        """The key of a schedule of G, and what makes it."""
        boxes = self.fill.rows // BOX
        key = (self.fill.kernel, square, boxes, self.programs)
        if self.by_tiles:
            return key, partial(gradient_schedules.tiles, square, self.programs, boxes)
        return key, partial(gradient_schedules.strips, square, self.programs)

    def _work_of(
        self, square: Square, of: tuple[bool, bool]
    ) -> tuple[tuple[Any, ...], Callable[[], Work]]:
        """The key of a schedule of products, and what makes it."""
        features, boxes = self.x.padded_features, self.multiply.rows // BOX
        make = partial(
            gradient_schedules.products,
            square,
            self.programs,
            features,
            tile_boxes=boxes,
            pitch=self.boxes.pitch,
            of_rows=of[0],
            of_columns=of[1],
        )
        return (
            "hopper_products",
            square,
            self.programs,
            features,
            boxes,
            self.boxes.pitch,
            of,
        ), make

    def fill_arguments(
        self, g: Tensor, reordered: Tensor, i: int, j: int, table: Table
    ) -> dict[str, Any]:
        """The arguments of the kernel that writes G of the square at (i, j), by name."""
        x, y, config = self.x, self.y, self.fill
        arguments: dict[str, Any] = {
            "row_weight": weights_of(x).weight,
            "column_weight": weights_of(y).weight,
            "g": g,
            "starts": table.starts,
            "table": table.segments,
            "temperature": self.temperature,
            "first_row": i,
            "first_column": j,
            "pitch": self.boxes.pitch,
            "WIDTH": x.padded_features,
            "STAGES": config.stages,
            "SELF": self.self_contrast,
            "num_warps": config.warps,
            "maxnreg": hopper.REGISTERS,
        }
        if self.by_tiles:
            return {
                **arguments,
                "row_blocks": hopper.blocks_of(x.z, BOX, BOX),
                "column_blocks": hopper.blocks_of(reordered, config.columns, BOX),
                "rows": x.padded_rows,
                "columns": y.padded_rows,
                "BLOCKS": config.rows // BOX,
            }
        return {
            **arguments,
            "stay_blocks": hopper.blocks_of(reordered, TILE, config.step),
            "row_blocks": hopper.blocks_of(x.z, hopper.TILE_ROWS, config.step),
            "STEP": config.step,
        }

    def multiply_arguments(
        self, g: Tensor, z: Tensor, out: Tensor, i: int, j: int, table: Table
    ) -> dict[str, Any]:
        """The arguments of the products of the square at (i, j) with the rows z, by name."""
        config = self.multiply
        return {
            "g_blocks": hopper.blocks_of(g, BOX, BOX),
            "z_blocks": hopper.blocks_of(z, BOX, config.columns),
            "out": out,
            "starts": table.starts,
            "table": table.segments,
            "first_row": i,
            "first_column": j,
            "pitch": self.boxes.pitch,
            "out_rows": out.shape[-2],
            # The first square of a row or of a column of squares writes its products. Of a
            # symmetric S, the products of the columns j are those of the rows j.
            "rows_add": int(j > 0),
            "columns_add": int(i > 0),
            "WIDTH": self.x.padded_features,
            "BLOCKS": config.rows // BOX,
            "STAGES": config.stages,
            "num_warps": config.warps,
            "maxnreg": hopper.REGISTERS,
        }

    def compiles(self) -> bool:
        """Whether both kernels compile."""
        z = self.x.z
        key = (z.dtype, z.shape[1], z.device, self.self_contrast)
        g = z.new_empty(BOX, BOX)
        out = z.new_empty(1, BOX, dtype=torch.float32)
        table = next(iter(self.tables.values()))
        fill = self.fill_arguments(g, z, 0, 0, table)
        multiply = self.multiply_arguments(g, z, out, 0, 0, table)
        return all(
            hopper.compiles(
                (config, *key), config.kernel, partial(_compile, config.kernel, arguments)
            )
            for config, arguments in ((self.fill, fill), (self.multiply, multiply))
        )

    def launch(self) -> tuple[Tensor, Tensor]:
        """G Y and G^T X, each in two parts."""
        x, y = self.x, self.y
        nothing = x.z.new_empty(0, dtype=torch.float32)
        by_x = _two_parts(x) if self.of_x else nothing
        by_y = _two_parts(y) if self.of_y and not self.self_contrast else nothing
        reordered = y.z.new_empty(y.z.shape)
        run_kernel(
            reorder_kernel, y.padded_rows // REORDERED_ROWS,
            z=y.z, out=reordered, features=y.padded_features, COLUMNS=REORDERED_FEATURES,
            num_warps=4,
        )  # fmt: skip
        g = x.z.new_empty(self.boxes.total * BOX, BOX)
        fill, multiply = (hopper.kernel_of(c.kernel) for c in (self.fill, self.multiply))
        for i, j, square in self.squares:
            table = self.tables[square, None]
            run_kernel(fill, table.programs, **self.fill_arguments(g, reordered, i, j, table))
            for of in self.results:
                table = self.tables[square, of]
                z, out = (y.z, by_x) if of[0] else (x.z, by_y)
                run_kernel(
                    multiply, table.programs, **self.multiply_arguments(g, z, out, i, j, table)
                )
        return by_x, by_x if self.self_contrast else by_y


def _by_squares(gradients: Gradients) -> tuple[Tensor, Tensor] | None:
    x = gradients.x
    multiply = _entry("hopper_products", x)
    fill = _entry("hopper_strips", x) or _entry("hopper_tiles", x)
    if fill is None or multiply is None or x.padded_features % FEATURES_OF_JOB != 0:
        return None
    found = Squares(gradients, fill, multiply)
    return found.launch() if found.make_tables() and found.compiles() else None
