"""The sums and maxima of tiles become log-sum-exps, and for NT-Xent the loss and the metrics.

With LSE-_a the log-sum-exp over the negatives of row a and s_a the similarity of its positive,

    sum_a  = sum of exp((s_ab - shift_a) / tau) over the negatives b, added from the tiles' sums
    LSE-_a = shift_a / tau + log_sum_a,    log_sum_a = log(sum_a)
    loss_a = softplus(LSE-_a - s_a / tau)
    lse_a  = s_a / tau + loss_a                  (the log-sum-exp with the positive)
"""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.temperature import LN2, read_scale
from cjepa_kernels.triton.kernels.weights import place_of, store_weights

FEATURE_BLOCK = tl.constexpr(16)  # features whose sums over all rows a program squares at a time
FEATURE_SUM_ROWS = tl.constexpr(128)  # rows of those sums that it reads at a time


@triton.jit
def add_slots(
    total, maximum, sums, maxima, offsets, stride, first, last, scale,
    CONSTANT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add the slots [first, last) in order, SLOTS of them at a time.

    Slots are ``stride`` numbers apart. ``total`` is relative to the running ``maximum`` or, with
    CONSTANT, to 1.
    """
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        slot_offsets = slot.to(tl.int64)[:, None] * stride + offsets[None, :]
        valid = (slot < last)[:, None]
        s = tl.load(sums + slot_offsets, mask=valid, other=0.0)
        m = tl.load(maxima + slot_offsets, mask=valid, other=float("-inf"))
        new = tl.maximum(maximum, tl.max(m, 0))
        if not CONSTANT:
            shift = tl.where(new == float("-inf"), 0.0, new)
            total *= tl.exp2((maximum - shift) * scale)
            s *= tl.exp2((m - shift[None, :]) * scale)
        total += tl.sum(s, 0)
        maximum = new
    return total, maximum


@triton.jit
def add_column_slots(
    total, maximum, sums, maxima, offsets, stride, block, whole_columns, row_blocks, whole_rows,
    run_length, slot_counts, scale,
    SELF: tl.constexpr, CONSTANT: tl.constexpr, COUNTED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add the slots of one block of columns.

    A whole block of columns has one slot for each run of whole row blocks (with SELF, of those
    above it). A last row block that is not whole has the slot of its own number. A last block of
    columns that is not whole has one slot for each row block. With COUNTED, ``slot_counts`` says
    how many slots a whole block of columns has in place of those for runs.
    """
    row_slots = row_blocks
    if SELF:
        row_slots = block
    whole = tl.minimum(row_slots, whole_rows)
    if COUNTED:
        runs = tl.where(block < whole_columns, tl.load(slot_counts + block), row_slots)
    else:
        runs = tl.where(block < whole_columns, tl.cdiv(whole, run_length), row_slots)
    total, maximum = add_slots(
        total=total, maximum=maximum, sums=sums, maxima=maxima, offsets=offsets, stride=stride,
        first=0, last=runs, scale=scale, CONSTANT=CONSTANT, SLOTS=SLOTS,
    )  # fmt: skip
    if not SELF:
        first_ragged = tl.where(block < whole_columns, whole, row_slots)
        total, maximum = add_slots(
            total=total, maximum=maximum, sums=sums, maxima=maxima, offsets=offsets, stride=stride,
            first=first_ragged, last=row_slots, scale=scale, CONSTANT=CONSTANT, SLOTS=SLOTS,
        )  # fmt: skip
    return total, maximum


@triton.jit
def load_running(sums, maxima, offsets, valid, FIRST: tl.constexpr):
    """The sum and maximum of the panels before this one; an empty sum where not ``valid``."""
    total = tl.zeros(offsets.shape, tl.float32)
    maximum = tl.full(offsets.shape, float("-inf"), tl.float32)
    if not FIRST:
        total = tl.load(sums + offsets, mask=valid, other=0.0)
        maximum = tl.load(maxima + offsets, mask=valid, other=float("-inf"))
    return total, maximum


@triton.jit
def add_triangle(
    row_sum, row_max, column_sum, column_max, running_sum, running_max, a, block, scale, rows,
    blocks, first_column, last_column, run_length, slot_counts,
    CONSTANT: tl.constexpr, FIRST: tl.constexpr, COUNTED: tl.constexpr, BM: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """The sums and maxima of rows ``a`` of a symmetric S, to which one panel of tiles is added.

    The rows are in row block ``block``. A tile above the diagonal has added to its rows, and to its
    columns for the rows of the same numbers.
    """
    total, maximum = load_running(
        sums=running_sum, maxima=running_max, offsets=a, valid=block < first_column, FIRST=FIRST
    )
    if block >= first_column and block < last_column:
        total, maximum = add_column_slots(
            total=total, maximum=maximum, sums=column_sum, maxima=column_max,
            stride=(last_column - first_column) * BM, offsets=a - first_column * BM, block=block,
            whole_columns=rows // BM, row_blocks=blocks, whole_rows=rows // BM,
            run_length=run_length, slot_counts=slot_counts, scale=scale, SELF=True,
            CONSTANT=CONSTANT, COUNTED=COUNTED, SLOTS=SLOTS,
        )  # fmt: skip
    return add_slots(
        total=total, maximum=maximum, sums=row_sum, maxima=row_max, offsets=a, stride=blocks * BM,
        first=tl.maximum(block - first_column, 0), last=last_column - first_column, scale=scale,
        CONSTANT=CONSTANT, SLOTS=SLOTS,
    )  # fmt: skip


@triton.jit
def smaller_of_pair(tile_positive, a, valid):
    """The similarity of each row and its other view.

    S_ab and S_ba may differ in their last bit, and a tile holds only one of a tied negative's two.
    With the smaller one as the positive, a tie with a negative never counts as a hit.
    """
    s = tl.load(tile_positive + a, mask=valid, other=0.0)
    return tl.minimum(s, tl.load(tile_positive + (a ^ 1), mask=valid, other=0.0))


@triton.jit
def softplus(x):
    """log(1 + e^x) in fp64, with full relative accuracy for x far below 0."""
    t = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(t < 1e-8, t, tl.log(1.0 + t))


@triton.jit
def log_sum_of(total, maximum, CONSTANT: tl.constexpr):
    """The shift, and in fp64 the log of the sum relative to it; (0, -inf) for an empty sum."""
    empty = total == 0.0
    shift = maximum
    if CONSTANT:
        shift = tl.full(maximum.shape, 1.0, tl.float32)
    shift = tl.where(empty, 0.0, shift)
    log_sum = tl.where(empty, float("-inf"), tl.log(tl.where(empty, 1.0, total).to(tl.float64)))
    return shift, log_sum


@triton.jit
def sum_in_order(values, count, BLOCK: tl.constexpr = 1024):
    """Sum of ``count`` numbers in fp64, always in the same order.

    Other programs of this launch wrote the numbers, so the loads bypass the L1 cache.
    """
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(values + offsets, mask=offsets < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def sum_of_rows(sums, count, first, WIDTH: tl.constexpr):
    """sum_a z_a, FEATURE_BLOCK features of it, from ``count`` partial sums of the rows z_a."""
    feature = first + tl.arange(0, FEATURE_BLOCK)
    z = tl.zeros((FEATURE_BLOCK,), tl.float64)
    for start in range(0, count, FEATURE_SUM_ROWS):
        row = start + tl.arange(0, FEATURE_SUM_ROWS)
        offsets = row[:, None] * WIDTH + feature[None, :]
        z += tl.sum(tl.load(sums + offsets, mask=(row < count)[:, None], other=0.0), 0)
    return z


@triton.jit
def squared_sum(sums, count, first, WIDTH: tl.constexpr):
    """|sum_a z_a|^2 over FEATURE_BLOCK features, from ``count`` partial sums of the rows z_a."""
    z = sum_of_rows(sums, count, first, WIDTH)
    return tl.sum(z * z, 0)


@triton.jit(do_not_specialize=["x_count", "y_count"])
def mean_similarity_kernel(
    x_sums, y_sums, partial, counter, mean_out, x_count, y_count, pairs, WIDTH: tl.constexpr,
):  # fmt: skip
    """The mean of all similarities, sum_a x_a . sum_b y_b / pairs.

    ``x_sums`` and ``y_sums`` hold the parts of both sums, as ``pack_kernel`` left them. Each of
    WIDTH / FEATURE_BLOCK programs takes its features. The program that ends last adds the products
    of all of them in order.
    """
    program = tl.program_id(0)
    x = sum_of_rows(x_sums, x_count, program * FEATURE_BLOCK, WIDTH)
    y = sum_of_rows(y_sums, y_count, program * FEATURE_BLOCK, WIDTH)
    tl.store(partial + program, tl.sum(x * y, 0))
    tl.debug_barrier()
    programs = tl.num_programs(0)
    if tl.atomic_add(counter, 1) == programs - 1:
        tl.store(mean_out, (sum_in_order(partial, programs) / pairs).to(tl.float32))


@triton.jit(
    do_not_specialize=[
        "rows", "blocks", "first_column", "last_column", "run_length", "feature_sum_count",
        "negative_slots",
    ]
)  # fmt: skip
def nt_xent_rows_kernel(
    row_sum, row_max, column_sum, column_max, running_sum, running_max, tile_positive,
    row_loss_out, lse_out, largest_negative_out, shift_out, log_sum_out, positive_out,
    partial, feature_sums, squared_norms, negative_sum, negative_count, counter,
    loss_out, accuracy_out, positive_similarity_out, negative_similarity_out,
    weight_out, weight_shift_out, positive_weight_out, weight_scale, temperature,
    rows, blocks, first_column, last_column, run_length, slot_counts, feature_sum_count,
    negative_slots, loss_factor,
    CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    COUNTED: tl.constexpr, NONE: tl.constexpr, MASKED: tl.constexpr, WEIGH: tl.constexpr,
    WIDTH: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add one panel of tiles to ROWS rows and, after the LAST panel, compute their loss.

    Each program leaves partial sums of the loss and of the metrics in ``partial``. The program that
    ends last adds those of all programs in order and writes the scalars. With WEIGH each program
    also writes the weights of its rows for a backward.

    The mean similarity of the negatives needs no pass over all pairs. Without a user's mask,

        sum of s_ab over all negatives = |sum_a z_a|^2 - sum_a |z_a|^2 - sum_a s_a,

    and M rows have M (M - 2) of them. ``feature_sums`` holds the parts of sum_a z_a, and
    ``squared_norms`` those of sum_a |z_a|^2, as ``pack_kernel`` left them.
    """
    program = tl.program_id(0)
    programs = blocks * (BM // ROWS)
    block = program // (BM // ROWS)
    a = program * ROWS + tl.arange(0, ROWS)
    scale = read_scale(temperature, TAU_TENSOR)
    total, maximum = add_triangle(
        row_sum=row_sum, row_max=row_max, column_sum=column_sum, column_max=column_max,
        running_sum=running_sum, running_max=running_max, a=a, block=block, scale=scale,
        rows=rows, blocks=blocks, first_column=first_column, last_column=last_column,
        run_length=run_length, slot_counts=slot_counts,
        CONSTANT=CONSTANT, FIRST=FIRST, COUNTED=COUNTED, BM=BM, SLOTS=SLOTS,
    )  # fmt: skip
    if not LAST:
        tl.store(running_sum + a, total)
        tl.store(running_max + a, maximum)
        return
    valid = a < rows
    s = smaller_of_pair(tile_positive, a, valid)
    shift, log_sum = log_sum_of(total, maximum, CONSTANT)
    inverse_tau = (scale * LN2).to(tl.float64)
    row_loss = softplus((shift.to(tl.float64) - s) * inverse_tau + log_sum)
    offsets = place_of(a, rows, 2)
    if NONE:
        tl.store(row_loss_out + offsets, row_loss.to(tl.float32), mask=valid)
    tl.store(lse_out + offsets, (s * inverse_tau + row_loss).to(tl.float32), mask=valid)
    tl.store(largest_negative_out + offsets, maximum, mask=valid)
    tl.store(shift_out + offsets, shift, mask=valid)
    tl.store(log_sum_out + offsets, log_sum.to(tl.float32), mask=valid)
    tl.store(positive_out + offsets, s, mask=valid)
    if WEIGH:
        store_weights(
            row=a, valid=valid, g=tl.full(a.shape, 1.0, tl.float64), shift=shift,
            log_sum=log_sum.to(tl.float32).to(tl.float64), s=s, inverse_tau=inverse_tau,
            weight_out=weight_out, shift_out=weight_shift_out,
            positive_weight_out=positive_weight_out, weight_scale=weight_scale, PAIRS=True,
            CONSTANT=CONSTANT,
        )  # fmt: skip
    tl.store(partial + program, tl.sum(tl.where(valid, row_loss, 0.0), 0))
    tl.store(partial + programs + program, tl.sum((valid & (s > maximum)).to(tl.float64), 0))
    tl.store(partial + 2 * programs + program, tl.sum(s.to(tl.float64), 0))
    if not MASKED:
        for group in range(program, WIDTH // FEATURE_BLOCK, programs):
            square = squared_sum(feature_sums, feature_sum_count, group * FEATURE_BLOCK, WIDTH)
            tl.store(partial + 3 * programs + group, square)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1) != programs - 1:
        return
    if not NONE:
        tl.store(loss_out, (sum_in_order(partial, programs) * loss_factor).to(tl.float32))
    hits = sum_in_order(partial + programs, programs)
    square = sum_in_order(squared_norms, feature_sum_count)
    # An embedding with a NaN makes the accuracy 0. The maxima may have left that NaN out.
    hits = tl.where(square == square, hits, 0.0)
    positive_sum = sum_in_order(partial + 2 * programs, programs)
    tl.store(accuracy_out, (hits / rows).to(tl.float32))
    tl.store(positive_similarity_out, (positive_sum / rows).to(tl.float32))
    if MASKED:
        negative = sum_in_order(negative_sum, negative_slots)
        negatives = sum_in_order(negative_count, negative_slots)
    else:
        negative = sum_in_order(partial + 3 * programs, WIDTH // FEATURE_BLOCK) - positive_sum
        negative -= square
        negatives = tl.cast(rows, tl.float64) * (rows - 2)
    negative = tl.where(negatives > 0, negative / negatives, float("nan"))
    tl.store(negative_similarity_out, negative.to(tl.float32))


@triton.jit(
    do_not_specialize=[
        "rows", "other_rows", "stride", "first", "slots", "row_blocks", "whole_rows",
        "whole_columns", "run_length",
    ]
)  # fmt: skip
def logsumexp_kernel(
    sums, maxima, running_sum, running_max, lse_out, max_out, shift_out, log_sum_out, positives,
    positive, temperature, rows, other_rows, stride, first, slots, row_blocks, whole_rows,
    whole_columns, run_length, slot_counts,
    COLUMNS: tl.constexpr, PAIRED: tl.constexpr, CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr,
    COUNTED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BM: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of one block of rows or, with COLUMNS, of one block of the panel's columns.

    ``rows`` is the number of rows (of columns, with COLUMNS), ``other_rows`` that of the other
    side, ``first`` the panel's first block. With PAIRED the rows' positives get a similarity where
    no tile wrote one: 0 for a row without a positive (-1), NaN for a column that does not exist.
    """
    block = tl.program_id(0)
    a = block * BM + tl.arange(0, BM)
    scale = read_scale(temperature, TAU_TENSOR)
    total, maximum = load_running(
        sums=running_sum, maxima=running_max, offsets=a, valid=True, FIRST=FIRST
    )
    if COLUMNS:
        total, maximum = add_column_slots(
            total=total, maximum=maximum, sums=sums, maxima=maxima, offsets=a, stride=stride,
            block=first + block, whole_columns=whole_columns, row_blocks=row_blocks,
            whole_rows=whole_rows, run_length=run_length, slot_counts=slot_counts, scale=scale,
            SELF=False, CONSTANT=CONSTANT, COUNTED=COUNTED, SLOTS=SLOTS,
        )  # fmt: skip
        a += first * BM
    else:
        total, maximum = add_slots(
            total=total, maximum=maximum, sums=sums, maxima=maxima, offsets=a, stride=stride,
            first=0, last=slots, scale=scale, CONSTANT=CONSTANT, SLOTS=SLOTS,
        )  # fmt: skip
    if not LAST:
        tl.store(running_sum + a, total)
        tl.store(running_max + a, maximum)
        return
    valid = a < rows
    shift, log_sum = log_sum_of(total, maximum, CONSTANT)
    lse = shift.to(tl.float64) * (scale * LN2) + log_sum
    tl.store(lse_out + a, lse.to(tl.float32), mask=valid)
    tl.store(max_out + a, maximum, mask=valid)
    if PAIRED and not COLUMNS:
        p = tl.load(positives + a, mask=valid, other=0)
        nowhere = (p < 0) | (p >= other_rows)
        tl.store(positive + a, tl.where(p == -1, 0.0, float("nan")), mask=valid & nowhere)
    tl.store(shift_out + a, shift, mask=valid)
    tl.store(log_sum_out + a, log_sum.to(tl.float32), mask=valid)


@triton.jit(
    do_not_specialize=["rows", "blocks", "first_column", "last_column", "run_length"]
)  # fmt: skip
def self_logsumexp_kernel(
    row_sum, row_max, column_sum, column_max, running_sum, running_max, tile_positive,
    lse_out, max_out, shift_out, log_sum_out, positives, positive_out, class_means, temperature,
    rows, blocks, first_column, last_column, run_length, slot_counts,
    CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    COUNTED: tl.constexpr, PAIRED: tl.constexpr, AVERAGED: tl.constexpr, VIEWS: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add one panel of tiles to ROWS rows and, after the LAST panel, compute their log-sum-exps.

    With AVERAGED the logits of ``class_means`` are subtracted from the log-sum-exps.

    With PAIRED the tiles have written the positives' similarities. The kernel adds those that no
    tile has: 0 for a row without a positive (-1), NaN for a row that does not exist.
    """
    program = tl.program_id(0)
    block = program // (BM // ROWS)
    a = program * ROWS + tl.arange(0, ROWS)
    scale = read_scale(temperature, TAU_TENSOR)
    total, maximum = add_triangle(
        row_sum=row_sum, row_max=row_max, column_sum=column_sum, column_max=column_max,
        running_sum=running_sum, running_max=running_max, a=a, block=block, scale=scale,
        rows=rows, blocks=blocks, first_column=first_column, last_column=last_column,
        run_length=run_length, slot_counts=slot_counts,
        CONSTANT=CONSTANT, FIRST=FIRST, COUNTED=COUNTED, BM=BM, SLOTS=SLOTS,
    )  # fmt: skip
    if not LAST:
        tl.store(running_sum + a, total)
        tl.store(running_max + a, maximum)
        return
    valid = a < rows
    place = place_of(a, rows, VIEWS)
    shift, log_sum = log_sum_of(total, maximum, CONSTANT)
    above = shift.to(tl.float64)
    if AVERAGED:
        above -= tl.load(class_means + a, mask=valid, other=0.0)
    lse = above * (scale * LN2) + log_sum
    tl.store(lse_out + place, lse.to(tl.float32), mask=valid)
    tl.store(max_out + place, maximum, mask=valid)
    tl.store(shift_out + place, shift, mask=valid)
    tl.store(log_sum_out + place, log_sum.to(tl.float32), mask=valid)
    if VIEWS == 2:
        tl.store(positive_out + place, smaller_of_pair(tile_positive, a, valid), mask=valid)
    if PAIRED:
        p = tl.load(positives + a, mask=valid, other=0)
        nowhere = (p < 0) | (p >= rows)
        tl.store(positive_out + a, tl.where(p == -1, 0.0, float("nan")), mask=valid & nowhere)
