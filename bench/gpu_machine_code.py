"""Compile the Triton kernels for a GPU that this machine need not have, and count instructions.

    python bench/gpu_machine_code.py [--architecture 90] [--no-save]

The script counts the instructions that a kernel spends on one element of S = z zᵀ. It takes the
shortest loop that contains exponentials, or the whole kernel if no loop does, and divides the
instructions in it by the exponentials in it. It writes
bench/results/gpu_instructions_sm<architecture>.json.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.script_options import read_options, save
from cjepa_kernels.tables import print_table
from cjepa_kernels.triton import configs, nt_xent, self_logsumexp
from cjepa_kernels.triton.configs import TILE

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# What is counted: the kernels of NT-Xent that take exponentials, at these sizes.
COUNTED = ("tiles_kernel", "strips_kernel", "owned_rows_kernel", "coefficient_tiles_kernel")
ROWS = 65536
FEATURES = (64, 128, 256, 768)
HEADER = ["D", "kernel", "registers", "instructions", "product", "exponentials", "issue"]
# What one multiprocessor of compute capability 9.0 does in a clock cycle: dense bf16 operations
# (989 TFLOP/s of 132 multiprocessors at 1.83 GHz, by NVIDIA's data sheet of the H100),
# exponentials, and instructions of a warp.
OPERATIONS, EXPONENTIALS, WARP_INSTRUCTIONS = 4096, 16, 4


@dataclass(frozen=True)
class Launch:
    """A kernel with the types of its arguments, its constants and its options.

    Attributes:
        name: Name of the kernel.
        function: The kernel.
        signature: Name and type of each argument.
        constants: Name and value of each argument that is compiled into the kernel.
        aligned: Arguments that are known to be multiples of 16.
        options: Options of the compiler, such as ``num_warps``.
    """

    name: str
    function: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Binary:
    """Machine code of a kernel, and what the assembler says of it."""

    registers: int
    stack: int
    shared: int
    intermediate: str = field(repr=False)
    ptx: str = field(repr=False)
    machine_code: bytes = field(repr=False)

    @cached_property
    def assembly(self) -> str:
        """The disassembly. Making it takes as long as compiling a small kernel."""
        return run_tool("nvdisasm", "-ndf", "-c", machine_code=self.machine_code)

    @cached_property
    def opcodes(self) -> list[str]:
        """The operation codes of all instructions, in order."""
        instruction = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
        return re.findall(instruction, self.assembly, re.M)

    @cached_property
    def parameter_sizes(self) -> list[int]:
        """Bytes of each parameter, as the driver reads them from the machine code."""
        text = run_tool("cuobjdump", "-elf", machine_code=self.machine_code)
        found = re.findall(r"Ordinal : (0x\w+)\s+Offset  : 0x\w+\s+Size    : (0x\w+)", text)
        return [int(size, 16) for _, size in sorted(found, key=lambda x: int(x[0], 16))]

    @property
    def spills(self) -> int:
        """Number of loads from the stack and stores to it, which too few registers cause."""
        if self.stack == 0:
            return 0
        return sum(opcode.startswith(("LDL", "STL")) for opcode in self.opcodes)


def launches(architecture: int, call: Callable[[], Any]) -> list[Launch]:
    """The kernels that ``call`` would launch on that architecture, in order.

    Args:
        architecture: Compute capability: 80, 90 or 100.
        call: Calls the Triton back end; its tensors may be on "meta".
    """
    recorded: list[Launch] = []
    backend = make_backend(GPUTarget("cuda", architecture, 32))

    @cache
    def binder(kernel: JITFunction) -> Callable[..., Any]:
        """Triton generates and compiles this function, which takes a millisecond."""
        return create_function_from_signature(kernel.signature, kernel.params, backend)  # type: ignore[no-any-return]

    def record(
        kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any
    ) -> None:
        if warmup:  # The launch comes after it.
            return
        if not all(1 <= size < 2**31 for size in grid):
            raise ValueError(f"{kernel.__name__} would be launched on a grid of {grid}")
        # Triton's own rules say which arguments become constants and which are aligned.
        bound, specialization, options = binder(kernel)(*args, **kwargs)
        _, signature, constants, attributes = kernel._pack_args(
            backend, kwargs, bound, specialization, options
        )
        names = kernel.arg_names
        recorded.append(
            Launch(
                name=kernel.__name__,
                function=kernel,
                signature=tuple(signature.items()),
                constants=tuple((names[index], value) for (index,), value in constants.items()),
                aligned=tuple(names[index] for (index,), value in attributes.items() if value),
                options=tuple(options.items()),
            )
        )

    with (
        mock.patch.object(JITFunction, "run", record),
        # A mock object would record every call, which takes a quarter of the time.
        mock.patch.object(configs, "architecture", lambda device: architecture),  # noqa: PT008
    ):
        call()
    return recorded


@cache
def compile_launch(launch: Launch, architecture: int) -> Binary:
    """Compile a kernel to machine code."""
    names = launch.function.arg_names
    source = (GluonASTSource if launch.function.is_gluon() else ASTSource)(
        launch.function,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    kernel = triton.compile(source, target=target, options=dict(launch.options))
    machine_code = kernel.asm["cubin"]
    usage = run_tool("cuobjdump", "-res-usage", machine_code=machine_code)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"no resource usage in {usage!r}")
    return Binary(
        registers=int(match[1]),
        stack=int(match[2]),
        shared=kernel.metadata.shared,
        intermediate=kernel.asm["ttgir"],
        ptx=kernel.asm["ptx"],
        machine_code=machine_code,
    )


def run_tool(tool: str, *args: str, machine_code: bytes) -> str:
    """What one of Triton's copies of NVIDIA's tools says of some machine code."""
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
    rows: int,
    features: int,
    dtype: torch.dtype,
    *,
    tensor: bool = False,
    mask: bool = False,
    temperature: float = 0.1,
    cosine: bool = True,
    reduction: str = "mean",
    save: bool = True,
) -> Callable[[], None]:
    """Forward and backward of NT-Xent on "meta", where tensors take no memory.

    Args:
        rows: M, twice the pairs.
        features: D.
        dtype: Of the features.
        tensor: Whether the temperature is a tensor.
        mask: Whether a mask excludes negatives.
        temperature: The temperature, if it is a number.
        cosine: Whether the rows are normalised.
        reduction: As the operator takes it.
        save: Whether the forward saves its rows for the backward.
    """

    def call() -> None:
        common: dict[str, Any] = {
            "z_i": meta(rows // 2, features, dtype=dtype),
            "z_j": meta(rows // 2, features, dtype=dtype),
            "mask": meta(rows // 2, rows // 2, dtype=torch.bool) if mask else None,
            "temperature_tensor": meta() if tensor else None,
            "temperature": temperature,
            "use_cosine_similarity": cosine,
            "eps": 1e-8,
            "reduction": reduction,
            "product_dtype": None,
        }
        out = nt_xent.forward(**common, save_for_backward=save)
        nt_xent.backward(
            **common,
            grad_loss=meta(rows) if reduction == "none" else meta(),
            shift=out.shift,
            log_sum=out.log_sum,
            positive=out.positive,
            saved_for_backward=out.saved_for_backward,
        )

    return call


def self_logsumexp_call(
    rows: int,
    features: int,
    dtype: torch.dtype,
    *,
    views: int = 1,
    paired: bool = False,
    classed: bool = False,
    attracted: bool = False,
    tensor: bool = False,
) -> Callable[[], None]:
    """Forward and backward of the log-sum-exps of rows against themselves on "meta".

    Args:
        rows: M.
        features: D.
        dtype: Of the features.
        views: Tensors of which the rows are made, 1 or 2.
        paired: Whether the rows of one view have positives.
        classed: Whether the samples have classes.
        attracted: Whether rows of one class attract each other; only with ``classed``.
        tensor: Whether the temperature is a tensor.
    """

    def call() -> None:
        samples = rows // views
        common: dict[str, Any] = {
            "z_i": meta(samples, features, dtype=dtype),
            "z_j": meta(samples, features, dtype=dtype) if views == 2 else None,
            "positives": meta(rows, dtype=torch.int64) if paired else None,
            "classes": meta(samples, dtype=torch.int64) if classed else None,
            "class_weights": meta(rows) if attracted else None,
            "temperature_tensor": meta() if tensor else None,
            "temperature": 0.1,
            "use_cosine_similarity": True,
            "eps": 1e-8,
            "product_dtype": None,
        }
        out = self_logsumexp.forward(
            **common, class_means=common["class_weights"], save_for_backward=False
        )
        self_logsumexp.backward(
            **common,
            grad_lse=meta(rows),
            grad_positive=meta(rows) if paired or views == 2 else None,
            shift=out.shift,
            log_sum=out.log_sum,
            saved_for_backward=out.saved_for_backward,
        )

    return call


def loops(assembly: str) -> Iterator[list[str]]:
    """The body of each loop, from a label to the branch back to it, and then the whole kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        label = re.match(r"(\.L_x_\d+):", line.strip())
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
            branch = re.search(r"BRA.*\((\.L_x_\d+)\)", instruction[1])
            if branch and branch[1] in labels:
                yield instructions[labels[branch[1]] :]
    yield instructions


def per_element(assembly: str) -> float:
    """Instructions for each exponential in the shortest loop that contains exponentials."""
    lengths_and_ratios = []
    for body in loops(assembly):
        exponentials = sum("MUFU.EX2" in instruction for instruction in body)
        if exponentials:
            lengths_and_ratios.append((len(body), len(body) / exponentials))
    if not lengths_and_ratios:
        raise ValueError("the kernel takes no exponentials")
    return min(lengths_and_ratios)[1]


def count(features: int, architecture: int) -> list[Record]:
    """A record for each kernel at D features; its cycles are those of one tile."""
    call = nt_xent_call(ROWS, features, torch.bfloat16)
    records: dict[str, Record] = {}
    for launch in launches(architecture, call):
        if launch.name not in COUNTED or launch.name in records:
            continue
        binary = compile_launch(launch, architecture)
        instructions = per_element(binary.assembly)
        products = 2 if launch.name == "owned_rows_kernel" else 1
        records[launch.name] = {
            "D": features,
            "kernel": launch.name,
            "place": dict(launch.constants).get("PLACE"),
            "registers": binary.registers,
            "instructions": instructions,
            "product_cycles": products * 2 * TILE**2 * features / OPERATIONS,
            "exponential_cycles": TILE**2 / EXPONENTIALS,
            "issue_cycles": instructions * TILE**2 / 32 / WARP_INSTRUCTIONS,
        }
    return list(records.values())


def main() -> None:
    capability = {"type": int, "default": 90, "help": "compute capability"}
    options = read_options(__doc__, {"--architecture": capability})
    records = [r for features in FEATURES for r in count(features, options.architecture)]
    rows = [
        [
            str(r["D"]),
            r["kernel"] if r["place"] is None else f"{r['kernel']} ({r['place']})",
            str(r["registers"]),
            f"{r['instructions']:.1f}",
            *(f"{r[k]:.0f}" for k in ("product_cycles", "exponential_cycles", "issue_cycles")),
        ]
        for r in records
    ]
    print_table(HEADER, rows)
    save(options, f"gpu_instructions_sm{options.architecture}", records, of_kernels=True)


if __name__ == "__main__":
    main()
