"""Losses of anchors from the log-sum-exp over negatives and the similarity of the positive."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gap(
    lse: Tensor, positive: Tensor, shift: Tensor, log_sum: Tensor, tau: float | Tensor
) -> Tensor:
    """LSE- - s / tau of each anchor, exact at low temperature too.

    LSE- and s / tau are of the size of 1 / tau, and so is the rounding of their difference. The
    value is therefore that of (shift - s) / tau + log_sum, in which nothing large is rounded, and
    the gradient is that of the difference.

    Args:
        lse: (M,) LSE- with a gradient.
        positive: (M,) similarity s with a gradient.
        shift: (M,) with ``log_sum`` the parts of LSE-, as the operators return them.
        log_sum: (M,); -inf for an anchor without negatives, whose result is -inf.
        tau: Temperature, a number or 0-dim.

    Returns:
        (M,)
    """
    difference = lse - positive / tau
    with torch.no_grad():
        exact = (shift - positive) / tau + log_sum
        correction = (exact - difference).masked_fill(log_sum == -torch.inf, 0.0)
    return difference + correction


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); ``F.softplus`` is x itself from 20 on, which fp64 can tell apart."""
    return -F.logsigmoid(-x)
