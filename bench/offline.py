"""Compile the kernels that a call would launch, for a GPU that is not there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from cjepa_kernels.triton import configs, cross_logsumexp, nt_xent, prediction_loss

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of a block
TENSOR_CORE = {80: "HMMA.", 90: "HGMMA.", 100: "UTC"}
PRODUCTS = {"tiles_kernel", "strips_kernel", "coefficient_tiles_kernel", "products_kernel"}
PRODUCTS |= {"owned_rows_kernel"}


@dataclass(frozen=True)
class Launch:
    """A kernel with the types of its arguments, its constants and its options."""

    name: str
    function: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Binary:
    """What the assembler says of a kernel."""

    registers: int
    stack: int
    shared: int
    intermediate: str = field(repr=False)
    machine_code: bytes = field(repr=False)

    @cached_property
    def assembly(self) -> str:
        """The disassembly, which takes as long as a small kernel's compilation."""
        return _run("nvdisasm", "-ndf", "-c", machine_code=self.machine_code)

    @cached_property
    def opcodes(self) -> list[str]:
        """Of all instructions, in order."""
        instruction = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
        return re.findall(instruction, self.assembly, re.M)

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(opcode.startswith(("LDL", "STL")) for opcode in self.opcodes)


def launches(architecture: int, call: Callable[[], Any]) -> list[Launch]:
    """What ``call`` would launch on that architecture, in order; tensors may be on "meta"."""
    recorded: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        if not all(1 <= size < 2**31 for size in grid):
            raise ValueError(f"{kernel.__name__} would be launched on a grid of {grid}")
        recorded.append(_describe(kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        # A mock would take a quarter of the time.
        mock.patch.object(configs, "architecture", lambda device: architecture),  # noqa: PT008
    ):
        call()
    return recorded


def _describe(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = function.arg_names
    values = dict(zip(names, args, strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
    constant_names = {p.name for p in function.params if p.is_constexpr}
    general = {p.name for p in function.params if p.do_not_specialize}
    signature, constants, aligned = {}, {}, []
    for name in names:
        value = values[name]
        # As the just-in-time compiler does: a 1 is a constant, and multiples of 16 are known.
        known = isinstance(value, int) and name not in general
        if name in constant_names or (known and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            dtype = mangle_type(value.base).removeprefix("*")
            signature[name] = f"tensordesc<{dtype}[{block}]>"
            continue
        signature[name] = mangle_type(value)
        if isinstance(value, Tensor) or (known and value % 16 == 0):
            aligned.append(name)
    options = {key: value for key, value in kwargs.items() if key not in names}
    return Launch(
        function.__name__,
        function,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(options.items()),
    )


@cache
def compile_launch(launch: Launch, architecture: int) -> Binary:
    """Machine code of a kernel, and what is in it."""
    names = launch.function.arg_names
    source = ASTSource(
        launch.function,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    kernel = triton.compile(source, target=target, options=dict(launch.options))
    machine_code = kernel.asm["cubin"]
    usage = _run("cuobjdump", "-res-usage", machine_code=machine_code)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in {usage!r}")
    shared = kernel.metadata.shared
    return Binary(int(found[1]), int(found[2]), shared, kernel.asm["ttgir"], machine_code)


def _run(tool: str, *args: str, machine_code: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(machine_code)
        command = [str(TOOLS / tool), *args, str(file)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    return result.stdout + result.stderr


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def nt_xent_call(
    rows: int, features: int, dtype: torch.dtype, *, tensor: bool = False, mask: bool = False,
    temperature: float = 0.1, cosine: bool = True,
) -> Callable[[], None]:  # fmt: skip
    """A forward and a backward of that size on "meta", without memory."""

    def call() -> None:
        z_i, z_j = (meta(rows // 2, features, dtype=dtype) for _ in range(2))
        excluded = meta(rows // 2, rows // 2, dtype=torch.bool) if mask else None
        tau = meta() if tensor else None
        common = (temperature, cosine, 1e-8, "mean", None)
        out = nt_xent.forward(z_i, z_j, excluded, tau, *common, False)
        nt_xent.backward(meta(), z_i, z_j, excluded, tau, *out[6:], *common)

    return call


def rectangle_call(
    rows: int, columns: int, features: int, dtype: torch.dtype
) -> Callable[[], None]:
    """The same of both log-sum-exps of a rectangle."""

    def call() -> None:
        x, y = meta(rows, features, dtype=dtype), meta(columns, features, dtype=dtype)
        common = (None, 0.1, True, 1e-8, None)
        out = cross_logsumexp.forward(x, y, *common)
        grads = meta(rows), meta(columns)
        cross_logsumexp.backward(*grads, x, y, None, *out[4:], *common[1:], True, True)

    return call


def prediction_call(features: int, dtype: torch.dtype, normalization: str) -> Callable[[], None]:
    """The same of the prediction loss of two levels, one of them masked, to both sides."""

    def call() -> None:
        sides = [[meta(128, n, features, dtype=dtype) for n in (196, 49)] for _ in range(2)]
        masks = [meta(128, 196, dtype=torch.bool), meta(0, dtype=torch.bool)]
        common = ([1.0, 0.5], "smoothl1", normalization, 1.0, 1e-8, "mean")
        loss, unweighted, levels, *saved = prediction_loss.forward(*sides, masks, *common)
        prediction_loss.backward(loss, unweighted, levels, *sides, masks, *saved, *common, True)

    return call
