"""Which tiles each program of a Hopper kernel takes, and in which order.

A strip is one column block or, for ``wide_kernel``, a pair of them, against all row blocks that it
needs. It is cut into segments, and each program takes segments until its list ends: there is one
program for each multiprocessor, and it stays until the end.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal, NamedTuple

Shape = Literal["wide", "pairs"]
TILES_OF_BLOCK = 2  # tiles of 64 rows in a block
SLOTS_OF_SEGMENT = {"wide": 4, "pairs": 8}  # warps that add the columns of one block
# From this many row blocks on, the operands no longer fit the L2 cache. Programs that run at one
# time then take runs of the same rows. Below, equal shares leave the fewest programs idle.
RUNS_FROM = 256
RUN = 64  # row blocks of a run


class Segment(NamedTuple):
    """Consecutive row blocks of a strip, as the kernels read it.

    Attributes:
        column: First column block of the strip, counted from the first one of the panel.
        number: How many segments of the strip come before it.
        row: First tile of 64 rows.
        tiles_0: Tiles that the first group takes.
        tiles_1: Tiles that the second group takes.
    """

    column: int
    number: int
    row: int
    tiles_0: int
    tiles_1: int


@dataclass(frozen=True)
class Schedule:
    """The work of all programs.

    Attributes:
        programs: The segments of each program, in order.
        slots: Slots of column sums that each column block of the panel gets.
    """

    programs: list[list[Segment]]
    slots: list[int]

    @property
    def starts(self) -> list[int]:
        """Where each program's segments begin in ``table``, and where the last ones end."""
        starts = [0]
        for segments in self.programs:
            starts.append(starts[-1] + len(segments))
        return starts

    @property
    def table(self) -> list[int]:
        """The numbers of all segments, one program after the other."""
        return [number for segments in self.programs for one in segments for number in one]


def make(shape: Shape, heights: list[int], programs: int) -> Schedule:
    """The schedule of a panel.

    Args:
        shape: The kernel.
        heights: Row blocks that each column block of the panel needs, from the top.
        programs: How many programs share the work.
    """
    step = 2 if shape == "wide" else 1
    strips = [heights[c : c + step] for c in range(0, len(heights), step)]
    lengths = [max(strip) for strip in strips]
    cut = _cut_into_runs if max(lengths, default=0) >= RUNS_FROM else _cut_evenly
    lists = [
        [_segment(shape, step * strip, number, first, last, strips[strip]) for
         strip, number, first, last in pieces]
        for pieces in cut(lengths, programs)
    ]  # fmt: skip
    slots = [0] * len(heights)
    for segments in lists:
        for one in segments:
            for group in range(step):
                if (one.tiles_0, one.tiles_1)[group] > 0:
                    slots[one.column + group] += SLOTS_OF_SEGMENT[shape]
    return Schedule(lists, slots)


class _Piece(NamedTuple):
    strip: int
    number: int
    first: int
    last: int


def _segment(
    shape: Shape, column: int, number: int, first: int, last: int, heights: list[int]
) -> Segment:
    tiles = [TILES_OF_BLOCK * max(0, min(last, height) - first) for height in heights]
    if shape == "pairs":  # The groups share the tiles of one column block.
        tiles = [tiles[0] // 2, tiles[0] // 2]
    tiles += [0] * (2 - len(tiles))
    return Segment(column, number, TILES_OF_BLOCK * first, *tiles)


def _cut_evenly(lengths: list[int], programs: int) -> list[list[_Piece]]:
    """Equal shares of all strips in a row, one for each program."""
    total = sum(lengths)
    ends = [round(total * (p + 1) / programs) for p in range(programs)]
    lists: list[list[_Piece]] = [[] for _ in range(programs)]
    program = done = 0
    for strip, length in enumerate(lengths):
        first = number = 0
        while first < length:
            while ends[program] <= done:
                program += 1
            last = _without_rest(first + ends[program] - done, length)
            lists[program].append(_Piece(strip, number, first, last))
            done += last - first
            first, number = last, number + 1
    return lists


def _cut_into_runs(lengths: list[int], programs: int) -> list[list[_Piece]]:
    """Runs of RUN row blocks; the next one always goes to the program with the least work."""
    pieces = []
    for strip, length in enumerate(lengths):
        first = number = 0
        while first < length:
            last = _without_rest(first + RUN, length)
            pieces.append(_Piece(strip, number, first, last))
            first, number = last, number + 1
    # Whole runs of the same rows are neighbours. The short ones fill the gaps at the end.
    pieces.sort(
        key=lambda piece: (
            (0, piece.number, piece.strip)
            if piece.last - piece.first >= RUN
            else (1, piece.first - piece.last, piece.strip)
        )
    )
    lists: list[list[_Piece]] = [[] for _ in range(programs)]
    loads = [(0, program) for program in range(programs)]
    for piece in pieces:
        load, program = heapq.heappop(loads)
        lists[program].append(piece)
        # Loading the columns takes about as long as one row block.
        heapq.heappush(loads, (load + piece.last - piece.first + 1, program))
    return lists


def _without_rest(last: int, length: int) -> int:
    """The end of a segment: one row block alone is not left over."""
    return length if length - last <= 1 else last
