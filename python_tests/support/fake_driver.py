"""A CUDA driver without a GPU: launches run a kernel in Triton's interpreter, at raw addresses.

csrc/tests/fake_cuda.cpp is the driver. A launch plan hands it the parameters of a kernel as bytes,
and this module turns the bytes back into the arguments of the kernel.
"""

from __future__ import annotations

import ctypes
import inspect
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from repository import ROOT
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cjepa_kernels.triton.plans import Machine
from cjepa_kernels.triton.recording import Launch

CONTEXT = 0x51  # any address that is not null
THREADS, SHARED_BYTES = 128, 1024
SOURCE = ROOT / "csrc/tests/fake_cuda.cpp"
SIZES = {"i32": 4, "i64": 8, "fp32": 4}
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
_Run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))


class _LastLaunch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


def bytes_at(address: int, size: int) -> Tensor:
    """A tensor over memory that is already there."""
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)


class FakeDriver:
    """The library, and how each kernel was described to a plan.

    Attributes:
        path: The library.
        launches: Names of the kernels that plans have launched.
        errors: Exceptions of kernels, which a launch turns into an error code.
        parameter_bytes: Added to the size of each kernel's first parameter, to plant a fault.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "libfake_cuda.so"
        assert COMPILER is not None
        subprocess.run(
            [COMPILER, "-std=c++20", "-shared", "-fPIC", "-o", self.path, SOURCE],
            check=True,
        )
        self.library = ctypes.CDLL(str(self.path))
        self.library.fake_new_kernel.restype = ctypes.c_void_p
        self.library.fake_set_context.argtypes = [ctypes.c_void_p]
        self.library.fake_set_context(CONTEXT)
        self.launches: list[str] = []
        self.errors: list[BaseException] = []
        self.parameter_bytes = 0
        self._keep: list[Any] = []

    def describe(self, launch: Launch) -> Machine:
        """What Triton would say of the compiled kernel, if it had compiled it."""
        annotations = {
            name: str(parameter.annotation)
            for name, parameter in inspect.signature(launch.kernel.fn).parameters.items()
        }
        signature, maps = {}, []
        for name, annotation in annotations.items():
            value = launch.arguments[name]
            if "constexpr" in annotation:
                signature[name] = "constexpr"
            elif isinstance(value, TensorDescriptor):
                signature[name] = "tensordesc"
                size = value.base.element_size()
                maps.append(
                    {
                        "elem_type": 0,
                        "swizzle": 3,
                        "elem_size": size,
                        "block_size": list(value.block_shape),
                        "fp4_padded": False,
                    }
                )
            elif isinstance(value, Tensor):
                signature[name] = f"*{value.dtype}"
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        return Machine(
            function=self._new_kernel(launch, signature),
            threads=THREADS,
            shared_bytes=SHARED_BYTES,
            signature=signature,
            tensor_maps=maps,
        )

    def _new_kernel(self, launch: Launch, signature: dict[str, str]) -> int:
        kernel = launch.kernel
        # Only what is compiled into a kernel is taken from the recorded call.
        constants = {
            name: value
            for name, value in launch.arguments.items()
            if signature.get(name, "constexpr") == "constexpr"
        }
        dtypes = {
            name: (value.base if isinstance(value, TensorDescriptor) else value).dtype
            for name, value in launch.arguments.items()
            if isinstance(value, (Tensor, TensorDescriptor))
        }
        sizes: list[int] = []
        positions: dict[str, int] = {}
        for name, kind in signature.items():
            positions[name] = len(sizes)
            if kind == "tensordesc":
                sizes += [128, 4, 4, 8, 8]
            elif kind != "constexpr":
                sizes.append(8 if kind.startswith("*") else SIZES[kind])
        sizes += [8, 8]
        sizes[0] += self.parameter_bytes

        def run(parameters: Any) -> int:
            try:
                arguments = dict(constants)
                memory: dict[int, Tensor] = {}
                for name, kind in sorted(signature.items(), key=lambda x: x[1] != "tensordesc"):
                    if kind != "constexpr":
                        at = parameters[positions[name]]
                        arguments[name] = _argument(at, kind, dtypes.get(name), memory)
                last = _LastLaunch.in_dll(self.library, "fake_last_launch")
                assert tuple(last.grid[1:]) == (1, 1)
                assert (last.threads, last.shared_bytes) == (THREADS, SHARED_BYTES)
                self.launches.append(kernel.__name__)
                kernel[(last.grid[0],)](**arguments)
            except BaseException as error:
                self.errors.append(error)
                return 1
            return 0

        callback = _Run(run)
        self._keep.append(callback)
        array = (ctypes.c_size_t * len(sizes))(*sizes)
        return int(self.library.fake_new_kernel(callback, array, ctypes.c_size_t(len(sizes))))


def _argument(address: int, kind: str, dtype: torch.dtype | None, memory: dict[int, Tensor]) -> Any:
    """The argument that a parameter at an address stands for.

    ``memory`` holds the launch's pieces of memory by address: the interpreter takes two tensors
    that begin at the same address for one storage. Descriptors come first, because they say how
    large their matrix is.
    """
    if kind == "tensordesc":
        assert dtype is not None
        return _descriptor(address, dtype, memory)
    if kind.startswith("*"):
        assert dtype is not None
        pointer = ctypes.c_uint64.from_address(address).value
        if pointer == 0:
            return torch.empty(0, dtype=dtype)
        if pointer not in memory:
            memory[pointer] = bytes_at(pointer, 8)
        return memory[pointer].view(dtype)
    types: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
    return types[kind].from_address(address).value


def _descriptor(address: int, dtype: torch.dtype, memory: dict[int, Tensor]) -> TensorDescriptor:
    """The descriptor that the fake driver has written into a tensor map."""
    words = list((ctypes.c_uint64 * 8).from_address(address))
    base, columns, rows, row_bytes, box_columns, box_rows = words[:6]
    size = (rows - 1) * row_bytes + columns * dtype.itemsize
    matrix = memory.setdefault(base, bytes_at(base, size)).view(dtype)
    stride = row_bytes // dtype.itemsize
    return TensorDescriptor(matrix, [rows, columns], [stride, 1], [box_rows, box_columns])
