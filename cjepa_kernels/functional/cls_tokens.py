"""CLS tokens of features, and their gradient without a dense temporary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import ops
from cjepa_kernels.registration import is_transformed


def cls_tokens(features: Tensor) -> Tensor:
    """The rows of the CLS token, a view: ``features[:, 0]``, with a cheaper gradient.

    The gradient of the features is as large as they are and all zeros but for these rows. On the
    CPU it is memory that the system fills with zeros only where it is touched; adding the gradient
    of the features' other uses to it is all that is left to do. Autograd refuses to have the rows
    changed in place.

    Args:
        features: (B, N+1, D), CLS at index 0.

    Returns:
        (B, D).
    """
    needs_gradient = features.requires_grad and torch.is_grad_enabled()
    if not needs_gradient or torch.compiler.is_compiling() or is_transformed():
        return features[:, 0]
    return _ClsTokens.apply(features)  # type: ignore[no-any-return,no-untyped-call]


class _ClsTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.tokens = features.shape[1]
        return features[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # it may be differentiated once more
            zeros = grad.new_zeros(grad.shape[0], ctx.tokens, grad.shape[1])
            return zeros.select_scatter(grad, 1, 0)
        if ctx.tokens == 1:
            return grad[:, None]
        return ops.operator("pad_tokens")(grad, ctx.tokens)  # type: ignore[no-any-return]
