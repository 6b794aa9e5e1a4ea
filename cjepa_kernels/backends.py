"""Which back ends this installation has, and why it lacks the others."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal

import torch
import torch.distributed as dist

from cjepa_kernels.environment import check_environment, note_problem

Backend = Literal["auto", "reference", "chunked", "native", "triton"]
# Version of the operators' schemas in ops/. The compiled module carries its own.
SCHEMA_VERSION = 7
# A warning names the first caller outside of these folders.
_OWN_FOLDERS = tuple(os.path.dirname(str(path)) + os.sep for path in (__file__, torch.__file__))


@dataclass(frozen=True)
class BackendStatus:
    """Whether a back end can be used here.

    Attributes:
        available: Whether ``backend=name`` works on this machine.
        devices: Device types it serves; ``("any",)`` for all of them.
        reason: A short description, or why the back end is missing and how to get it.
    """

    available: bool
    devices: tuple[str, ...]
    reason: str


def compiled_module() -> ModuleType | None:
    """The compiled module ``cjepa_kernels._C``; None if it is missing or of another revision."""
    return _find_compiled()[0]


def _find_compiled() -> tuple[ModuleType | None, str]:
    """The compiled module if it fits these operators, and its description or what is wrong."""
    try:
        module = importlib.import_module("cjepa_kernels._C")
    except ModuleNotFoundError:
        return None, (
            "cjepa_kernels._C is not built: reinstall with a C++20 compiler and "
            "pip install --no-build-isolation"
        )
    except ImportError as error:  # the module exists, but does not load
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


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _find_triton_package() -> tuple[bool, str]:
    """Whether the Triton kernels can be defined, and Triton's version or what is wrong."""
    if importlib.util.find_spec("triton") is None:
        return False, f"Triton is not installed: pip install 'triton>={_dotted(OLDEST_TRITON)}'"
    if torch.version.hip is not None:
        return False, "the Triton kernels are made for NVIDIA GPUs, this PyTorch is built for ROCm"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # some distributions have another name
        version = str(importlib.import_module("triton").__version__)
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        return False, f"Triton {version} is older than {_dotted(OLDEST_TRITON)}"
    return True, version


def triton_minor() -> str:
    """The minor version of Triton, such as "3.6"; blank where Triton cannot be used."""
    usable, version = _find_triton_package()
    return ".".join(version.split(".")[:2]) if usable else ""


def triton_is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _find_triton() -> BackendStatus:
    """Whether the Triton kernels can run here."""
    usable, version = _find_triton_package()
    if not usable:
        return BackendStatus(False, ("cuda",), version)
    if triton_is_interpreted():
        return BackendStatus(True, ("cpu", "cuda"), "Triton kernels in Triton's interpreter: slow")
    if not torch.cuda.is_available():
        reason = "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors)"
        return BackendStatus(False, ("cuda",), reason)
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < OLDEST_CAPABILITY:
        needed = _dotted(OLDEST_CAPABILITY)
        reason = f"the GPU has compute capability {major}.{minor}, the kernels need {needed}"
        return BackendStatus(False, ("cuda",), reason)
    return BackendStatus(True, ("cuda",), f"Triton kernels, Triton {version}; fp64 runs in chunked")


_compiled, _NATIVE_REASON = _find_compiled()
if _compiled is not None:
    _compiled.register_operators()
HAS_NATIVE = _compiled is not None
# This does not touch a device, because a process that has touched one cannot be forked.
HAS_TRITON = _find_triton_package()[0]


# How to find out whether a back end can be used here, in the order in which "auto" prefers them.
_FINDERS: dict[str, Callable[[], BackendStatus]] = {
    "triton": _find_triton,
    "native": lambda: BackendStatus(HAS_NATIVE, ("cpu",), _NATIVE_REASON),
    "chunked": lambda: BackendStatus(True, ("any",), "pure PyTorch, O(chunk * M) memory"),
    "reference": lambda: BackendStatus(
        True, ("any",), "eager autograd, O(M^2) memory; on request only, double backward"
    ),
}


_statuses: dict[str, BackendStatus] = {}  # those found so far; they do not change


def _find(name: str) -> BackendStatus:
    if name not in _statuses:
        _statuses[name] = _FINDERS[name]()
    return _statuses[name]


def _why_missing(name: str) -> str | None:
    """The reason why a back end is missing, None if it is available."""
    status = _find(name)
    return None if status.available else status.reason


# With this mark torch.compile calls the function while it traces, and does not trace it.
# torch.compiler.assume_constant_result sets it too, but imports the whole compiler.
_why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _devices(name: str) -> tuple[str, ...]:
    """The types of device that a back end serves."""
    return _find(name).devices


_devices._dynamo_marked_constant = True  # type: ignore[attr-defined]


def names() -> tuple[str, ...]:
    """The values that ``backend=`` takes."""
    return ("auto", *reversed(_FINDERS))


def add_backend(name: str, find: Callable[[], BackendStatus]) -> None:
    """Make a back end known, so that ``backend=name`` is accepted.

    ``ops.register_backend`` registers its implementations.

    Args:
        name: Name of the back end.
        find: Says whether the back end can be used here; it is called once, when first needed.
    """
    _FINDERS[name] = find


def remove_backend(name: str) -> None:
    """Forget a back end that ``add_backend`` made known."""
    del _FINDERS[name]
    _statuses.pop(name, None)


_notes: dict[str, Callable[[], str]] = {}


def add_note(name: str, note: Callable[[], str]) -> None:
    """Have ``backends()`` say more about a back end where it is available.

    Args:
        name: Name of the back end.
        note: Gives the text that is added to the reason, or an empty string.
    """
    _notes[name] = note


def _with_note(name: str, status: BackendStatus) -> BackendStatus:
    note = _notes[name]() if status.available and name in _notes else ""
    return replace(status, reason=f"{status.reason}; {note}") if note else status


def backends() -> dict[str, BackendStatus]:
    """Back ends by name, in the order in which ``backend="auto"`` prefers them.

    Returns:
        ``{"triton": …, "native": …, "chunked": …, "reference": …}``.

    Example:
        >>> from cjepa_kernels import backends
        >>> backends()["chunked"].available
        True
    """
    return {name: _with_note(name, _find(name)) for name in _FINDERS}


_warned = False


def warn_without_native() -> None:
    """Warn once that ``backend="auto"`` runs without the compiled kernels, and say how to get them.

    There is no warning with ``CJEPA_NO_NATIVE=1``, which an installation without the kernels
    chooses, and in a process group only the first rank warns.
    """
    global _warned
    if _warned or os.environ.get("CJEPA_NO_NATIVE", "0") not in ("", "0"):
        return
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    _warned = True
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN_FOLDERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f'backend="auto" takes the slower back end "chunked" on the CPU: {_NATIVE_REASON}. '
        'backend="chunked", or CJEPA_NO_NATIVE=1 in the environment, silences this warning',
        UserWarning,
        stacklevel=level,  # the line of the user's call
    )


# As for _why_missing. The warning then breaks no graph.
warn_without_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_backend(backend: str) -> None:
    """Raise unless ``backend`` is a known name that is available here.

    Raises:
        ValueError: An unknown name, or an environment variable with a bad value.
        RuntimeError: A known back end that is missing on this machine.
    """
    check_environment()
    if backend == "auto":
        return
    if backend not in names():
        raise ValueError(f"backend must be one of {list(names())}, got {backend!r}")
    reason = _why_missing(backend)
    if reason is not None:
        raise RuntimeError(
            f'backend "{backend}" was asked for and is not available: {reason}; '
            'backend="auto" takes the best one there is'
        )


def check_device(backend: str, device_type: str) -> None:
    """Raise unless a back end serves a type of device. Tensors on "meta" hold nothing to compute.

    Args:
        backend: A name that ``check_backend`` accepted, not ``auto``.
        device_type: For example ``"cuda"``.

    Raises:
        ValueError: The back end serves other devices.
    """
    if device_type == "meta":
        return
    devices = _devices(backend)
    if "any" not in devices and device_type not in devices:
        raise ValueError(
            f'backend="{backend}" serves tensors on {" and ".join(devices)}, '
            f'got tensors on {device_type}; backend="auto" takes the best one there is'
        )
