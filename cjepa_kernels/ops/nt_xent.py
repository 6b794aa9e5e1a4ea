"""The operator ``nt_xent``: its schemas, fakes and results."""

from __future__ import annotations

from typing import Any

from cjepa_kernels.definitions import (
    LARGE_BLOCK,
    LARGE_BLOCK_ROWS,
    SMALL_BLOCK,
    NTXentBackward,
    NTXentForward,
    accumulation_dtype,
)
from cjepa_kernels.ops.definition import Definition

# z_i, z_j: (B, D), any strides. mask: (B, B) bool.
# temperature_tensor: () or None; if given, it takes the place of temperature.
# product_dtype: the dtype that the operands of z z^T are rounded to; None is that of the inputs.
# keep: whether to save the exponentials of S for the backward, see saved_exponentials_size.
# loss: () or, for reduction "none", (M,). accuracy and mean similarities: ().
# lse, hardest, shift, log_sum, positive: (M,). hardest is the largest similarity of a row's
# negatives, -inf without any. kept holds the exponentials that the forward saved.
# The schema's names `keep`, `hardest` and `kept` are public and stay. Python and C++ call them
# `save_exponentials`, `largest_negative` and `saved_exponentials`.
# shift is a similarity, log_sum the log of the sum over the negatives of exp((s - shift) / tau):
# together they are LSE-, without the rounding of a large number at low temperature. The backward
# takes any such pair, also that of a larger S of which these rows are a part.
SCHEMA = (
    "(Tensor z_i, Tensor z_j, Tensor? mask, Tensor? temperature_tensor, float temperature, "
    "bool use_cosine_similarity, float eps, str reduction, ScalarType? product_dtype, "
    "bool keep) -> "
    "(Tensor loss, Tensor accuracy, Tensor positive_similarity, Tensor negative_similarity, "
    "Tensor lse, Tensor hardest, Tensor shift, Tensor log_sum, Tensor positive, Tensor kept)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad_loss, Tensor z_i, Tensor z_j, Tensor? mask, Tensor? temperature_tensor, "
    "Tensor shift, Tensor log_sum, Tensor positive, Tensor kept, float temperature, "
    "bool use_cosine_similarity, float eps, str reduction, ScalarType? product_dtype) -> "
    "(Tensor grad_z_i, Tensor grad_z_j, Tensor grad_temperature)"
)


def saved_exponentials_size(rows: int) -> int:
    """Number of exponentials that the compiled forward saves on request.

    They are those of S on and above the diagonal, in square blocks. The sizes of the blocks are
    those of ``csrc/cpu/constants.h``, and ``python_tests/ops/test_constants.py`` compares both.

    Args:
        rows: M.
    """
    block = LARGE_BLOCK if rows >= LARGE_BLOCK_ROWS else SMALL_BLOCK
    blocks = (rows + block - 1) // block
    return blocks * (blocks + 1) // 2 * block * block


def _fake(arguments: Any) -> NTXentForward:
    z_i = arguments.z_i
    rows = 2 * z_i.shape[0]
    dtype = accumulation_dtype(z_i.dtype)

    def empty(*shape: int) -> Any:
        return z_i.new_empty(shape, dtype=dtype)

    return NTXentForward(
        loss=empty(rows) if arguments.reduction == "none" else empty(),
        accuracy=empty(),
        positive_similarity=empty(),
        negative_similarity=empty(),
        lse=empty(rows),
        largest_negative=empty(rows),
        shift=empty(rows),
        log_sum=empty(rows),
        positive=empty(rows),
        saved_exponentials=empty(saved_exponentials_size(rows) if arguments.keep else 0),
    )


def _fake_backward(arguments: Any) -> NTXentBackward:
    z_i, z_j, temperature = arguments.z_i, arguments.z_j, arguments.temperature_tensor
    return NTXentBackward(
        grad_z_i=z_i.new_empty(z_i.shape),
        grad_z_j=z_j.new_empty(z_j.shape),
        grad_temperature=(arguments.shift if temperature is None else temperature).new_empty(()),
    )


DEFINITION = Definition(
    name="nt_xent",
    schema=SCHEMA,
    schema_backward=SCHEMA_BACKWARD,
    results=NTXentForward,
    results_backward=NTXentBackward,
    fake=_fake,
    fake_backward=_fake_backward,
)
