"""Every numerical tolerance of the test suite.

The rule: error against the float64 reference <= 2 x the error of same-dtype eager PyTorch + floor.
Errors are relative to the largest absolute value of the float64 result. The floors sit above the
worst error measured over the suite, given in the comments.
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
# Metrics are means of similarities in [-1, 1] (cosine) and are compared absolutely.
METRIC = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}
# Views 10 % apart at temperature 0.05: the textbook form loses two to four digits here.
ALIGNED_LOSS = 1e-5
ALIGNED_GRADIENT = 1e-5
# bf16 product under autocast: operands rounded to 8 bits of mantissa, logits scaled by 1 / 0.1.
AUTOCAST_LOSS = 5e-3
EXACT = 0.0


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude (1 if the latter is 0)."""
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference / (expected.double().abs().max().item() or 1.0)
