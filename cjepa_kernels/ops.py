"""Operators: schemas, fakes and gradients of each; how they are registered is in ``registration``.

Arguments are validated above, in ``functional``. Who changes a schema raises
``backends.SCHEMA_VERSION`` and the compiled module's with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import chunked, chunked_cross_logsumexp, chunked_prediction_loss, triton
from cjepa_kernels.definitions import accumulation_dtype
from cjepa_kernels.registration import (
    NAMESPACE,
    OVERLOADS,
    Definition,
    call,
    operator,
    register,
    register_plain,
    saveable,
)

__all__ = ["NAMESPACE", "OVERLOADS", "call", "kept_size", "operator", "saveable"]

# z_i, z_j: (B, D), any strides. mask: (B, B) bool. temperature_tensor: (), overrides temperature.
# product_dtype: dtype that the operands of z z^T are rounded to; None is the input's.
# keep: keep the exponentials of S for the backward, M^2 / 2 numbers and more (see kept_size).
# loss: () or, for reduction "none", (M,); metrics: ().
# lse, hardest, shift, log_sum, positive: (M,).
# hardest is the largest similarity of a row's negatives, -inf without any.
# shift is a similarity, log_sum the log of the sum over negatives of exp((s - shift) / tau):
# together they are LSE-, without the rounding of a large number at low temperature. The backward
# takes any such pair: of a larger S as well, of which these rows are a part.
NT_XENT = (
    "(Tensor z_i, Tensor z_j, Tensor? mask, Tensor? temperature_tensor, float temperature, "
    "bool use_cosine_similarity, float eps, str reduction, ScalarType? product_dtype, "
    "bool keep) -> "
    "(Tensor loss, Tensor accuracy, Tensor positive_similarity, Tensor negative_similarity, "
    "Tensor lse, Tensor hardest, Tensor shift, Tensor log_sum, Tensor positive, Tensor kept)"
)
NT_XENT_BACKWARD = (
    "(Tensor grad_loss, Tensor z_i, Tensor z_j, Tensor? mask, Tensor? temperature_tensor, "
    "Tensor shift, Tensor log_sum, Tensor positive, Tensor kept, float temperature, "
    "bool use_cosine_similarity, float eps, str reduction, ScalarType? product_dtype) -> "
    "(Tensor grad_z_i, Tensor grad_z_j, Tensor grad_temperature)"
)


def kept_size(rows: int) -> int:
    """Numbers that the native forward keeps on request: S on and above the diagonal, in tiles."""
    block = 192 if rows >= 1536 else 96
    blocks = (rows + block - 1) // block
    return blocks * (blocks + 1) // 2 * block * block


def _fake_nt_xent(z_i: Tensor, *args: Any) -> tuple[Tensor, ...]:
    reduction, _, keep = args[-3:]
    rows = 2 * z_i.shape[0]
    dtype = accumulation_dtype(z_i.dtype)
    loss = z_i.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    metrics = (z_i.new_empty((), dtype=dtype) for _ in range(3))
    of_rows = (z_i.new_empty(rows, dtype=dtype) for _ in range(5))
    kept = z_i.new_empty(kept_size(rows) if keep else 0, dtype=dtype)
    return (loss, *metrics, *of_rows, kept)


def _fake_nt_xent_backward(
    grad_loss: Tensor,
    z_i: Tensor,
    z_j: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    shift: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    return _fake_gradients(z_i, z_j, shift if temperature_tensor is None else temperature_tensor)


def _setup_nt_xent(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    z_i, z_j, mask, temperature_tensor, *ctx.options, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z_i, z_j, mask, temperature_tensor, *output[-4:])


def _nt_xent_gradients(
    ctx: Any, backward: Any, grad_loss: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 10
    grad_z_i, grad_z_j, grad_temperature = backward(grad_loss, *ctx.saved_tensors, *ctx.options)
    needs = ctx.needs_input_grad
    return (
        grad_z_i if needs[0] else None,
        grad_z_j if needs[1] else None,
        None,
        grad_temperature if needs[3] else None,
        *(None,) * 6,
    )


# x: (M, D), y: (N, D), any strides; the rest as above.
# row_*: (M,), column_*: (N,). max: the largest similarity of a row or column of S = x y^T.
# shift is a similarity, log_sum the log of the sum of exp((s - shift) / tau); lse is their
# shift / tau + log_sum. The backward takes any such pair: of a larger S as well, of which x and y
# are a part. of_x, of_y: which gradients to compute, the other is empty; that of the temperature
# follows from either.
CROSS_LOGSUMEXP = (
    "(Tensor x, Tensor y, Tensor? temperature_tensor, float temperature, "
    "bool use_cosine_similarity, float eps, ScalarType? product_dtype) -> "
    "(Tensor row_lse, Tensor column_lse, Tensor row_max, Tensor column_max, "
    "Tensor row_shift, Tensor row_log_sum, Tensor column_shift, Tensor column_log_sum)"
)
CROSS_LOGSUMEXP_BACKWARD = (
    "(Tensor grad_row_lse, Tensor grad_column_lse, Tensor x, Tensor y, "
    "Tensor? temperature_tensor, Tensor row_shift, Tensor row_log_sum, "
    "Tensor column_shift, Tensor column_log_sum, float temperature, "
    "bool use_cosine_similarity, float eps, ScalarType? product_dtype, bool of_x, bool of_y) -> "
    "(Tensor grad_x, Tensor grad_y, Tensor grad_temperature)"
)


def _fake_cross_logsumexp(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(x.dtype)

    def row() -> Tensor:
        return x.new_empty(x.shape[0], dtype=dtype)

    def column() -> Tensor:
        return x.new_empty(y.shape[0], dtype=dtype)

    return (row(), column(), row(), column(), row(), row(), column(), column())


def _fake_cross_logsumexp_backward(
    grad_row_lse: Tensor,
    grad_column_lse: Tensor,
    x: Tensor,
    y: Tensor,
    temperature_tensor: Tensor | None,
    row_shift: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    of_x, of_y = args[-2:]
    like = row_shift if temperature_tensor is None else temperature_tensor
    return _fake_gradients(x if of_x else x[:0], y if of_y else y[:0], like)


def _setup_cross_logsumexp(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, y, temperature_tensor, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, temperature_tensor, *output[-4:])


def _cross_logsumexp_gradients(
    ctx: Any, backward: Any, grad_row_lse: Tensor | None, grad_column_lse: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    if grad_row_lse is None and grad_column_lse is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    row_shift, column_shift = saved[3], saved[5]
    needs = ctx.needs_input_grad
    grad_x, grad_y, grad_temperature = backward(
        row_shift.new_zeros(row_shift.shape) if grad_row_lse is None else grad_row_lse,
        column_shift.new_zeros(column_shift.shape) if grad_column_lse is None else grad_column_lse,
        *saved,
        *ctx.options,
        *needs[:2],
    )
    return (
        grad_x if needs[0] else None,
        grad_y if needs[1] else None,
        grad_temperature if needs[2] else None,
        *(None,) * 4,
    )


def _fake_gradients(a: Tensor, b: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    return a.new_empty(a.shape), b.new_empty(b.shape), temperature.new_empty(())


# predictions, targets: one (B, N, D) or (B, D) each a level, any strides. masks: none, or one a
# level: (B, N) or (B,) of bool, True keeps the row; without numbers: keeps all.
# normalization: "none", "l2" (both sides) or "layer" (the target). threshold: of smoothl1 (beta)
# and huber (delta).
# loss: () sum of weight x level; unweighted: () mean of the levels; levels: (L,) or, for reduction
# "none", the errors of all elements of all levels, where loss and unweighted are taken from means.
# statistics: (rows of all levels, 2), what each row is normalised by; scales: (L,), what a level's
# sum of errors is multiplied by.
PREDICTION_LOSS = (
    "(Tensor[] predictions, Tensor[] targets, Tensor[] masks, float[] weights, str loss_type, "
    "str normalization, float threshold, float eps, str reduction) -> "
    "(Tensor loss, Tensor unweighted, Tensor levels, Tensor statistics, Tensor scales)"
)
PREDICTION_LOSS_BACKWARD = (
    "(Tensor? grad_loss, Tensor? grad_unweighted, Tensor? grad_levels, Tensor[] predictions, "
    "Tensor[] targets, Tensor[] masks, Tensor statistics, Tensor scales, float[] weights, "
    "str loss_type, str normalization, float threshold, float eps, str reduction, "
    "bool targets_too) -> (Tensor[] grad_predictions, Tensor[] grad_targets)"
)


def _fake_prediction_loss(predictions: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    reduction, levels = args[-1], len(predictions)
    like = predictions[0]
    dtype = accumulation_dtype(like.dtype)
    elements = sum(p.numel() for p in predictions)
    rows = sum(p.numel() // p.shape[-1] for p in predictions)
    shapes: list[tuple[Any, ...]] = [(), (), (levels if reduction != "none" else elements,)]
    shapes += [(rows, 2), (levels,)]
    loss, unweighted, of_levels, statistics, scales = (
        like.new_empty(shape, dtype=dtype) for shape in shapes
    )
    return loss, unweighted, of_levels, statistics, scales


def _fake_prediction_loss_backward(
    grad_loss: Tensor | None,
    grad_unweighted: Tensor | None,
    grad_levels: Tensor | None,
    predictions: list[Tensor],
    targets: list[Tensor],
    *args: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    targets_too = args[-1]
    return (
        [p.new_empty(p.shape) for p in predictions],
        [t.new_empty(t.shape) for t in targets] if targets_too else [],
    )


def _setup_prediction_loss(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    predictions, targets, masks, *ctx.options = inputs
    ctx.levels = len(predictions)
    ctx.masks = len(masks)
    ctx.targets_too = any(t.requires_grad for t in targets)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*predictions, *targets, *masks, *output[3:])


def _prediction_loss_gradients(
    ctx: Any, backward: Any, *upstream: Tensor | None
) -> tuple[Any, ...]:
    levels, none = ctx.levels, [None] * ctx.levels
    rest = ([None] * ctx.masks, *(None,) * 6)
    loss, unweighted, of_levels = upstream[:3]
    if loss is None and unweighted is None and of_levels is None:
        return (none, none, *rest)
    *tensors, statistics, scales = ctx.saved_tensors
    predictions, targets = tensors[:levels], tensors[levels : 2 * levels]
    masks = tensors[2 * levels :]
    grad_predictions, grad_targets = backward(
        loss,
        unweighted,
        None if of_levels is None else of_levels.contiguous(),
        predictions,
        targets,
        masks,
        statistics,
        scales,
        *ctx.options,
        ctx.targets_too,
    )
    return (grad_predictions, grad_targets if ctx.targets_too else none, *rest)


# rows: (B, D) -> (B, tokens, D), the rows as token 0 and zeros elsewhere.
PAD_TOKENS = "(Tensor rows, int tokens) -> Tensor"


def _pad_tokens(rows: Tensor, tokens: int) -> Tensor:
    padded = rows.new_zeros(rows.shape[0], tokens, rows.shape[1])
    padded[:, 0] = rows
    return padded


def _fake_pad_tokens(rows: Tensor, tokens: int) -> Tensor:
    return rows.new_empty(rows.shape[0], tokens, rows.shape[1])


register_plain("pad_tokens", PAD_TOKENS, _pad_tokens, _fake_pad_tokens)
register_plain("copy", "(Tensor x) -> Tensor", Tensor.clone, torch.empty_like)
register(
    Definition(
        name="nt_xent",
        schema=NT_XENT,
        schema_backward=NT_XENT_BACKWARD,
        chunked=(chunked.forward, chunked.backward),
        triton=(triton.nt_xent_forward, triton.nt_xent_backward),
        fake=_fake_nt_xent,
        fake_backward=_fake_nt_xent_backward,
        setup_context=_setup_nt_xent,
        gradients=_nt_xent_gradients,
    )
)
register(
    Definition(
        name="cross_logsumexp",
        schema=CROSS_LOGSUMEXP,
        schema_backward=CROSS_LOGSUMEXP_BACKWARD,
        chunked=(chunked_cross_logsumexp.forward, chunked_cross_logsumexp.backward),
        triton=(triton.cross_logsumexp_forward, triton.cross_logsumexp_backward),
        fake=_fake_cross_logsumexp,
        fake_backward=_fake_cross_logsumexp_backward,
        setup_context=_setup_cross_logsumexp,
        gradients=_cross_logsumexp_gradients,
    )
)
register(
    Definition(
        name="prediction_loss",
        schema=PREDICTION_LOSS,
        schema_backward=PREDICTION_LOSS_BACKWARD,
        chunked=(chunked_prediction_loss.forward, chunked_prediction_loss.backward),
        triton=(triton.prediction_loss_forward, triton.prediction_loss_backward),
        fake=_fake_prediction_loss,
        fake_backward=_fake_prediction_loss_backward,
        setup_context=_setup_prediction_loss,
        gradients=_prediction_loss_gradients,
    )
)
