"""The operator ``nt_xent``: its schemas, fakes and results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cjepa_kernels.definitions import (
    LARGE_BLOCK,
    LARGE_BLOCK_ROWS,
    SMALL_BLOCK,
    NTXentBackward,
    NTXentForward,
    accumulation_dtype,
)
from cjepa_kernels.ops import registry
from cjepa_kernels.ops.definition import Definition
from cjepa_kernels.triton import goes_to_chunked
from cjepa_kernels.triton.saved_rows import fits, form_of, saved_bytes

# z_i, z_j: (B, D), any strides. mask: (B, B) bool.
# temperature_tensor: () or None; if given, it takes the place of temperature.
# product_dtype: the dtype that the operands of z z^T are rounded to; None is that of the inputs.
# keep: whether to save for the backward what the back end can, see saved_memory.
# loss: () or, for reduction "none", (M,). accuracy and mean similarities: ().
# lse, hardest, shift, log_sum, positive: (M,). hardest is the largest similarity of a row's
# negatives, -inf without any. kept is what the forward saved; only the back end that made it reads
# it. Rows saved with their weights belong to the shift, log_sum and positive of the same forward.
# The schema's names `keep`, `hardest` and `kept` are public and stay. Python calls them
# `save_for_backward`, `largest_negative` and `saved_for_backward`. C++ saves exponentials, and says
# `save_exponentials` and `saved_exponentials`.
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


class SavedMemory(NamedTuple):
    """The size of what a forward saves.

    Attributes:
        size: How many numbers.
        dtype: Of the numbers.
    """

    size: int
    dtype: torch.dtype


def saved_memory(
    overload: str, z_i: Tensor, product_dtype: torch.dtype | None, reduction: str
) -> SavedMemory | None:
    """What the forward saves on request: exponentials on the CPU, packed rows on the GPU.

    Args:
        overload: Overload of the operator.
        z_i: (B, D), the first view.
        product_dtype: As the operator takes it.
        reduction: As the operator takes it.

    Returns:
        None if the back end of the overload saves nothing.
    """
    backend = registry.backend_of(overload, z_i.device.type)
    if backend == "native":
        size = saved_exponentials_size(2 * z_i.shape[0])
        return SavedMemory(size, accumulation_dtype(z_i.dtype))
    if backend == "triton" and not goes_to_chunked(z_i):
        return SavedMemory(saved_bytes(form_of(z_i, product_dtype, reduction)), torch.uint8)
    return None


def saves_at_most(
    limit: int, overload: str, z_i: Tensor, product_dtype: torch.dtype | None, reduction: str
) -> bool:
    """Whether the forward can save something for the backward, in at most so many bytes.

    Args:
        limit: Bytes.
        overload: As for :func:`saved_memory`, like the others.
        z_i: The same.
        product_dtype: The same.
        reduction: The same.
    """
    backend = registry.backend_of(overload, z_i.device.type)
    if backend == "native":
        itemsize = 8 if z_i.dtype == torch.float64 else 4
        return itemsize * saved_exponentials_size(2 * z_i.shape[0]) <= limit
    if backend == "triton":
        return not goes_to_chunked(z_i) and fits(limit, z_i, product_dtype, reduction)
    return False


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
        # Of a call that saves something, ``_fake_saved`` gives this result.
        saved_for_backward=empty(0),
    )


def _fake_saved(arguments: Any, overload: str) -> dict[str, Tensor]:
    """The results that depend on the back end: what it saves."""
    if not arguments.keep:
        return {}
    z_i = arguments.z_i
    memory = saved_memory(overload, z_i, arguments.product_dtype, arguments.reduction)
    if memory is None:
        return {}
    return {"saved_for_backward": z_i.new_empty(memory.size, dtype=memory.dtype)}


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
    fake_of_overload=_fake_saved,
)
