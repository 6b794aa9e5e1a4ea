"""The arguments of a loss as ``print`` shows them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def shown(module: nn.Module, *names: str) -> str:
    """``name=value`` of attributes of a module, as ``extra_repr`` returns them."""
    return ", ".join(f"{name}={_text(getattr(module, name))}" for name in names)


def _text(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        return f"{value.item():.6g}"
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return str(getattr(value, "__name__", value))
