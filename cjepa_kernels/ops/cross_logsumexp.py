"""The operator ``cross_logsumexp``: its schemas, fakes and results."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cjepa_kernels.definitions import (
    CrossLogSumExpBackward,
    CrossLogSumExpForward,
    accumulation_dtype,
)
from cjepa_kernels.ops.definition import Definition

# x: (M, D), y: (N, D), any strides. The options are those of nt_xent.
# row_*: (M,), column_*: (N,). max: the largest similarity of a row or column of S = x y^T.
# shift is a similarity, log_sum the log of the sum of exp((s - shift) / tau), and
# lse = shift / tau + log_sum. The backward takes any such pair, also that of a larger S of which x
# and y are a part.
# of_x, of_y: whether to compute that gradient; otherwise it is empty. The gradient of the
# temperature follows from either.
SCHEMA = (
    "(Tensor x, Tensor y, Tensor? temperature_tensor, float temperature, "
    "bool use_cosine_similarity, float eps, ScalarType? product_dtype) -> "
    "(Tensor row_lse, Tensor column_lse, Tensor row_max, Tensor column_max, "
    "Tensor row_shift, Tensor row_log_sum, Tensor column_shift, Tensor column_log_sum)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad_row_lse, Tensor grad_column_lse, Tensor x, Tensor y, "
    "Tensor? temperature_tensor, Tensor row_shift, Tensor row_log_sum, "
    "Tensor column_shift, Tensor column_log_sum, float temperature, "
    "bool use_cosine_similarity, float eps, ScalarType? product_dtype, bool of_x, bool of_y) -> "
    "(Tensor grad_x, Tensor grad_y, Tensor grad_temperature)"
)


def _fake(arguments: Any) -> CrossLogSumExpForward:
    x, y = arguments.x, arguments.y
    dtype = accumulation_dtype(x.dtype)

    def of_rows() -> Tensor:
        return x.new_empty(x.shape[0], dtype=dtype)  # type: ignore[no-any-return]

    def of_columns() -> Tensor:
        return x.new_empty(y.shape[0], dtype=dtype)  # type: ignore[no-any-return]

    return CrossLogSumExpForward(
        row_lse=of_rows(),
        column_lse=of_columns(),
        row_max=of_rows(),
        column_max=of_columns(),
        row_shift=of_rows(),
        row_log_sum=of_rows(),
        column_shift=of_columns(),
        column_log_sum=of_columns(),
    )


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
    saved: Any, grad_row_lse: Tensor | None, grad_column_lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Zeros in place of an upstream gradient that is missing."""
    of_rows, of_columns = saved.row_shift, saved.column_shift
    return (
        of_rows.new_zeros(of_rows.shape) if grad_row_lse is None else grad_row_lse,
        of_columns.new_zeros(of_columns.shape) if grad_column_lse is None else grad_column_lse,
    )


DEFINITION = Definition(
    name="cross_logsumexp",
    schema=SCHEMA,
    schema_backward=SCHEMA_BACKWARD,
    results=CrossLogSumExpForward,
    results_backward=CrossLogSumExpBackward,
    fake=_fake,
    fake_backward=_fake_backward,
    complete=_complete,
)
