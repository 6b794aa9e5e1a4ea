"""The operator ``cross_logsumexp``: its schemas, fakes and results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cjepa_kernels.definitions import (
    LARGE_BLOCK,
    LARGE_BLOCK_ROWS,
    SMALL_BLOCK,
    CrossLogSumExpBackward,
    CrossLogSumExpForward,
    accumulation_dtype,
)
from cjepa_kernels.ops import registry
from cjepa_kernels.ops.definition import Definition

# x: (M, D), y: (N, D), any strides. The options are those of nt_xent.
# positives: (M,) int64, or None. The column of each row's positive, or -1 for a row without one.
# row_*: (M,), column_*: (N,). max: the largest similarity of a row or column of S = x y^T.
# shift is a similarity, log_sum the log of the sum of exp((s - shift) / tau), and
# lse = shift / tau + log_sum. The entries of positives count in none of these. The backward takes
# any such pair, also that of a larger S of which x and y are a part.
# positive: (M,), the similarity of each row's positive. mean_similarity: (), of all entries. Both
# are (0,) without positives.
# keep, kept: as those of nt_xent, for all of S.
# of_x, of_y: whether to compute that gradient; otherwise it is empty. The gradient of the
# temperature follows from either.
SCHEMA = (
    "(Tensor x, Tensor y, Tensor? positives, Tensor? temperature_tensor, float temperature, "
    "bool use_cosine_similarity, float eps, ScalarType? product_dtype, bool keep) -> "
    "(Tensor row_lse, Tensor column_lse, Tensor row_max, Tensor column_max, "
    "Tensor row_shift, Tensor row_log_sum, Tensor column_shift, Tensor column_log_sum, "
    "Tensor positive, Tensor mean_similarity, Tensor kept)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad_row_lse, Tensor grad_column_lse, Tensor? grad_positive, Tensor x, Tensor y, "
    "Tensor? positives, Tensor? temperature_tensor, Tensor row_shift, Tensor row_log_sum, "
    "Tensor column_shift, Tensor column_log_sum, Tensor kept, float temperature, "
    "bool use_cosine_similarity, float eps, ScalarType? product_dtype, bool of_x, bool of_y) -> "
    "(Tensor grad_x, Tensor grad_y, Tensor grad_temperature)"
)


def saved_rectangle_size(rows: int, columns: int) -> int:
    """Number of exponentials of a rectangle that the compiled forward saves on request.

    Args:
        rows: M.
        columns: N.
    """
    block = LARGE_BLOCK if max(rows, columns) >= LARGE_BLOCK_ROWS else SMALL_BLOCK
    return -(-rows // block) * -(-columns // block) * block * block


def rectangle_saves_at_most(limit: int, overload: str, x: Tensor, y: Tensor) -> bool:
    """Whether the forward can save its exponentials in at most so many bytes; on the CPU alone.

    Args:
        limit: Bytes.
        overload: Overload of the operator.
        x: (M, D).
        y: (N, D).
    """
    if registry.backend_of(overload, x.device.type) != "native":
        return False
    itemsize = 8 if x.dtype == torch.float64 else 4
    return itemsize * saved_rectangle_size(x.shape[0], y.shape[0]) <= limit


def _fake(arguments: Any) -> CrossLogSumExpForward:
    x, y = arguments.x, arguments.y
    dtype = accumulation_dtype(x.dtype)

    rows, columns = x.shape[0], y.shape[0]
    paired = arguments.positives is not None

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=dtype)  # type: ignore[no-any-return]

    return CrossLogSumExpForward(
        row_lse=empty(rows),
        column_lse=empty(columns),
        row_max=empty(rows),
        column_max=empty(columns),
        row_shift=empty(rows),
        row_log_sum=empty(rows),
        column_shift=empty(columns),
        column_log_sum=empty(columns),
        positive=empty(rows if paired else 0),
        mean_similarity=empty() if paired else empty(0),
        saved_for_backward=empty(0),  # of a call that saves something ``_fake_saved`` gives it
    )


def _fake_saved(arguments: Any, overload: str) -> dict[str, Tensor]:
    """The results that depend on the back end: what it saves."""
    x, y = arguments.x, arguments.y
    if not arguments.keep or registry.backend_of(overload, x.device.type) != "native":
        return {}
    size = saved_rectangle_size(x.shape[0], y.shape[0])
    return {"saved_for_backward": x.new_empty(size, dtype=accumulation_dtype(x.dtype))}


def _fake_backward(arguments: Any) -> CrossLogSumExpBackward:
    temperature = arguments.temperature_tensor
    x = arguments.x if arguments.of_x else arguments.x[:0]
    y = arguments.y if arguments.of_y else arguments.y[:0]
    like = arguments.row_shift if temperature is None else temperature
    return CrossLogSumExpBackward(
        grad_x=x.new_empty(x.shape),
        grad_y=y.new_empty(y.shape),
        grad_temperature=like.new_empty(()),
    )


def _complete(
    saved: Any,
    grad_row_lse: Tensor | None,
    grad_column_lse: Tensor | None,
    grad_positive: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Zeros in place of an upstream gradient that is missing; None for that of no positives."""
    of_rows, of_columns = saved.row_shift, saved.column_shift
    if saved.positives is None:
        grad_positive = None
    elif grad_positive is None:
        grad_positive = of_rows.new_zeros(of_rows.shape)
    return (
        of_rows.new_zeros(of_rows.shape) if grad_row_lse is None else grad_row_lse,
        of_columns.new_zeros(of_columns.shape) if grad_column_lse is None else grad_column_lse,
        grad_positive,
    )


DEFINITION = Definition(
    name="cross_logsumexp",
    schema=SCHEMA,
    schema_backward=SCHEMA_BACKWARD,
    results=CrossLogSumExpForward,
    results_backward=CrossLogSumExpBackward,
    fake=_fake,
    fake_backward=_fake_backward,
    fake_of_overload=_fake_saved,
    complete=_complete,
)
