"""Attributes of modules that hold a float whatever kind of number they are set to."""

from __future__ import annotations

from typing import Any

from torch import nn

from cjepa_kernels.functional.checks import as_float, is_number


def float_attribute(name: str) -> Any:
    """A property that turns each number into a float when it is set.

    torch.compile takes an int attribute for a constant and recompiles for every value, and it takes
    a number of NumPy for an array. Anything else than a number stays as it is, and the next call
    refuses it.

    Args:
        name: Name of the attribute.
    """
    stored = f"_float_{name}"

    def get(module: nn.Module) -> Any:
        return getattr(module, stored)

    def set_value(module: nn.Module, value: Any) -> None:
        setattr(module, stored, as_float(value) if is_number(value) else value)

    return property(get, set_value)
