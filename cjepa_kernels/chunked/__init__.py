"""The operators in pure PyTorch, with temporaries of a bounded size, for every device."""

from collections.abc import Callable
from typing import Any

from cjepa_kernels.chunked import (
    class_similarity,
    cross_logsumexp,
    nt_xent,
    prediction_loss,
    rows,
    self_logsumexp,
)

# For each operator its implementation and that of its backward.
OPERATORS: dict[str, tuple[Callable[..., tuple[Any, ...]], Callable[..., tuple[Any, ...]]]] = {
    "nt_xent": (nt_xent.forward, nt_xent.backward),
    "cross_logsumexp": (cross_logsumexp.forward, cross_logsumexp.backward),
    "self_logsumexp": (self_logsumexp.forward, self_logsumexp.backward),
    "class_similarity": (class_similarity.forward, class_similarity.backward),
    "prediction_loss": (prediction_loss.forward, prediction_loss.backward),
}

__all__ = [
    "OPERATORS",
    "class_similarity",
    "cross_logsumexp",
    "nt_xent",
    "prediction_loss",
    "rows",
    "self_logsumexp",
]
