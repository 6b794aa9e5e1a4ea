"""Decisions of a call: which overload of an operator, in which dtypes, and what it saves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cjepa_kernels.backends import Backend, check_device, warn_without_native
from cjepa_kernels.environment import check_switch_when_imported, read_when_imported
from cjepa_kernels.ops import registry
from cjepa_kernels.triton.proved import SWITCHES

# torch.amp.is_autocast_available says so too, but PyTorch 2.11 cannot compile a function that calls
# it.
WITHOUT_AUTOCAST = ("meta",)
SAVED_BYTES = int(read_when_imported("CJEPA_KEPT_MIB") * 2**20)
for _variable in ("CJEPA_CACHE_MIB", "CJEPA_WORKSPACE_MIB"):  # kernels read them, much later
    read_when_imported(_variable)
for _variable in SWITCHES.values():
    check_switch_when_imported(_variable)


def choose_overload(backend: Backend, device: torch.device) -> str:
    """The overload of the operators that runs a back end on a device.

    ``backend="auto"`` leaves the choice to the dispatcher, except on a CPU without the compiled
    kernels: a module of an early revision registers its kernels when it is imported, for schemas
    that may differ.

    Args:
        backend: A checked name.
        device: Device of the features.

    Returns:
        An empty string for the dispatcher's choice, or ``.<back end>``.

    Raises:
        ValueError: A back end that was asked for by name and does not serve this device.
    """
    dispatched = registry.dispatched.get(device.type)
    if backend == "auto":
        if dispatched is None and device.type == "cpu":
            warn_without_native()
            return ".chunked"
        return ""
    check_device(backend, device.type)
    if backend == dispatched or backend in registry.only_dispatched:
        return ""
    return f".{backend}"


def rounds_to_tf32(overload: str, x: Tensor) -> bool:
    """Whether an overload of the operators rounds operands like ``x`` to tf32."""
    rounds = registry.rounds_to_tf32.get(registry.backend_of(overload, x.device.type))
    return rounds is not None and rounds(x)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, on a device that has it."""
    if device.type in WITHOUT_AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def product_dtype(z: Tensor) -> torch.dtype | None:
    """The dtype to which autocast rounds the operands of a product; None without autocast."""
    device_type = z.device.type
    if z.dtype == torch.float64 or device_type in WITHOUT_AUTOCAST:
        return None
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def saves_for_backward(fits: Callable[[int], bool], *tensors: Tensor | None) -> bool:
    """Whether a forward saves what its back end can for the backward.

    It does so for a call that has a backward, and within a budget of memory.

    Args:
        fits: Whether the forward can save something in at most so many bytes. It is called for
            calls that have a backward.
        *tensors: The inputs that may require a gradient.
    """
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_exporting():  # the size would tie the exported program to this batch
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return fits(SAVED_BYTES)
    return False
