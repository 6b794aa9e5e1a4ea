"""How the operands of the products are held. This module does not import Triton.

These are functions because torch.compile traces them for the size of what a forward saves.
"""

from __future__ import annotations

import torch

from cjepa_kernels.triton import allows_tf32

PLANES = 3  # bf16 numbers that together hold the 24 bits of an fp32 number


def rounded_dtype(dtype: torch.dtype, product_dtype: torch.dtype | None) -> torch.dtype:
    """dtype to which the operands are rounded; ``product_dtype`` as the operators take it."""
    return product_dtype or dtype


def planes_of(rounded: torch.dtype) -> int:
    """Numbers that hold one operand: 3 for fp32 as sums of three bf16 numbers, else 1."""
    return PLANES if rounded == torch.float32 and not allows_tf32() else 1


def stored_dtype(rounded: torch.dtype, planes: int) -> torch.dtype:
    """dtype of these numbers."""
    return torch.bfloat16 if planes > 1 else rounded


def depth_block(rounded: torch.dtype, planes: int, features: int) -> int:
    """Features that one step of the product takes. Packed rows have a multiple of it."""
    widest = 32 if planes == 1 and rounded == torch.float32 else 64
    if features <= 16:
        return 16
    return 32 if features <= 32 else widest


def round_up(x: int, multiple: int) -> int:
    """The next multiple of ``multiple``, or x if it is one."""
    return (x + multiple - 1) // multiple * multiple
