"""The schedules of the Hopper backward: all work once, one writer for each number, equal shares."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("triton")

from cjepa_kernels.triton import gradient_schedules as schedules
from cjepa_kernels.triton.gradient_schedules import Job, Square, Work

SQUARES = {
    "one_block": Square(1, 1, True),
    "diagonal": Square(7, 7, True),
    "even_diagonal": Square(12, 12, True),
    "square": Square(6, 6, False),
    "wide": Square(3, 11, False),
    "high": Square(10, 2, False),
}
each_square = pytest.mark.parametrize("square", SQUARES.values(), ids=SQUARES)
each_number = pytest.mark.parametrize("programs", [1, 5, 132])


def lines(work: Work) -> list[tuple[int, ...]]:
    """All lines, as the kernels find them by ``starts``."""
    numbers, starts = work.table, work.starts
    width = len(numbers) // starts[-1]
    return [tuple(numbers[width * k : width * (k + 1)]) for k in range(starts[-1])]


@each_number
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 9), (40, 3), (200, 200)])
@pytest.mark.parametrize("self_contrast", [False, True])
def test_owned_rows_meet_every_column_once(
    rows: int, columns: int, programs: int, self_contrast: bool
) -> None:
    work = schedules.owned(rows, columns, programs, self_contrast=self_contrast)
    assert len(work.programs) == programs
    met = Counter(
        (row, column)
        for row, first, count, _, _ in lines(work)
        for column in range(first, first + count)
    )
    assert met == Counter({(row, column): 1 for row in range(rows) for column in range(columns)})
    parts = Counter((row, part) for row, _, _, part, _ in lines(work))
    assert set(parts.values()) == {1}, "one writer"
    assert {part for _, part in parts} <= {0, 1}
    for row, first, count, _, begin in lines(work):
        is_among_them = self_contrast and first <= row < first + count
        assert begin == (row if is_among_them else first)


@pytest.mark.parametrize("blocks", [128, 512, 1024])
def test_programs_of_owned_rows_have_equal_work(blocks: int) -> None:
    assert schedules.owned(blocks, blocks, 132, self_contrast=True).busy > 0.97


def test_many_owned_rows_have_one_part() -> None:
    rows = schedules.WHOLE_BLOCKS_FROM * 5
    work = schedules.owned(rows, 3, 5, self_contrast=False)
    assert not schedules.has_second_parts(rows, 5)
    assert {line[3] for line in lines(work)} == {0}
    assert {len(of_program) for of_program in work.programs} == {schedules.WHOLE_BLOCKS_FROM}
    assert schedules.has_second_parts(rows - 1, 5)


def needed(square: Square) -> set[tuple[int, int]]:
    """The blocks of G that the products read."""
    return {
        (row, column)
        for row in range(square.rows)
        for column in range(square.columns)
        if not square.diagonal or row <= column
    }


@each_number
@each_square
def test_strips_fill_every_block_once(square: Square, programs: int) -> None:
    filled = Counter(
        (row, column)
        for column, first, count in lines(schedules.strips(square, programs))
        for row in range(first, first + count)
    )
    assert filled == Counter(needed(square))


@each_number
@each_square
@pytest.mark.parametrize("tile_boxes", [2, 3])
def test_tiles_fill_every_box_that_is_needed_once(
    square: Square, programs: int, tile_boxes: int
) -> None:
    work = schedules.tiles(square, programs, tile_boxes)
    boxes = schedules.boxes(square.rows, square.columns, by_tiles=True)
    filled = Counter(
        (row + i, column + j)
        for row, column in lines(work)
        for i in range(tile_boxes)
        for j in range(4)
    )
    assert set(filled.values()) == {1}
    assert all(row < boxes.lines and column < boxes.pitch for row, column in filled)
    for row, column in needed(square):
        assert {(2 * row + i, 2 * column + j) for i in (0, 1) for j in (0, 1)} <= filled.keys()


def multiplied(job: Job, pitch: int, tile_boxes: int) -> Counter[tuple[Any, ...]]:
    """For each row of a job: the boxes of G that it takes, with the rows that they meet."""
    found: Counter[tuple[Any, ...]] = Counter()
    for i in range(tile_boxes):
        row = job.row + i
        if row >= job.end:
            continue
        for step in range(job.transposed_steps):
            line, column = divmod(job.transposed_box + step * pitch + i, pitch)
            found[row, job.transposed_row + step, (line, column), True] += 1
        for step in range(job.steps):
            line, column = divmod(job.box + step + i * pitch, pitch)
            found[row, job.other_row + step, (line, column), False] += 1
    return found


@each_number
@each_square
@pytest.mark.parametrize(("features", "tile_boxes"), [(256, 3), (512, 2), (768, 3)])
def test_products_take_every_box_of_g_once(
    square: Square, programs: int, features: int, tile_boxes: int
) -> None:
    boxes = schedules.boxes(square.rows, square.columns, by_tiles=False)
    work = schedules.products(
        square,
        programs,
        features,
        tile_boxes=tile_boxes,
        pitch=boxes.pitch,
        of_rows=True,
        of_columns=True,
    )
    jobs = [Job(*line) for line in lines(work)]
    writers = Counter((job.of_columns, job.row, job.feature, job.part) for job in jobs)
    assert set(writers.values()) == {1}, "one writer in a launch"
    assert {job.part for job in jobs} <= {0, 1}
    for feature in range(0, features // schedules.BOX, 4):
        taken: Counter[tuple[Any, ...]] = Counter()
        for job in jobs:
            if job.feature == feature:
                for key, count in multiplied(job, boxes.pitch, tile_boxes).items():
                    taken[(job.of_columns, *key)] += count
        expected: Counter[tuple[Any, ...]] = Counter()
        height, width = 2 * square.rows, 2 * square.columns
        for row in range(height):
            for column in range(width):
                below = square.diagonal and row // 2 > column // 2
                place = (column, row) if below else (row, column)
                expected[0, row, column, place, below] = 1
                if not square.diagonal:
                    expected[1, column, row, (row, column), True] = 1
        # In the blocks on the diagonal both G and G^T are written.
        assert {key[:3] for key in taken} == {key[:3] for key in expected}
        assert set(taken.values()) == {1}
        assert len(taken) == len(expected)
        for of_columns, row, other, (line, column), transposed in taken:
            assert (line, column) == ((other, row) if transposed else (row, other)), of_columns
            assert not square.diagonal or line // 2 <= column // 2, "a box that is not written"


@pytest.mark.parametrize("of_columns", [False, True])
def test_one_side_alone(of_columns: bool) -> None:
    work = schedules.products(
        Square(4, 6, False),
        3,
        256,
        tile_boxes=3,
        pitch=12,
        of_rows=not of_columns,
        of_columns=of_columns,
    )
    assert {line[0] for line in lines(work)} == {int(of_columns)}


@pytest.mark.parametrize("features", [512, 768])
def test_programs_of_products_have_equal_work(features: int) -> None:
    side = schedules.square_side(
        512,
        512,
        132,
        features,
        tile_boxes=3,
        by_tiles=False,
        self_contrast=True,
        most_boxes=2**15,
    )
    square = Square(side, side, False)
    work = schedules.products(
        square, 132, features, tile_boxes=3, pitch=2 * side, of_rows=True, of_columns=True
    )
    assert work.busy > 0.9


def test_few_rows_against_many_columns_leave_programs_idle() -> None:
    """A job has two parts at most. The Triton kernels serve such a rectangle."""
    assert schedules.owned(8, 4096, 132, self_contrast=False).busy < 0.3
    assert schedules.owned(128, 128, 132, self_contrast=True).busy > 0.9


@pytest.mark.parametrize("self_contrast", [False, True])
def test_squares_cover_every_block_once(self_contrast: bool) -> None:
    rows, columns = (11, 11) if self_contrast else (11, 5)
    covered = Counter(
        (i + row, j + column)
        for i, j, square in schedules.squares(rows, columns, 4, self_contrast=self_contrast)
        for row in range(square.rows)
        for column in range(square.columns)
    )
    assert set(covered.values()) == {1}
    assert all((r, c) in covered for r in range(rows) for c in range(r * self_contrast, columns))


@pytest.mark.parametrize(("rows", "columns"), [(90, 1000), (513, 513), (8192, 8192)])
def test_no_square_is_thin(rows: int, columns: int) -> None:
    found = schedules.squares(rows, columns, 86, self_contrast=rows == columns)
    for name in ("rows", "columns"):
        sides = {getattr(square, name) for _, _, square in found}
        assert max(sides) <= 86
        assert max(sides) - min(sides) <= 1
