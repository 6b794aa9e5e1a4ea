"""Sums and maxima of tiles become log-sum-exps, and those the loss with its metrics."""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.temperature import LN2, read_scale


@triton.jit
def add_slots(
    total, top, sums, maxima, at, stride, first, last, scale,
    CONSTANT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add slots [first, last), in order: ``total`` is relative to ``top``, or to a constant."""
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        where = slot.to(tl.int64)[:, None] * stride + at[None, :]
        valid = (slot < last)[:, None]
        s = tl.load(sums + where, mask=valid, other=0.0)
        m = tl.load(maxima + where, mask=valid, other=float("-inf"))
        new = tl.maximum(top, tl.max(m, 0))
        if not CONSTANT:
            shift = tl.where(new == float("-inf"), 0.0, new)
            total *= tl.exp2((top - shift) * scale)
            s *= tl.exp2((m - shift[None, :]) * scale)
        total += tl.sum(s, 0)
        top = new
    return total, top


@triton.jit
def add_column_slots(
    total, top, sums, maxima, at, stride, block, whole_columns, row_blocks, whole_rows, run,
    scale, SELF: tl.constexpr, CONSTANT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add the slots of a block of columns.

    A whole block has runs of whole row blocks (those above it, with SELF) and, in a slot by their
    own number, ragged ones; in a ragged block each row block has its own slot.
    """
    above = row_blocks
    if SELF:
        above = block
    whole = tl.minimum(above, whole_rows)
    slots = tl.where(block < whole_columns, tl.cdiv(whole, run), above)
    total, top = add_slots(total, top, sums, maxima, at, stride, 0, slots, scale, CONSTANT, SLOTS)
    if not SELF:
        own = tl.where(block < whole_columns, whole, above)
        total, top = add_slots(
            total, top, sums, maxima, at, stride, own, above, scale, CONSTANT, SLOTS
        )
    return total, top


@triton.jit
def load_state(sums, maxima, at, any_before, FIRST: tl.constexpr):
    """What the panels before this one came to, if they have anything of these rows."""
    total = tl.zeros(at.shape, tl.float32)
    top = tl.full(at.shape, float("-inf"), tl.float32)
    if not FIRST:
        total = tl.load(sums + at, mask=any_before, other=0.0)
        top = tl.load(maxima + at, mask=any_before, other=float("-inf"))
    return total, top


@triton.jit
def softplus(x):
    """log(1 + e^x) of fp64, accurate for x far below 0 as well."""
    t = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(t < 1e-8, t, tl.log(1.0 + t))


@triton.jit
def log_sum_of(total, top, CONSTANT: tl.constexpr):
    """(shift, log of the sum relative to it) in fp64; (0, -inf) of an empty sum."""
    none = total == 0.0
    shift = top
    if CONSTANT:
        shift = tl.full(top.shape, 1.0, tl.float32)
    shift = tl.where(none, 0.0, shift)
    log_sum = tl.where(none, float("-inf"), tl.log(tl.where(none, 1.0, total).to(tl.float64)))
    return shift, log_sum


@triton.jit
def sum_in_order(values, count, BLOCK: tl.constexpr):
    """Sum of ``count`` numbers, read past the L1 cache: other programs wrote them."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


FEATURES = tl.constexpr(16)  # whose sums over all rows a program adds up at a time
SUMS = tl.constexpr(128)


@triton.jit
def squared_sum(sums, count, first, WIDTH: tl.constexpr):
    """|sum z|^2 of FEATURES features, from ``count`` rows of sums."""
    feature = first + tl.arange(0, FEATURES)
    z = tl.zeros((FEATURES,), tl.float64)
    for start in range(0, count, SUMS):
        row = start + tl.arange(0, SUMS)
        at = row[:, None] * WIDTH + feature[None, :]
        z += tl.sum(tl.load(sums + at, mask=(row < count)[:, None], other=0.0), 0)
    return tl.sum(z * z, 0)


@triton.jit(
    do_not_specialize=[
        "rows", "blocks", "first_column", "last_column", "run", "programs", "kept_slots"
    ]
)  # fmt: skip
def nt_xent_rows_kernel(
    row_sum, row_max, column_sum, column_max, running_sum, running_max, positives,
    loss, lse, hardest, shifts, log_sums, positive, partial, sums, squares, kept_sum, kept_count,
    counter, mean_loss, accuracy, positive_similarity, negative_similarity, temperature,
    rows, blocks, first_column, last_column, run, programs, kept_slots, scale_of_loss,
    CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    NONE: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """ROWS of a block of BM: what a panel adds to them and, after the last, their loss and metrics.

    The program that ends last adds up what all have left, in order, and writes the scalars.
    """
    program = tl.program_id(0)
    parts = blocks * (BM // ROWS)
    block = program // (BM // ROWS)
    a = program * ROWS + tl.arange(0, ROWS)
    scale = read_scale(temperature, TAU_TENSOR)
    total, top = load_state(running_sum, running_max, a, block < first_column, FIRST)
    if block >= first_column and block < last_column:
        width = (last_column - first_column) * BM
        total, top = add_column_slots(
            total, top, column_sum, column_max, a - first_column * BM, width, block, rows // BM,
            blocks, rows // BM, run, scale, True, CONSTANT, SLOTS,
        )  # fmt: skip
    total, top = add_slots(
        total, top, row_sum, row_max, a, blocks * BM, tl.maximum(block - first_column, 0),
        last_column - first_column, scale, CONSTANT, SLOTS,
    )  # fmt: skip
    if not LAST:
        tl.store(running_sum + a, total)
        tl.store(running_max + a, top)
        return
    valid = a < rows
    # The smaller of S_ab and S_ba, which may differ in their last bit: a tie with a negative, of
    # which a tile has one, is then no hit.
    s = tl.load(positives + a, mask=valid, other=0.0)
    s = tl.minimum(s, tl.load(positives + (a ^ 1), mask=valid, other=0.0))
    shift, log_sum = log_sum_of(total, top, CONSTANT)
    inverse_tau = (scale * LN2).to(tl.float64)
    own = softplus((shift.to(tl.float64) - s) * inverse_tau + log_sum)
    at = (a % 2) * (rows // 2) + a // 2  # the caller's order
    if NONE:
        tl.store(loss + at, own.to(tl.float32), mask=valid)
    tl.store(lse + at, (s * inverse_tau + own).to(tl.float32), mask=valid)
    tl.store(hardest + at, top, mask=valid)
    tl.store(shifts + at, shift, mask=valid)
    tl.store(log_sums + at, log_sum.to(tl.float32), mask=valid)
    tl.store(positive + at, s, mask=valid)
    tl.store(partial + program, tl.sum(tl.where(valid, own, 0.0), 0))
    tl.store(partial + parts + program, tl.sum((valid & (s > top)).to(tl.float64), 0))
    tl.store(partial + 2 * parts + program, tl.sum(s.to(tl.float64), 0))
    if not MASKED:
        for group in range(program, WIDTH // FEATURES, parts):
            square = squared_sum(sums, programs, group * FEATURES, WIDTH)
            tl.store(partial + 3 * parts + group, square)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1) != parts - 1:
        return
    if not NONE:
        tl.store(mean_loss, (sum_in_order(partial, parts, 1024) * scale_of_loss).to(tl.float32))
    hits = sum_in_order(partial + parts, parts, 1024)
    square = sum_in_order(squares, programs, 1024)
    hits = tl.where(square == square, hits, 0.0)  # maxima may leave a NaN out
    positive_sum = sum_in_order(partial + 2 * parts, parts, 1024)
    tl.store(accuracy, (hits / rows).to(tl.float32))
    tl.store(positive_similarity, (positive_sum / rows).to(tl.float32))
    if MASKED:
        negative = sum_in_order(kept_sum, kept_slots, 1024)
        negatives = sum_in_order(kept_count, kept_slots, 1024)
    else:
        # (|sum z|^2 - sum |z|^2 - sum s_pos) / (M (M - 2)): no pass over pairs.
        negative = sum_in_order(partial + 3 * parts, WIDTH // FEATURES, 1024) - positive_sum
        negative -= square
        negatives = tl.cast(rows, tl.float64) * (rows - 2)
    negative = tl.where(negatives > 0, negative / negatives, float("nan"))
    tl.store(negative_similarity, negative.to(tl.float32))


@triton.jit(
    do_not_specialize=[
        "rows", "stride", "first", "slots", "row_blocks", "whole_rows", "whole_columns", "run"
    ]
)  # fmt: skip
def logsumexp_kernel(
    sums, maxima, running_sum, running_max, lse, largest, shifts, log_sums, temperature,
    rows, stride, first, slots, row_blocks, whole_rows, whole_columns, run,
    COLUMNS: tl.constexpr, CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr, BM: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a block of rows, or with COLUMNS of the panel's columns from ``first`` on."""
    block = tl.program_id(0)
    a = block * BM + tl.arange(0, BM)
    scale = read_scale(temperature, TAU_TENSOR)
    total, top = load_state(running_sum, running_max, a, True, FIRST)
    if COLUMNS:
        total, top = add_column_slots(
            total, top, sums, maxima, a, stride, first + block, whole_columns, row_blocks,
            whole_rows, run, scale, False, CONSTANT, SLOTS,
        )  # fmt: skip
        a += first * BM
    else:
        total, top = add_slots(
            total, top, sums, maxima, a, stride, 0, slots, scale, CONSTANT, SLOTS
        )
    if not LAST:
        tl.store(running_sum + a, total)
        tl.store(running_max + a, top)
        return
    valid = a < rows
    shift, log_sum = log_sum_of(total, top, CONSTANT)
    result = shift.to(tl.float64) * (scale * LN2) + log_sum
    tl.store(lse + a, result.to(tl.float32), mask=valid)
    tl.store(largest + a, top, mask=valid)
    tl.store(shifts + a, shift, mask=valid)
    tl.store(log_sums + a, log_sum.to(tl.float32), mask=valid)
