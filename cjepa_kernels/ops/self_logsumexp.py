"""The operator ``self_logsumexp``: its schemas, fakes and results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cjepa_kernels.definitions import (
    SelfLogSumExpBackward,
    SelfLogSumExpForward,
    accumulation_dtype,
)
from cjepa_kernels.ops import registry
from cjepa_kernels.ops.definition import Definition
from cjepa_kernels.ops.nt_xent import saved_exponentials_size

# z_i: (B, D), z_j: (B, D) or None, any strides. The M rows are those of z_i, then those of z_j, and
# S is the (M, M) matrix of their similarities. The options are those of nt_xent.
# With z_j, row k and row B + k are each other's positive. Without z_j, positives: (M,) int64 or
# None holds the number of each row's positive, or -1 for a row without one. Two rows are each
# other's positive or not at all.
# classes: int64 or None, any numbers: (B,) with z_j, whose rows k and B + k have the same class,
# else (M,).
# An entry of S counts in the sums unless it is that of a row and itself, of a row and its positive,
# or, with classes, of two rows of the same class.
# class_means, class_weights: (M,) or None, both or neither, only with classes and without z_j. Rows
# of one class then count for each other, and attract each other. class_means holds the mean of each
# row's similarities with the other rows of its class, class_weights 1 / (their number), and both 0
# for a row that nothing attracts. lse is then the row's log-sum-exp minus class_mean / tau, and has
# the gradient of both: what cancels is subtracted entry by entry.
# lse, largest, shift, log_sum: (M,), of the entries that count: lse = shift / tau + log_sum, minus
# class_mean / tau if there are means.
# largest is a similarity, and lse and largest are -inf without any entry. The backward takes any
# such shift and log_sum, also those of a larger S of which these rows are a part.
# positive: (M,), the similarity of each row's positive, 0 without one. (0,) without positives.
# keep, kept: as those of nt_xent.
SCHEMA = (
    "(Tensor z_i, Tensor? z_j, Tensor? positives, Tensor? classes, Tensor? class_means, "
    "Tensor? class_weights, Tensor? temperature_tensor, float temperature, "
    "bool use_cosine_similarity, float eps, ScalarType? product_dtype, bool keep) -> "
    "(Tensor lse, Tensor largest, Tensor shift, Tensor log_sum, Tensor positive, Tensor kept)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad_lse, Tensor? grad_positive, Tensor z_i, Tensor? z_j, Tensor? positives, "
    "Tensor? classes, Tensor? class_weights, Tensor? temperature_tensor, Tensor shift, "
    "Tensor log_sum, Tensor kept, float temperature, bool use_cosine_similarity, float eps, "
    "ScalarType? product_dtype) -> "
    "(Tensor grad_z_i, Tensor grad_z_j, Tensor grad_temperature)"
)


def triangle_saves_at_most(limit: int, overload: str, z_i: Tensor, rows: int) -> bool:
    """Whether the forward can save its exponentials in at most so many bytes; on the CPU alone.

    Args:
        limit: Bytes.
        overload: Overload of the operator.
        z_i: (B, D).
        rows: M.
    """
    if registry.backend_of(overload, z_i.device.type) != "native":
        return False
    itemsize = 8 if z_i.dtype == torch.float64 else 4
    return itemsize * saved_exponentials_size(rows) <= limit


def _rows(arguments: Any) -> int:
    views = 1 if arguments.z_j is None else 2
    return views * arguments.z_i.shape[0]  # type: ignore[no-any-return]


def _fake(arguments: Any) -> SelfLogSumExpForward:
    z_i, rows = arguments.z_i, _rows(arguments)
    dtype = accumulation_dtype(z_i.dtype)
    paired = arguments.z_j is not None or arguments.positives is not None

    def empty(size: int) -> Tensor:
        return z_i.new_empty(size, dtype=dtype)  # type: ignore[no-any-return]

    return SelfLogSumExpForward(
        lse=empty(rows),
        largest=empty(rows),
        shift=empty(rows),
        log_sum=empty(rows),
        positive=empty(rows if paired else 0),
        saved_for_backward=empty(0),  # of a call that saves something ``_fake_saved`` gives it
    )


def _fake_saved(arguments: Any, overload: str) -> dict[str, Tensor]:
    """The results that depend on the back end: what it saves."""
    z_i = arguments.z_i
    if not arguments.keep or registry.backend_of(overload, z_i.device.type) != "native":
        return {}
    size = saved_exponentials_size(_rows(arguments))
    return {"saved_for_backward": z_i.new_empty(size, dtype=accumulation_dtype(z_i.dtype))}


def _fake_backward(arguments: Any) -> SelfLogSumExpBackward:
    z_i, z_j, temperature = arguments.z_i, arguments.z_j, arguments.temperature_tensor
    like = arguments.shift if temperature is None else temperature
    return SelfLogSumExpBackward(
        grad_z_i=z_i.new_empty(z_i.shape),
        grad_z_j=z_i.new_empty((0, z_i.shape[1])) if z_j is None else z_j.new_empty(z_j.shape),
        grad_temperature=like.new_empty(()),
    )


def _complete(
    saved: Any, grad_lse: Tensor | None, grad_positive: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Zeros in place of an upstream gradient that is missing; None for that of no positives."""
    of_rows = saved.shift
    if saved.z_j is None and saved.positives is None:
        grad_positive = None
    elif grad_positive is None:
        grad_positive = of_rows.new_zeros(of_rows.shape)
    return of_rows.new_zeros(of_rows.shape) if grad_lse is None else grad_lse, grad_positive


DEFINITION = Definition(
    name="self_logsumexp",
    schema=SCHEMA,
    schema_backward=SCHEMA_BACKWARD,
    results=SelfLogSumExpForward,
    results_backward=SelfLogSumExpBackward,
    fake=_fake,
    fake_backward=_fake_backward,
    fake_of_overload=_fake_saved,
    complete=_complete,
)
