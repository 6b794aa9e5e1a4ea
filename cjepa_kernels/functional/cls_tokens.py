"""CLS tokens of features, with a gradient that needs no dense temporary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import ops


def cls_tokens(features: Tensor) -> Tensor:
    """The rows of the CLS token, a view ``features[:, 0]`` whose gradient costs less.

    The gradient of the features is as large as the features, and zero outside of these rows. On the
    CPU it takes memory that the system fills with zeros only where it is touched, so the one
    remaining cost is to add the gradient of the features' other uses. Autograd refuses a change of
    the rows in place.

    Args:
        features: (B, N+1, D), CLS at index 0.

    Returns:
        (B, D).
    """
    needs_gradient = features.requires_grad and torch.is_grad_enabled()
    if not needs_gradient or torch.compiler.is_compiling() or ops.is_transformed():
        return features[:, 0]
    return _ClsTokens.apply(features)  # type: ignore[no-any-return,no-untyped-call]


class _ClsTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.tokens = features.shape[1]
        return features[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # the gradient may be differentiated once more
            zeros = grad.new_zeros(grad.shape[0], ctx.tokens, grad.shape[1])
            return zeros.select_scatter(grad, 1, 0)
        if ctx.tokens == 1:
            return grad[:, None]
        return ops.operator("pad_tokens")(grad, ctx.tokens)  # type: ignore[no-any-return]
