"""Which back ends this installation has, and why it lacks the others."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import torch

Backend = Literal["auto", "reference", "chunked", "native", "triton"]
NAMES: tuple[str, ...] = get_args(Backend)
SCHEMA_VERSION = 2  # of the operators' schemas in ops.py; the compiled module carries its own


@dataclass(frozen=True)
class BackendStatus:
    """Whether a back end can be used here.

    Attributes:
        available: Whether ``backend=name`` works on this machine.
        devices: Device types it serves; ``("any",)`` for all of them.
        reason: What it is, or why it is missing and how to get it.
    """

    available: bool
    devices: tuple[str, ...]
    reason: str


def compiled_module() -> ModuleType | None:
    """The compiled module ``cjepa_kernels._C``; None if it is missing or of another revision."""
    return _find_compiled()[0]


def _find_compiled() -> tuple[ModuleType | None, str]:
    """The module, if there is one for these operators, and what to say of it."""
    try:
        module = importlib.import_module("cjepa_kernels._C")
    except ImportError:
        return None, (
            "cjepa_kernels._C is not built: reinstall with a C++20 compiler and "
            "pip install --no-build-isolation"
        )
    info = module.build_info()
    if info.get("schema") != SCHEMA_VERSION:
        return None, (
            f"cjepa_kernels._C was built for another revision (its operators are of version "
            f"{info.get('schema')}, here they are of version {SCHEMA_VERSION}): reinstall with "
            "pip install --no-build-isolation"
        )
    return module, f"compiled tile kernels, {info['instruction_set']}"


def _find_triton() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, ("cuda",), "Triton is not installed: pip install triton>=3.6")
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 6):
        return BackendStatus(False, ("cuda",), f"Triton {version} is older than 3.6")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return BackendStatus(True, ("cpu", "cuda"), "Triton kernels in Triton's interpreter: slow")
    if not torch.cuda.is_available():
        reason = "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors)"
        return BackendStatus(False, ("cuda",), reason)
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        reason = f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"
        return BackendStatus(False, ("cuda",), reason)
    return BackendStatus(True, ("cuda",), f"Triton kernels, Triton {version}")


def _find_backends() -> dict[str, BackendStatus]:
    module, native = _find_compiled()
    if module is not None:
        module.register_operators()
    return {
        "triton": _find_triton(),
        "native": BackendStatus(module is not None, ("cpu",), native),
        "chunked": BackendStatus(True, ("any",), "pure PyTorch, O(chunk * M) memory"),
        "reference": BackendStatus(
            True, ("any",), "eager autograd, O(M^2) memory; on request only, double backward"
        ),
    }


_STATUS = _find_backends()  # once: nothing in it changes while the process runs


def backends() -> dict[str, BackendStatus]:
    """Back ends by name, in the order in which ``backend="auto"`` prefers them.

    Returns:
        ``{"triton": …, "native": …, "chunked": …, "reference": …}``.

    Example:
        >>> from cjepa_kernels import backends
        >>> backends()["chunked"].available
        True
    """
    return dict(_STATUS)


def check_backend(backend: str) -> None:
    """Raise unless ``backend`` is a known name that is available here.

    Raises:
        ValueError: Unknown name.
        RuntimeError: Known, asked for by name, and missing on this machine.
    """
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {list(NAMES)}, got {backend!r}")
    if backend == "auto":
        return
    status = _STATUS[backend]
    if not status.available:
        raise RuntimeError(
            f'backend "{backend}" was asked for and is not available: {status.reason}; '
            'backend="auto" takes the best one there is'
        )
