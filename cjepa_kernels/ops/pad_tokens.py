"""The operator ``pad_tokens``, the gradient of CLS tokens: (B, D) -> (B, tokens, D)."""

from __future__ import annotations

from torch import Tensor

SCHEMA = "(Tensor rows, int tokens) -> Tensor"


def pad_tokens(rows: Tensor, tokens: int) -> Tensor:
    """The rows as token 0, and zeros as all other tokens.

    Args:
        rows: (B, D).
        tokens: Number of tokens of the result.

    Returns:
        (B, tokens, D).
    """
    padded = rows.new_zeros(rows.shape[0], tokens, rows.shape[1])
    padded[:, 0] = rows
    return padded


def fake(rows: Tensor, tokens: int) -> Tensor:
    """The result without its values."""
    return rows.new_empty(rows.shape[0], tokens, rows.shape[1])
