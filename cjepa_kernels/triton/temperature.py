"""The temperature of a call, and what its number decides. This module does not import Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cjepa_kernels.definitions import LARGEST, SMALLEST

LARGEST_EXPONENT = 111  # of 2 in fp32, which leaves room for sums and for the scale of the weights
LARGEST_LOGITS = 2.05  # tau times the largest exponent in base e, with a constant shift


@dataclass(frozen=True)
class Temperature:
    """A number, or a tensor on the device that the host must not read.

    Attributes:
        number: The temperature, unless ``tensor`` holds it.
        tensor: () on the device, or None.
    """

    number: float
    tensor: Tensor | None

    @property
    def argument(self) -> Tensor | float:
        """The argument of a kernel: the pointer or the number."""
        return self.number if self.tensor is None else self.tensor

    @property
    def is_tensor(self) -> bool:
        """Whether that argument is a pointer."""
        return self.tensor is not None

    def constant_shift(self, cosine: bool) -> bool:
        """Whether all exponents may be relative to 1 / tau instead of a row's maximum.

        They may if |s| <= 1.02 (rounded cosines) and fp32 holds the exponentials. The host does not
        know the number of a tensor, so that case uses running maxima, which serve every number.
        """
        exponent = LARGEST_LOGITS * math.log2(math.e) / self.number
        return self.tensor is None and cosine and exponent < LARGEST_EXPONENT


def lowest_constant_temperature() -> float:
    """The lowest number with which all exponents may be relative to 1 / tau, for cosines."""
    low, high = SMALLEST, LARGEST
    while math.nextafter(low, high) < high:
        middle = math.sqrt(low) * math.sqrt(high)
        if (
            not low < middle < high
        ):  # The geometric mean of two close numbers rounds to one of them.
            middle = (low + high) / 2
        if Temperature(middle, None).constant_shift(cosine=True):
            high = middle
        else:
            low = middle
    return high
