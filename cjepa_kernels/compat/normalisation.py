"""Unit rows as other projects make them, with ``torch.nn.functional.normalize``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # the default of F.normalize


def normalised(rows: Tensor) -> Tensor:
    """(..., D) rows of norm 1."""
    return F.normalize(rows, dim=-1, eps=EPS)
