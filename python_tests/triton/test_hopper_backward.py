"""The Gluon kernels of the backward without a GPU: values and barriers, by their own source.

``gluon_emulator`` runs the source with parts and loads in random order.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import emulated_kernels
import gluon_emulator

from cjepa_kernels.triton import gradient_schedules as schedules
from cjepa_kernels.triton.configs import TILE
from cjepa_kernels.triton.gradient_schedules import BOX, Square, Work

TEMPERATURE = 0.1
# Rounding G to its dtype changes each number by at most half a unit in its last place: 2^-8 in
# bf16, 2^-11 in fp16. The bound is that share of the sum of the magnitudes, and a little more for
# fp32. The largest errors that were seen are 2^-8.4 and 2^-11.7.
BOUNDS = {torch.bfloat16: 2.0**-8 + 1e-5, torch.float16: 2.0**-11 + 1e-5}
Modules = dict[str, ModuleType]


class Side(NamedTuple):
    """Rows and their weights, both padded with zeros to whole blocks."""

    rows: int
    z: Tensor
    weight: Tensor

    @property
    def blocks(self) -> int:
        return self.z.shape[0] // TILE


@cache
def side(rows: int, features: int, dtype: torch.dtype, seed: int) -> Side:
    """Normalised rows with pairs that are alike, and weights of any sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    x[1::2] = x[0 : rows - 1 : 2] + 0.7 * x[1::2]
    padded = -(-rows // TILE) * TILE
    z = torch.zeros(padded, features, dtype=dtype)
    z[:rows] = torch.nn.functional.normalize(x, dim=1).to(dtype)
    weight = torch.zeros(padded)
    weight[:rows] = torch.randn(rows, generator=generator).exp()
    weight[:rows] *= torch.randn(rows, generator=generator)
    if dtype == torch.float16:  # Such weights carry a factor, or G would have too few exponents.
        weight *= 64.0
    return Side(rows, z, weight)


def exact_g(x: Side, y: Side) -> Tensor:
    """G in fp64, without the padding."""
    s = x.z[: x.rows].double() @ y.z[: y.rows].double().T
    weights = x.weight[: x.rows].double()[:, None] + y.weight[: y.rows].double()[None, :]
    g = ((s - 1) / TEMPERATURE).exp() * weights
    if x is y:
        row = torch.arange(x.rows)
        g[row, row] = 0.0
        g[row, (row ^ 1).clamp(max=x.rows - 1)] = 0.0
    return g


def error(parts: Tensor, g: Tensor, z: Tensor) -> float:
    """The largest error of G Z beside the sum of the magnitudes; infinity if a number is none."""
    rows, columns = g.shape
    z = z[:columns].double()
    got = parts.sum(0)[:rows].double()
    share = (got - g @ z).abs() / (g.abs() @ z.abs())
    return float(share.nan_to_num(torch.inf).max())


def int32(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def table_of(work: Work) -> dict[str, Tensor]:
    return {"starts": int32(work.starts), "table": int32(work.table)}


def two_parts(like: Side) -> Tensor:
    """The result before a launch: the second part is cleared, the first is not."""
    out = torch.full((2, *like.z.shape), torch.nan)
    out[1] = 0.0
    return out


class Owned(NamedTuple):
    """A launch of owned rows."""

    rows: int
    columns: int | None  # None: against themselves
    features: int
    tile: int  # columns of a tile
    stages: int
    pipelined: bool
    programs: int
    dtype: torch.dtype = torch.bfloat16

    def error(self, modules: Modules, seed: int = 0) -> float:
        x = side(self.rows, self.features, self.dtype, 1)
        y = x if self.columns is None else side(self.columns, self.features, self.dtype, 2)
        out = two_parts(x)
        self.launch(modules, seed, x, y, out)
        return error(out, exact_g(x, y), y.z)

    def launch(self, modules: Modules, seed: int, x: Side, y: Side, out: Tensor) -> None:
        work = schedules.owned(x.blocks, y.blocks, self.programs, self_contrast=x is y)
        gluon_emulator.launch(
            modules["hopper_owned"].hopper_owned_kernel,
            self.programs,
            seed,
            own_blocks=gluon_emulator.descriptor(x.z, BOX, self.features),
            tile_blocks=gluon_emulator.descriptor(y.z, self.tile, self.features),
            row_weight=x.weight,
            column_weight=y.weight,
            out=out,
            **table_of(work),
            temperature=TEMPERATURE,
            out_rows=x.z.shape[0],
            WIDTH=self.features,
            COLUMNS=self.tile,
            STAGES=self.stages,
            SELF=x is y,
            PIPELINED=self.pipelined,
        )


class Squares(NamedTuple):
    """The launches of a backward by squares."""

    rows: int
    columns: int | None
    features: int
    kernel: str  # which one writes G: "strips" or "tiles"
    stages: int
    side: int  # blocks of the side of a square
    programs: int
    fill_boxes: int = 3  # rows of a tile of G, in boxes
    job_boxes: int = 3  # rows of a job of the products, in boxes
    step: int = 64
    dtype: torch.dtype = torch.bfloat16

    def error(self, modules: Modules, seed: int = 0) -> float:
        x = side(self.rows, self.features, self.dtype, 3)
        y = x if self.columns is None else side(self.columns, self.features, self.dtype, 4)
        height, width = min(self.side, x.blocks), min(self.side, y.blocks)
        boxes = schedules.boxes(height, width, by_tiles=self.kernel == "tiles")
        g = torch.empty(boxes.total * BOX, BOX, dtype=self.dtype)
        by_x, by_y = two_parts(x), two_parts(y)
        for i, j, square in schedules.squares(x.blocks, y.blocks, self.side, self_contrast=x is y):
            g.fill_(torch.nan)
            corner = {"first_row": i, "first_column": j, "pitch": boxes.pitch}
            self._fill(modules, seed, x, y, g, square, corner)
            results = [(True, True)] if x is y else [(True, False), (False, True)]
            for of_rows, of_columns in results:
                z, out = (y.z, by_x) if of_rows else (x.z, by_y)
                self._multiply(
                    modules, seed, g, z, out, square, corner, of_rows=of_rows, of_columns=of_columns
                )
        exact = exact_g(x, y)
        found = error(by_x, exact, y.z)
        return found if x is y else max(found, error(by_y, exact.T, x.z))

    def _fill(
        self,
        modules: Modules,
        seed: int,
        x: Side,
        y: Side,
        g: Tensor,
        square: Square,
        corner: dict[str, int],
    ) -> None:
        blocks = gluon_emulator.descriptor
        reordered = reorder(y.z)
        common: dict[str, Any] = {
            "row_weight": x.weight,
            "column_weight": y.weight,
            "g": g,
            "temperature": TEMPERATURE,
            **corner,
            "WIDTH": self.features,
            "STAGES": self.stages,
            "SELF": x is y,
        }
        kernel = getattr(modules["hopper_squares"], f"hopper_{self.kernel}_kernel")
        if self.kernel == "strips":
            work = schedules.strips(square, self.programs)
            common |= {
                "stay_blocks": blocks(reordered, TILE, self.step),
                "row_blocks": blocks(x.z, BOX, self.step),
                "STEP": self.step,
            }
        else:
            work = schedules.tiles(square, self.programs, self.fill_boxes)
            common |= {
                "row_blocks": blocks(x.z, BOX, BOX),
                "column_blocks": blocks(reordered, 4 * BOX, BOX),
                "rows": x.z.shape[0],
                "columns": y.z.shape[0],
                "BLOCKS": self.fill_boxes,
            }
        gluon_emulator.launch(kernel, self.programs, seed, **table_of(work), **common)

    def _multiply(
        self,
        modules: Modules,
        seed: int,
        g: Tensor,
        z: Tensor,
        out: Tensor,
        square: Square,
        corner: dict[str, int],
        *,
        of_rows: bool,
        of_columns: bool,
    ) -> None:
        work = schedules.products(
            square,
            self.programs,
            self.features,
            tile_boxes=self.job_boxes,
            pitch=corner["pitch"],
            of_rows=of_rows,
            of_columns=of_columns,
        )
        gluon_emulator.launch(
            modules["hopper_squares"].hopper_products_kernel,
            self.programs,
            seed,
            g_blocks=gluon_emulator.descriptor(g, BOX, BOX),
            z_blocks=gluon_emulator.descriptor(z, BOX, 4 * BOX),
            out=out,
            **table_of(work),
            **corner,
            out_rows=out.shape[1],
            rows_add=int(corner["first_column"] > 0),
            columns_add=int(corner["first_row"] > 0),
            WIDTH=self.features,
            BLOCKS=self.job_boxes,
            STAGES=self.stages,
        )


def reorder(z: Tensor) -> Tensor:
    """The rows as ``reorder_kernel`` writes them."""
    rows, features = z.shape
    of_threads = z.view(rows // 32, 4, 4, 2, features).transpose(1, 2)
    return of_threads.reshape(rows, features).contiguous()


Case = Owned | Squares
CASES: dict[str, Case] = {
    "owned": Owned(300, None, 64, 128, 5, True, 2),
    "owned_64_columns": Owned(515, None, 64, 64, 4, True, 3),
    "owned_one_after_the_other": Owned(390, None, 64, 128, 2, False, 3),
    "owned_one_after_the_other_64_columns": Owned(256, None, 128, 64, 3, False, 1),
    "owned_rectangle": Owned(200, 641, 64, 128, 3, True, 3, torch.float16),
    "owned_rectangle_one_after_the_other": Owned(385, 100, 64, 128, 2, False, 2),
    "strips": Squares(300, None, 256, "strips", 3, 3, 3),
    "strips_several_squares": Squares(600, None, 256, "strips", 5, 2, 4, step=128),
    "strips_one_step": Squares(384, None, 256, "strips", 3, 2, 3, step=256, job_boxes=2),
    "strips_rectangle": Squares(130, 515, 256, "strips", 3, 2, 2, dtype=torch.float16),
    "tiles": Squares(500, None, 256, "tiles", 3, 4, 3),
    "tiles_several_squares": Squares(640, None, 512, "tiles", 4, 3, 4, job_boxes=2),
    "tiles_of_128_rows": Squares(400, None, 256, "tiles", 3, 2, 3, fill_boxes=2),
    "tiles_second_parts": Squares(900, None, 256, "tiles", 4, 8, 4),
    "tiles_rectangle": Squares(270, 390, 256, "tiles", 3, 2, 3, dtype=torch.float16),
}


@pytest.fixture(scope="module")
def modules() -> Modules:
    return emulated_kernels.load_kernels()


def bound(case: Case) -> float:
    return BOUNDS[case.dtype]


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_reference(modules: Modules, case: str) -> None:
    assert CASES[case].error(modules) < bound(CASES[case])


# These are small, because they are run many times.
INTERLEAVED: dict[str, Case] = {
    "owned": Owned(256, None, 64, 128, 3, True, 1),
    "owned_64_columns": Owned(256, None, 64, 64, 3, True, 1),
    "owned_one_after_the_other": Owned(384, None, 64, 128, 2, False, 2),
    "strips": Squares(256, None, 256, "strips", 3, 2, 2),
    "tiles": Squares(256, None, 256, "tiles", 3, 2, 2),
}


@pytest.mark.parametrize("case", INTERLEAVED)
def test_any_order_of_the_parts_gives_the_same(modules: Modules, case: str) -> None:
    for seed in range(1, 9):
        assert INTERLEAVED[case].error(modules, seed) < bound(INTERLEAVED[case]), f"seed {seed}"


WAIT_EMPTY = "mbarrier.wait(empty.index(slot), parity ^ 1)"
FAULTS: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "rows_are_replaced_too_early": (
        "owned",
        "hopper_owned",
        [("mbarrier.wait(own_empty.index(0), turn ^ 1)", "pass")],
    ),
    "rows_are_read_too_early": (
        "owned",
        "hopper_owned",
        [("mbarrier.wait(own_full.index(0), turn)", "pass")],
    ),
    "a_full_ring_is_filled_again": ("owned", "hopper_owned", [(WAIT_EMPTY, "pass")]),
    "a_tile_is_given_back_too_early": (
        "owned",
        "hopper_owned",
        [("    acc, g, next_g = warpgroup_mma_wait(0, deps=[acc, g, next_g])\n"
          "    mbarrier.arrive(empty.index(before), count=1)\n",
          "    mbarrier.arrive(empty.index(before), count=1)\n"
          "    acc, g, next_g = warpgroup_mma_wait(0, deps=[acc, g, next_g])\n")],
    ),
    "a_row_meets_itself": (
        "owned_64_columns",
        "hopper_owned",
        [("gl.where(own, float(\"-inf\"), s)", "s")],
    ),
    "a_row_meets_its_positive": (
        "owned_one_after_the_other",
        "hopper_owned",
        [("(column ^ 1)[None, :]", "column[None, :]")],
    ),
    "the_wrong_tile_is_masked": (
        "owned",
        "hopper_owned",
        [("        tile = gl.load(segment + 4) * TILES", "        tile = first_tile")],
    ),
    "both_parts_go_to_one_buffer": (
        "owned_one_after_the_other",
        "hopper_owned",
        [("gl.load(segment + 3) * out_rows + ", "")],
    ),
    "weights_of_the_wrong_side": (
        "owned_one_after_the_other",
        "hopper_owned",
        [("rows = (row, gl.load(row_weights + row))", "rows = (row, gl.load(row_weights + lane))")],
    ),
    "columns_are_read_too_early": (
        "strips",
        "hopper_squares",
        [("mbarrier.wait(stay_full.index(step), turn, pred=t == 0)", "pass")],
    ),
    "columns_are_replaced_too_early": (
        "strips",
        "hopper_squares",
        [("mbarrier.wait(stay_empty.index(0), turn ^ 1)", "pass")],
    ),
    "no_turns": (
        "strips",
        "hopper_squares",
        [("            mbarrier.wait(turns.index(GROUP), my_turn)\n            my_turn ^= 1\n", ""),
         ("mbarrier.arrive(turns.index(1 - GROUP), count=1)", "pass")],
    ),
    "columns_in_another_order": (
        "strips",
        "hopper_squares",
        [("gl.permute(s, (0, 1, 3, 2, 4))", "s")],
    ),
    "boxes_of_the_next_line": (
        "strips",
        "hopper_squares",
        [("            to += (BLOCK // ROWS) * BOX_NUMBERS * pitch", "            pass")],
    ),
    "a_step_is_given_back_too_early": (
        "tiles",
        "hopper_squares",
        [("one, half = warpgroup_mma_wait(2, deps=[one, half])", "pass")],
    ),
    "the_third_rows_take_the_wrong_columns": (
        "tiles",
        "hopper_squares",
        [("y.slice(GROUP * (WIDE // 2), WIDE // 2)", "y.slice(0, WIDE // 2)")],
    ),
    "nothing_is_transposed": (
        "tiles",
        "hopper_squares",
        [("            g = g.permute((1, 0))\n        one", "            pass\n        one")],
    ),
    "rows_of_another_square_are_written": (
        "tiles",
        "hopper_squares",
        [("row < gl.load(job + 2)", "row >= 0")],
    ),
    "sums_are_replaced": (
        "two_squares",
        "hopper_squares",
        [("mask=valid & adds_here", "mask=valid & (adds_here == 2)")],
    ),
    "the_second_part_replaces_the_first": (
        "tiles_second_parts",
        "hopper_squares",
        [("gl.load(job + 10).to(gl.int64) * out_rows + ", "")],
    ),
}  # fmt: skip
FAULTY = {
    **CASES,
    "owned": Owned(640, None, 64, 128, 3, True, 2),
    # The ring holds more steps than a tile has, so that only a barrier protects the columns.
    "strips": Squares(384, None, 256, "strips", 6, 3, 1),
    "tiles": INTERLEAVED["tiles"],
    "owned_64_columns": INTERLEAVED["owned_64_columns"],
    "owned_one_after_the_other": INTERLEAVED["owned_one_after_the_other"],
    "two_squares": Squares(384, None, 256, "strips", 3, 2, 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    name, file, replacements = FAULTS[fault]
    broken, case = emulated_kernels.load_kernels(**{file: replacements}), FAULTY[name]
    for seed in range(20):
        try:
            if not case.error(broken, seed) < bound(case):
                return
        except gluon_emulator.EmulationError:
            return
    pytest.fail("no order of the parts showed the fault")


def opposite_rows() -> tuple[Side, Side]:
    """Rows that point away from all columns: their weights are large, as those of a forward are."""
    dtype = torch.float16
    z = torch.rand(100, 64, generator=torch.Generator().manual_seed(0))
    columns = torch.zeros(TILE, 64, dtype=dtype)
    columns[:100] = torch.nn.functional.normalize(z, dim=1).to(dtype)
    mean = columns[:100].float().mean(0)
    rows = (-mean / mean.norm()).to(dtype).expand(TILE, 64).contiguous()
    s = rows.double() @ columns[:100].double().T
    weight = 2.0**13 / ((s - 1) / TEMPERATURE).exp().sum(1)
    return Side(TILE, rows, weight.float()), Side(100, columns, torch.zeros(TILE))


@pytest.mark.parametrize("sign", [1, -1], ids=["", "negative"])
@pytest.mark.parametrize("kept_finite", [True, False])
def test_padding_adds_nothing_where_its_numbers_exceed_fp16(kept_finite: bool, sign: int) -> None:
    """G of the zeros behind the last column exceeds fp16 there, and infinity times 0 is NaN."""
    fault = [] if kept_finite else [("finite(g, TYPE).to(TYPE)", "g.to(TYPE)")]
    x, y = opposite_rows()
    x.weight.mul_(sign)
    y.weight.mul_(sign)
    out = two_parts(x)
    Owned(TILE, 100, 64, TILE, 3, True, 1, torch.float16).launch(
        emulated_kernels.load_kernels(hopper_owned=fault), 0, x, y, out
    )
    assert (error(out, exact_g(x, y), y.z) < BOUNDS[torch.float16]) == kept_finite
