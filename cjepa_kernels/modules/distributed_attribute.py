"""The attribute ``distributed`` of modules that work together with other ranks."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from cjepa_kernels.distributed import SharedGroup, resolve_group


def distributed_attribute(doc: str) -> Any:
    """A property that is a bool or a process group, and lets the module be copied and pickled.

    Args:
        doc: Docstring of the property.
    """

    def get(module: nn.Module) -> bool | ProcessGroup:
        value: bool | SharedGroup = vars(module).get("_distributed", False)
        return value.group if isinstance(value, SharedGroup) else value

    def set_value(module: nn.Module, value: bool | ProcessGroup) -> None:
        resolve_group(value)
        vars(module)["_distributed"] = value if isinstance(value, bool) else SharedGroup(value)

    return property(get, set_value, doc=doc)
