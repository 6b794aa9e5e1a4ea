"""Every numerical tolerance of the test suite.

The rule compares errors against the float64 reference:

    error <= 2 x error of eager PyTorch in the same dtype + floor

Errors are relative to the largest absolute value of the float64 result. The floors lie above the
worst errors measured over the suite.
"""

import torch

FLOOR_VALUE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}
FLOOR_GRADIENT = {
    torch.float64: 1e-11,
    torch.float32: 4e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 2e-3,
}
# Metrics are means of cosine similarities, which lie in [-1, 1]. Their errors are absolute.
METRIC = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}
# Shares of anchors. In half precision the rounding of the rows may decide a close race.
ACCURACY = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 0.1,
    torch.float16: 0.1,
}
# These bounds are for views 10 % apart at temperature 0.05, for which the textbook formula loses
# two to four digits.
ALIGNED_LOSS = 1e-5
ALIGNED_GRADIENT = 1e-5
# Under autocast the operands of the product are rounded to bf16, which has 8 bits of precision, and
# the logits are scaled by 1 / 0.1.
AUTOCAST_LOSS = 5e-3
# The loss of aligned pairs is exp((s_negative - s_positive) / temperature), and keeps the digits of
# the difference of the similarities s. These are the roundings of a similarity by which the loss
# and its gradient may be off. The largest of 8 seeds are 3.4 and 13.5.
ALIGNED_ROUNDINGS_OF_LOSS = 4
ALIGNED_ROUNDINGS_OF_GRADIENT = 16
UNDERFLOW = 1e-37  # Numbers of this size are sums of numbers that fp32 rounds to 0.
# Losses and weights of 50 steps of gradient descent with two writings of the same loss. Each step
# repeats the error of a gradient.
TRAINED_50_STEPS = {torch.float64: 1e-11}
EXACT = 0.0


def aligned_tolerance(roundings: int, dtype: torch.dtype, temperature: float) -> float:
    """The relative error of a loss or gradient of aligned pairs from roundings of similarities."""
    return roundings * torch.finfo(dtype).eps / temperature


def temperature_rounding(
    lse: torch.Tensor, temperature: float, upstream: float, dtype: torch.dtype
) -> float:
    """One rounding of the terms of a temperature's gradient, which nearly cancel.

    Eager PyTorch may be exact by luck in one number, so its error alone does not bound ours.

    Args:
        lse: Log-sum-exps of the anchors, which bound the logits.
        temperature: The temperature.
        upstream: Sum of the gradients of the anchors' losses.
        dtype: Dtype of the inputs.
    """
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    largest = lse[lse.isfinite()].abs().max().item()
    return torch.finfo(accumulated).eps * upstream * largest / temperature


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, divided by the largest expected magnitude unless that is 0."""
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference / (expected.double().abs().max().item() or 1.0)
