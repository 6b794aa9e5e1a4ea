"""Which back ends this installation has, and why it lacks the others."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Literal, get_args

import torch
import torch.distributed as dist

from cjepa_kernels.environment import check_environment, note_problem

Backend = Literal["auto", "reference", "chunked", "native", "triton"]
NAMES: tuple[str, ...] = get_args(Backend)
_NOT_THE_CALLER = tuple(os.path.dirname(str(path)) + os.sep for path in (__file__, torch.__file__))
SCHEMA_VERSION = 4  # of the operators' schemas in ops.py; the compiled module carries its own


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
    except ModuleNotFoundError:
        return None, (
            "cjepa_kernels._C is not built: reinstall with a C++20 compiler and "
            "pip install --no-build-isolation"
        )
    except ImportError as error:  # the module is there
        return None, f"cjepa_kernels._C cannot be loaded ({error}): reinstall with this PyTorch"
    try:
        info = module.build_info()
    except RuntimeError as error:  # CJEPA_INSTRUCTION_SET names one that this CPU lacks
        note_problem(str(error))
        return None, str(error)
    if info.get("schema") != SCHEMA_VERSION:
        return None, (
            f"cjepa_kernels._C was built for another revision (its operators are of version "
            f"{info.get('schema')}, here they are of version {SCHEMA_VERSION}): reinstall with "
            "pip install --no-build-isolation"
        )
    return module, f"compiled tile kernels, {info['instruction_set']}"


OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)


def _find_triton_package() -> tuple[bool, str]:
    """Whether Triton's kernels can be defined, and its version or what is wrong with it."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed: pip install triton>=3.6"
    if torch.version.hip is not None:
        return False, "the Triton kernels are made for NVIDIA GPUs, this PyTorch is built for ROCm"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # it goes by other names, too
        version = str(importlib.import_module("triton").__version__)
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        return False, f"Triton {version} is older than 3.6"
    return True, version


def _find_triton() -> BackendStatus:
    found, version = _find_triton_package()
    if not found:
        return BackendStatus(False, ("cuda",), version)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return BackendStatus(True, ("cpu", "cuda"), "Triton kernels in Triton's interpreter: slow")
    if not torch.cuda.is_available():
        reason = "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors)"
        return BackendStatus(False, ("cuda",), reason)
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < OLDEST_CAPABILITY:
        reason = f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"
        return BackendStatus(False, ("cuda",), reason)
    return BackendStatus(True, ("cuda",), f"Triton kernels, Triton {version}")


_compiled, _NATIVE_REASON = _find_compiled()
if _compiled is not None:
    _compiled.register_operators()
HAS_NATIVE = _compiled is not None
# Asks nothing of a device: a process that forks must not have touched one.
HAS_TRITON = _find_triton_package()[0]


@lru_cache(maxsize=1)  # nothing in it changes while the process runs
def _find_backends() -> dict[str, BackendStatus]:
    return {
        "triton": _find_triton(),
        "native": BackendStatus(HAS_NATIVE, ("cpu",), _NATIVE_REASON),
        "chunked": BackendStatus(True, ("any",), "pure PyTorch, O(chunk * M) memory"),
        "reference": BackendStatus(
            True, ("any",), "eager autograd, O(M^2) memory; on request only, double backward"
        ),
    }


def backends() -> dict[str, BackendStatus]:
    """Back ends by name, in the order in which ``backend="auto"`` prefers them.

    Returns:
        ``{"triton": …, "native": …, "chunked": …, "reference": …}``.

    Example:
        >>> from cjepa_kernels import backends
        >>> backends()["chunked"].available
        True
    """
    return dict(_find_backends())


_warned = False


def warn_without_native() -> None:
    """Say once that ``backend="auto"`` does without the compiled kernels, and how to get them.

    Silent for ``CJEPA_NO_NATIVE=1``, the choice of an installation without them, and in all ranks
    of a process group but the first.
    """
    global _warned
    if _warned or os.environ.get("CJEPA_NO_NATIVE", "0") not in ("", "0"):
        return
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    _warned = True
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_CALLER):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f'backend="auto" takes the slower back end "chunked" on the CPU: {_NATIVE_REASON}. '
        'backend="chunked", or CJEPA_NO_NATIVE=1 in the environment, silences this warning',
        UserWarning,
        stacklevel=level,  # the caller's line, not one of ours
    )


# torch.compile runs the function while it traces, and breaks no graph at the warning. This is what
# torch.compiler.assume_constant_result does, after importing the whole compiler.
warn_without_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_backend(backend: str) -> None:
    """Raise unless ``backend`` is a known name that is available here.

    Raises:
        ValueError: Unknown name, or a variable of the environment with a value that it cannot have.
        RuntimeError: Known, asked for by name, and missing on this machine.
    """
    check_environment()
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {list(NAMES)}, got {backend!r}")
    # Without a look at the table where it needs none: PyTorch 2.11 would trace how it is made.
    if backend in ("auto", "chunked", "reference"):
        return
    status = _find_backends()[backend]
    if not status.available:
        raise RuntimeError(
            f'backend "{backend}" was asked for and is not available: {status.reason}; '
            'backend="auto" takes the best one there is'
        )
