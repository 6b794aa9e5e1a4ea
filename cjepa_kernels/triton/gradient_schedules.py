"""Which part of the backward each program of a Hopper kernel takes, and in which order.

There is one program for each multiprocessor, and it stays until the end of a launch. The work is a
row of jobs, such as the columns of one block of rows. It is cut into equal shares, so a job may be
cut too, but into two parts at most: each of them has a buffer of its own for its sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

BOX = 64  # rows and columns of a box of G, as in kernels/hopper_squares.py
BOXES_OF_BLOCK = 2
FEATURES_OF_JOB = 256
# What loading and storing the accumulators of a job takes, in steps of 64 of its sum.
STEPS_OF_JOB = 5
SHORTEST_PART = 6  # steps
COLUMN_BLOCKS_OF_JOB = 1  # as STEPS_OF_JOB, for owned rows and in blocks of columns
# From so many blocks of rows for each program on, owned rows are shared as whole blocks. Then there
# is one buffer, and at most 3 % of the time is lost.
WHOLE_BLOCKS_FROM = 32
SHARES_TRIED = 30
LAUNCH_STEPS = 8  # what the two launches of a square cost beside their work, in steps of a job


class Part(NamedTuple):
    """A part of a job: its steps from ``first`` to ``last``; ``number`` is 0 or 1."""

    job: int
    first: int
    last: int
    number: int


@dataclass(frozen=True)
class Work:
    """The work of all programs of a launch.

    Attributes:
        programs: For each program the lines of its table, in order.
        load: The largest load of a program, in steps.
        total: The sum of all loads, without what the cut of a job into parts adds.
    """

    programs: list[list[tuple[int, ...]]]
    load: int
    total: int

    @property
    def starts(self) -> list[int]:
        """Where each program's lines begin in ``table``, and where the last ones end."""
        starts = [0]
        for lines in self.programs:
            starts.append(starts[-1] + len(lines))
        return starts

    @property
    def table(self) -> list[int]:
        """The numbers of all lines, one program after the other."""
        return [number for lines in self.programs for line in lines for number in line]

    @property
    def busy(self) -> float:
        """The share of the time in which a program has work, on average."""
        return self.total / (self.load * len(self.programs)) if self.load else 1.0


class Square(NamedTuple):
    """The shape of a square of blocks of S, whose G the workspace holds at one time.

    Attributes:
        rows: Its number of row blocks.
        columns: Its number of column blocks.
        diagonal: Whether it lies on the diagonal of a symmetric S.
    """

    rows: int
    columns: int
    diagonal: bool


class Job(NamedTuple):
    """Rows of dX or dY that a square serves, for 256 features; in boxes, from the square's corner.

    Attributes:
        of_columns: 0 for dX, 1 for dY.
        row: First row of the result.
        end: The first row that does not belong to the square.
        feature: First feature.
        transposed_box: The first box of G^T.
        transposed_steps: Number of boxes of G^T.
        transposed_row: The row of the other operand that belongs to the first of them.
        box: The first box of G.
        steps: Number of boxes of G.
        other_row: The row of the other operand that belongs to the first of them.
        part: 0 or 1, the buffer of the result.
    """

    of_columns: int
    row: int
    end: int
    feature: int
    transposed_box: int
    transposed_steps: int
    transposed_row: int
    box: int
    steps: int
    other_row: int
    part: int


def share(lengths: Sequence[int], programs: int, extra: int, shortest: int) -> list[list[Part]]:
    """Cut jobs of some steps into nearly equal shares, in order.

    Args:
        lengths: Steps of each job.
        programs: How many programs share them.
        extra: What a part costs beside its steps, in steps.
        shortest: A part is not shorter, unless its job is.
    """
    least = -(-(sum(lengths) + extra * len(lengths)) // programs)
    tried = [least + least * k // 50 for k in range(SHARES_TRIED)]
    shares = [
        _share_up_to(largest, lengths, programs, extra, shortest)
        for largest in dict.fromkeys((*tried, max(lengths, default=0) + extra))
    ]
    return min(shares, key=lambda parts: largest_load(parts, extra))


def largest_load(shares: Sequence[Sequence[Part]], extra: int) -> int:
    """The largest load of a program."""
    return max((sum(x.last - x.first + extra for x in parts) for parts in shares), default=0)


def _share_up_to(
    largest: int, lengths: Sequence[int], programs: int, extra: int, shortest: int
) -> list[list[Part]]:
    """Fill one program after the other up to a load; what is left goes to the last one."""
    shares: list[list[Part]] = [[] for _ in range(programs)]
    program = load = 0
    for job, length in enumerate(lengths):
        first = number = 0
        while first < length:
            left, room = length - first, largest - load - extra
            is_last = program == programs - 1
            if room < min(shortest, left) and not is_last:
                program, load = program + 1, 0
                continue
            # The second part takes the whole rest, even if that is more than there is room for.
            steps = left if number == 1 or is_last else min(left, room)
            if left - steps < shortest:
                steps = left
            shares[program].append(Part(job, first, first + steps, number))
            load += steps + extra
            first, number = first + steps, number + 1
    return shares


def owned(row_blocks: int, column_blocks: int, programs: int, *, self_contrast: bool) -> Work:
    """Lines of owned rows: row block, first column block, column blocks, part, block to begin with.

    With ``self_contrast`` a run of columns begins with the block of the rows, if it is among them.
    """
    lengths, extra = [column_blocks] * row_blocks, COLUMN_BLOCKS_OF_JOB
    if row_blocks >= WHOLE_BLOCKS_FROM * programs:
        shares = [
            [
                Part(block, 0, column_blocks, 0)
                for block in range(row_blocks * p // programs, row_blocks * (p + 1) // programs)
            ]
            for p in range(programs)
        ]
    else:
        shares = share(lengths, programs, extra, 1)

    def line(part: Part) -> tuple[int, ...]:
        begin = part.job if self_contrast and part.first <= part.job < part.last else part.first
        return part.job, part.first, part.last - part.first, part.number, begin

    return Work(
        [[line(part) for part in parts] for parts in shares],
        largest_load(shares, extra),
        sum(lengths) + extra * len(lengths),
    )


def has_second_parts(row_blocks: int, programs: int) -> bool:
    """Whether owned rows may be cut into parts, which needs a second buffer."""
    return row_blocks < WHOLE_BLOCKS_FROM * programs


def strips(square: Square, programs: int) -> Work:
    """Lines of G by strips: column block, first row block and row blocks; equal shares in a row."""
    heights = [c + 1 if square.diagonal else square.rows for c in range(square.columns)]
    total = sum(heights)
    ends = [round(total * (p + 1) / programs) for p in range(programs)]
    lines: list[list[tuple[int, ...]]] = [[] for _ in range(programs)]
    program = done = 0
    for column, height in enumerate(heights):
        first = 0
        while first < height:
            while ends[program] <= done:
                program += 1
            blocks = min(height - first, ends[program] - done)
            lines[program].append((column, first, blocks))
            first, done = first + blocks, done + blocks
    load = max(sum(line[2] for line in of_program) for of_program in lines)
    return Work(lines, load, total)


def tiles(square: Square, programs: int, tile_boxes: int) -> Work:
    """Lines of G by tiles: first row and first column in boxes; dealt out in turn.

    Args:
        square: The square.
        programs: Number of programs.
        tile_boxes: Rows of a tile, in boxes. Its columns are 4 boxes.
    """
    height, width = BOXES_OF_BLOCK * square.rows, BOXES_OF_BLOCK * square.columns
    lines: list[list[tuple[int, ...]]] = [[] for _ in range(programs)]
    found = [
        (row, column)
        for column in range(0, width, 4)
        for row in range(0, height, tile_boxes)
        # A tile wholly below the diagonal is not needed.
        if not square.diagonal or row // 2 <= min(column + 3, width - 1) // 2
    ]
    for number, line in enumerate(found):
        lines[number % programs].append(line)
    return Work(lines, -(-len(found) // programs), len(found))


def products(
    square: Square,
    programs: int,
    features: int,
    *,
    tile_boxes: int,
    pitch: int,
    of_rows: bool,
    of_columns: bool,
) -> Work:
    """The jobs of the products of a square.

    The jobs of other features of the same rows run at the same time on other programs, which then
    share G in the L2 cache.

    Args:
        square: The square.
        programs: Number of programs.
        features: Features of the operands, a multiple of 256.
        tile_boxes: Rows of a job, in boxes.
        pitch: Boxes of a line of the workspace.
        of_rows: Whether dX is wanted.
        of_columns: Whether dY is wanted. On the diagonal of a symmetric S both are one.
    """
    jobs = _jobs(square, tile_boxes, pitch) if of_rows else []
    if of_columns and not square.diagonal:
        jobs += _transposed_jobs(square, tile_boxes)
    groups = features // FEATURES_OF_JOB
    each = max(1, programs // groups)
    lengths = [job.transposed_steps + job.steps for job in jobs]
    shares = share(lengths, each, STEPS_OF_JOB, SHORTEST_PART)
    lines: list[list[tuple[int, ...]]] = [[] for _ in range(programs)]
    for group in range(groups):
        for number, parts in enumerate(shares):
            # With fewer programs than groups of features, a program takes several groups.
            lines[(group * each + number) % programs] += [
                _part_of(jobs[part.job], part, pitch, group * FEATURES_OF_JOB // BOX)
                for part in parts
            ]
    rounds = -(-groups * each // programs)
    total = groups * (sum(lengths) + STEPS_OF_JOB * len(jobs))
    return Work(lines, rounds * largest_load(shares, STEPS_OF_JOB), total)


def _jobs(square: Square, tile_boxes: int, pitch: int) -> list[Job]:
    height, width = BOXES_OF_BLOCK * square.rows, BOXES_OF_BLOCK * square.columns
    jobs = []
    for row in range(0, height, tile_boxes):
        # On the diagonal, the columns before the last block of these rows are in G^T.
        begin = min(row + tile_boxes - 1, height - 1) // 2 * 2 if square.diagonal else 0
        jobs.append(
            Job(
                of_columns=0,
                row=row,
                end=height,
                feature=0,
                transposed_box=row,
                transposed_steps=begin,
                transposed_row=0,
                box=row * pitch + begin,
                steps=width - begin,
                other_row=begin,
                part=0,
            )
        )
    return jobs


def _transposed_jobs(square: Square, tile_boxes: int) -> list[Job]:
    height, width = BOXES_OF_BLOCK * square.rows, BOXES_OF_BLOCK * square.columns
    return [
        Job(
            of_columns=1,
            row=column,
            end=width,
            feature=0,
            transposed_box=column,
            transposed_steps=height,
            transposed_row=0,
            box=0,
            steps=0,
            other_row=0,
            part=0,
        )
        for column in range(0, width, tile_boxes)
    ]


def _part_of(job: Job, part: Part, pitch: int, feature: int) -> Job:
    """The steps of a part; those of G^T come first."""
    transposed = [min(step, job.transposed_steps) for step in (part.first, part.last)]
    plain = [max(step - job.transposed_steps, 0) for step in (part.first, part.last)]
    return job._replace(
        feature=feature,
        transposed_box=job.transposed_box + transposed[0] * pitch,
        transposed_steps=transposed[1] - transposed[0],
        transposed_row=job.transposed_row + transposed[0],
        box=job.box + plain[0],
        steps=plain[1] - plain[0],
        other_row=job.other_row + plain[0],
        part=part.number,
    )


class Boxes(NamedTuple):
    """The workspace of a square: lines of boxes, and boxes of a line."""

    lines: int
    pitch: int

    @property
    def total(self) -> int:
        return self.lines * self.pitch


def boxes(rows: int, columns: int, *, by_tiles: bool) -> Boxes:
    """The boxes of a square of blocks. Tiles are written whole, so they may reach beyond it."""
    lines, pitch = BOXES_OF_BLOCK * rows, BOXES_OF_BLOCK * columns
    return Boxes(lines + 2, -(-pitch // 4) * 4) if by_tiles else Boxes(lines, pitch)


@lru_cache(maxsize=64)
def square_side(
    row_blocks: int,
    column_blocks: int,
    programs: int,
    features: int,
    *,
    tile_boxes: int,
    by_tiles: bool,
    self_contrast: bool,
    most_boxes: int,
) -> int:
    """Blocks of the side of a square: the one with the least estimate of the products' time.

    Args:
        row_blocks: Row blocks of S.
        column_blocks: Column blocks of S.
        programs: Number of programs.
        features: Features of the operands.
        tile_boxes: Rows of a job, in boxes.
        by_tiles: Whether G is computed by tiles.
        self_contrast: Whether S is symmetric.
        most_boxes: Boxes that fit the workspace. One block is taken even if it does not fit.
    """
    longest = max(row_blocks, column_blocks)
    largest = longest
    while (
        largest > 1
        and boxes(min(largest, row_blocks), min(largest, column_blocks), by_tiles=by_tiles).total
        > most_boxes
    ):
        largest -= 1
    fewest = -(-longest // largest)
    sides = dict.fromkeys(-(-longest // n) for n in range(fewest, min(fewest + 3, longest) + 1))

    def steps(side: int) -> int:
        shapes: dict[Square, int] = {}
        for _, _, square in squares(row_blocks, column_blocks, side, self_contrast=self_contrast):
            shapes[square] = shapes.get(square, 0) + 1
        return sum(
            count
            * (
                products(
                    square,
                    programs,
                    features,
                    tile_boxes=tile_boxes,
                    pitch=BOXES_OF_BLOCK * side,
                    of_rows=True,
                    of_columns=True,
                ).load
                + LAUNCH_STEPS
            )
            for square, count in shapes.items()
        )

    return min(sides, key=steps)


def squares(
    row_blocks: int, column_blocks: int, side: int, *, self_contrast: bool
) -> list[tuple[int, int, Square]]:
    """First row block, first column block and shape of each square, row by row.

    Of a symmetric S those on and above the diagonal. No side is longer than ``side``, and they
    differ by one block at most: a thin square at the end would leave programs idle.
    """
    rows, columns = (_cut_evenly(blocks, side) for blocks in (row_blocks, column_blocks))
    return [
        (i, j, Square(height, width, self_contrast and i == j))
        for i, height in rows
        for j, width in columns
        if j >= i or not self_contrast
    ]


def _cut_evenly(blocks: int, side: int) -> list[tuple[int, int]]:
    """The first block and the number of blocks of each of the fewest pieces up to a length."""
    pieces = -(-blocks // side)
    starts = [blocks * piece // pieces for piece in range(pieces)]
    return [
        (first, last - first) for first, last in zip(starts, [*starts[1:], blocks], strict=True)
    ]
