"""The operator ``class_similarity``: its schemas, fakes and results."""

from __future__ import annotations

from typing import Any

from cjepa_kernels.definitions import (
    ClassSimilarityBackward,
    ClassSimilarityForward,
    accumulation_dtype,
)
from cjepa_kernels.ops.definition import Definition

# z_i: (B, D), z_j: (B, D) or None, any strides. The M rows are those of z_i, then those of z_j.
# classes: int64, any numbers: (B,) with z_j, whose rows k and B + k have the same class, else (M,).
# within: (M,), the mean similarity of a row and the other rows of its class, 0 without any.
# across: (), the mean similarity of two rows of different classes, NaN without any.
# product_dtype, tf32: how the operands of the similarities are rounded, tf32 for fp32 alone.
SCHEMA = (
    "(Tensor z_i, Tensor? z_j, Tensor classes, bool use_cosine_similarity, float eps, "
    "ScalarType? product_dtype, bool tf32) -> (Tensor within, Tensor across)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad_within, Tensor z_i, Tensor? z_j, Tensor classes, bool use_cosine_similarity, "
    "float eps, ScalarType? product_dtype, bool tf32) -> (Tensor grad_z_i, Tensor grad_z_j)"
)


def _fake(arguments: Any) -> ClassSimilarityForward:
    z_i = arguments.z_i
    rows = z_i.shape[0] if arguments.z_j is None else 2 * z_i.shape[0]
    dtype = accumulation_dtype(z_i.dtype)
    return ClassSimilarityForward(
        within=z_i.new_empty(rows, dtype=dtype), across=z_i.new_empty((), dtype=dtype)
    )


def _fake_backward(arguments: Any) -> ClassSimilarityBackward:
    z_i, z_j = arguments.z_i, arguments.z_j
    return ClassSimilarityBackward(
        grad_z_i=z_i.new_empty(z_i.shape),
        grad_z_j=z_i.new_empty((0, z_i.shape[1])) if z_j is None else z_j.new_empty(z_j.shape),
    )


DEFINITION = Definition(
    name="class_similarity",
    schema=SCHEMA,
    schema_backward=SCHEMA_BACKWARD,
    results=ClassSimilarityForward,
    results_backward=ClassSimilarityBackward,
    fake=_fake,
    fake_backward=_fake_backward,
)
