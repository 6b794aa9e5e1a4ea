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
# These bounds are for views 10 % apart at temperature 0.05, for which the textbook formula loses
# two to four digits.
ALIGNED_LOSS = 1e-5
ALIGNED_GRADIENT = 1e-5
# Under autocast the operands of the product are rounded to bf16, which has 8 bits of precision, and
# the logits are scaled by 1 / 0.1.
AUTOCAST_LOSS = 5e-3
# Losses and weights of 50 steps of gradient descent with two writings of the same loss. Each step
# repeats the error of a gradient.
TRAINED_50_STEPS = {torch.float64: 1e-11}
EXACT = 0.0


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, divided by the largest expected magnitude unless that is 0."""
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference / (expected.double().abs().max().item() or 1.0)
