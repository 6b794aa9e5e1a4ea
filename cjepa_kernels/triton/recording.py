"""Every launch and every zeroed buffer of this back end passes through here, so it can be recorded.

``plans.py`` makes a launch plan of a recording.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# These allocate memory and compute nothing. Operators that only make a view do not either.
ALLOCATING = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    }
)
MOST_LAUNCHES = 64  # With more, the time of the device hides that of the host.


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        kernel: The kernel as it stands in ``kernels/``.
        programs: Size of the grid.
        arguments: By name, with the options of the compiler.
        compiled: What Triton launched; None in the interpreter.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    compiled: Any


class Recording:
    """The launches of one call of an operator, in order, and the buffers that it filled with zeros.

    It refers to all tensors, so that none of their memory is used twice while it records.

    Attributes:
        launches: The launches.
        allocated: Tensors that the call allocated, by address. Each lives until the plan is made.
        zeroed: Those of them that were filled with zeros before any launch used them.
        refusal: Why the call cannot be repeated by its launches alone; empty if it can.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.allocated: dict[int, Tensor] = {}
        self.zeroed: list[Tensor] = []
        self.refusal = ""

    def add(self, launch: Launch) -> None:
        """Record a launch, or give up and release all tensors if there are too many."""
        if launch.programs == 0:  # Triton launches nothing then.
            return
        if len(self.launches) == MOST_LAUNCHES:
            self.refuse(f"it launches more than {MOST_LAUNCHES} kernels")
        if not self.refusal:
            self.launches.append(launch)

    def refuse(self, reason: str) -> None:
        """Give up."""
        self.refusal = self.refusal or reason
        self.launches.clear()
        self.allocated.clear()
        self.zeroed.clear()


class _OtherWork(TorchDispatchMode):
    """Refuses a recording in which PyTorch computes something, because no launch repeats that."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        if function in ALLOCATING:
            if not self.recording.refusal:
                self.recording.allocated[result.untyped_storage().data_ptr()] = result
        elif not function.is_view:
            self.recording.refuse(f"PyTorch runs {function} in it")
        return result


_current = threading.local()


@contextmanager
def record() -> Iterator[Recording]:
    """Record what the current thread launches in the context. The launches happen all the same."""
    if getattr(_current, "recording", None) is not None:
        raise RuntimeError("this thread already records its launches")
    recording = _current.recording = Recording()
    try:
        with _OtherWork(recording):
            yield recording
    except BaseException as error:
        recording.refuse(f"it failed: {error}")  # Its tensors do not outlive the failure.
        raise
    finally:
        _current.recording = None


def run_kernel(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launch a kernel on the current stream.

    Args:
        kernel: A kernel of ``kernels/``.
        programs: Size of the grid.
        **arguments: All arguments of the kernel and options of the compiler.
    """
    recording = getattr(_current, "recording", None)
    if recording is None:
        kernel[(programs,)](**arguments)
        return
    with _disable_current_modes():  # Triton's interpreter runs operators of PyTorch.
        compiled = kernel[(programs,)](**arguments)
    recording.add(Launch(kernel, programs, arguments, compiled))


def new_zeros(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the device of a tensor, for a kernel that adds to them or counts with them."""
    recording = getattr(_current, "recording", None)
    if recording is None:
        return like.new_zeros(shape, dtype=dtype)
    with _disable_current_modes():
        zeros = like.new_zeros(shape, dtype=dtype)
    if not recording.refusal:
        recording.allocated[zeros.untyped_storage().data_ptr()] = zeros
        recording.zeroed.append(zeros)
    return zeros


# By address. They are few and small: the schedules of kernels/hopper.py.
_permanent: dict[int, Tensor] = {}


def keep_forever(x: Tensor) -> Tensor:
    """Keep a tensor at its address until the process ends, so that plans may hold the address."""
    _permanent[x.untyped_storage().data_ptr()] = x
    return x


def is_permanent(x: Tensor) -> bool:
    """Whether :func:`keep_forever` keeps the memory of a tensor."""
    return x.untyped_storage().data_ptr() in _permanent
