"""The schedules of the Hopper kernels: every tile once, in order, and equal work for programs."""

from __future__ import annotations

import typing
from collections import Counter

import pytest

pytest.importorskip("triton")

from cjepa_kernels.triton import schedules
from cjepa_kernels.triton.schedules import Schedule, Shape

SHAPES: tuple[Shape, ...] = typing.get_args(Shape)
HEIGHTS = {
    "one_block": [0],
    "two_blocks": [0, 1],
    "odd": list(range(13)),
    "rectangle": [7] * 5,
    "second_panel": list(range(40, 57)),
    "no_whole_rows": [0, 0, 0],
    "no_whole_columns": [],
    "runs": list(range(290)),
    "wide_rectangle": [300] * 7,
}


def groups_of(one: schedules.Segment, shape: Shape) -> list[tuple[int, list[int]]]:
    """The column block of each group, and its tiles of rows in order."""
    if shape == "wide":
        return [
            (one.column + group, list(range(one.row, one.row + (one.tiles_0, one.tiles_1)[group])))
            for group in range(2)
        ]
    return [
        (one.column, [one.row + group + 2 * t for t in range((one.tiles_0, one.tiles_1)[group])])
        for group in range(2)
    ]


def work(schedule: Schedule, shape: Shape) -> list[int]:
    """Row blocks that each program takes: the longer of its groups' work."""
    divisor = 2 if shape == "wide" else 1
    return [
        sum(max(one.tiles_0, one.tiles_1) // divisor for one in segments)
        for segments in schedule.programs
    ]


@pytest.mark.parametrize("programs", [1, 5, 132])
@pytest.mark.parametrize("case", HEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tile_is_taken_once(shape: Shape, case: str, programs: int) -> None:
    heights = HEIGHTS[case]
    schedule = schedules.make(shape, heights, programs)
    taken = Counter(
        (row, column)
        for segments in schedule.programs
        for one in segments
        for column, rows in groups_of(one, shape)
        for row in rows
    )
    expected = {(row, c) for c, height in enumerate(heights) for row in range(2 * height)}
    assert taken.keys() == expected
    assert set(taken.values()) <= {1}
    assert len(schedule.programs) == programs


@pytest.mark.parametrize("case", HEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_slots_are_numbered_from_zero(shape: Shape, case: str) -> None:
    """The reduction reads the first ``slots`` slots of a column block, and all are written."""
    schedule = schedules.make(shape, HEIGHTS[case], 7)
    per_segment = schedules.SLOTS_OF_SEGMENT[shape]
    numbers: dict[int, list[int]] = {c: [] for c in range(len(HEIGHTS[case]))}
    for segments in schedule.programs:
        for one in segments:
            for column in {column for column, rows in groups_of(one, shape) if rows}:
                numbers[column].append(one.number)
    for column, found in numbers.items():
        assert sorted(found) == list(range(len(found)))
        assert schedule.slots[column] == per_segment * len(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_group_takes_an_even_number_of_tiles_of_a_wide_segment(shape: Shape) -> None:
    """``wide_kernel`` takes two tiles in each turn of its loop, ``pairs_kernel`` shares blocks."""
    for case, heights in HEIGHTS.items():
        for segments in schedules.make(shape, heights, 3).programs:
            for one in segments:
                tiles = (one.tiles_0, one.tiles_1)
                assert max(tiles) > 0, case
                assert all(n % 2 == 0 for n in tiles) if shape == "wide" else tiles[0] == tiles[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", [128, 512])
def test_programs_have_equal_work(shape: Shape, blocks: int) -> None:
    loads = work(schedules.make(shape, list(range(blocks)), 132), shape)
    mean = sum(loads) / len(loads)
    assert max(loads) <= 1.05 * mean + 1


def test_the_table_and_its_starts() -> None:
    schedule = schedules.make("wide", [0, 1, 2, 3], 2)
    assert schedule.programs == [[(0, 0, 0, 0, 2), (2, 0, 0, 2, 2)], [(2, 1, 2, 2, 4)]]
    assert schedule.starts == [0, 2, 3]
    assert schedule.table == [0, 0, 0, 0, 2, 2, 0, 0, 2, 2, 2, 1, 2, 2, 4]
    assert schedule.slots == [0, 4, 8, 8]
