"""The machine code of the Gluon kernels for Hopper, compiled without a GPU.

The assembler decides whether the exponentials of a tile fall into the product of the next one. It
does not if it waits for each instruction of a product (its warning C7514), if a loop spills, or if
it waits more than the kernel does.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from repository import ROOT

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.nvidia.compiler import get_ptxas

from cjepa_kernels.triton.plans import parameter_sizes

sys.path.insert(0, str(ROOT / "bench"))
# The scripts of bench/ are not part of the package, so they are imported by name.
gpu_machine_code = importlib.import_module("gpu_machine_code")

ARCHITECTURE = 90
SHARED_MEMORY = 227 << 10  # bytes of one program
EXPONENTIALS = 64  # of one thread in a tile of 64 x 128 by 128 threads
DEPTH = 16  # features of one HGMMA instruction
STEP_DEPTH = 64  # features of a step of a tile of G, and columns of G in a step of its products


class Loop(NamedTuple):
    """What the inner loop of a kernel holds.

    Attributes:
        products: HGMMA instructions.
        exponentials: MUFU.EX2 instructions.
        waits: Waits for products, at most.
    """

    products: int
    exponentials: int
    waits: int


# What a loop spills, as loads and stores of one thread beside 660 and more instructions. These are
# addresses, and the results are the same. Registers of the two groups differ, so the larger counts.
SPILLS = {
    "3.6": {("pairs", 640): 2, ("pairs", 768): 8},
    "3.7": {("pairs", 640): 2, ("pairs", 768): 8},
    "3.8": {("pairs", 512): 6, ("pairs", 640): 12, ("pairs", 768): 20},
    "3.9": {
        ("wide", 256): 150,
        ("pairs", 640): 20,
        ("pairs", 768): 28,
        ("hopper_owned", 256): 3,
        ("hopper_strips", 512): 6,
        ("hopper_tiles", 768): 1,
        ("hopper_tiles", 1024): 1,
    },
}
CASES = [
    ("wide", 256, torch.bfloat16),
    ("pairs", 512, torch.bfloat16),
    ("hopper_owned", 128, torch.bfloat16),
    ("hopper_strips", 512, torch.bfloat16),
    ("hopper_products", 512, torch.float16),
]
# These take long, so only `make gluon-check` runs them.
MORE_CASES = [
    ("wide", 64, torch.bfloat16),
    ("wide", 128, torch.float16),
    ("pairs", 640, torch.float16),
    ("pairs", 768, torch.bfloat16),
    ("hopper_owned", 64, torch.float16),
    ("hopper_owned", 128, torch.float16),
    ("hopper_owned", 256, torch.bfloat16),
    ("hopper_owned", 256, torch.float16),
    ("hopper_strips", 512, torch.float16),
    ("hopper_tiles", 768, torch.bfloat16),
    ("hopper_tiles", 1024, torch.float16),
    ("hopper_products", 768, torch.bfloat16),
]
if os.environ.get("CJEPA_TEST_EVERY_GLUON_KERNEL", "0") == "1":
    CASES += MORE_CASES
STRIPS = [case for case in CASES if case[0] == "hopper_strips"]
PIPELINED = [case for case in CASES if case[0] == "hopper_owned" and case[1] <= 128]


def name_of(case: tuple[str, int, torch.dtype]) -> str:
    kernel, features, dtype = case
    return f"{kernel}_{features}_{dtype}".replace("torch.", "")


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The launch of the kernel for a case."""
    kernel, features, dtype = request.param
    monkeypatch.setenv("CJEPA_GLUON", "1")
    call = gpu_machine_code.nt_xent_call(65536, features, dtype)
    launches = gpu_machine_code.launches(ARCHITECTURE, call)
    return next(one for one in launches if one.name == f"{kernel}_kernel")


def loop_of(kernel: str, features: int, constants: dict[str, Any]) -> Loop:
    """What the inner loop of a kernel should hold."""
    steps = features // constants.get("STEP", features)
    depth = features // DEPTH
    if kernel == "wide":  # two tiles; one wait a tile
        return Loop(2 * depth, 2 * EXPONENTIALS, 2)
    if kernel in ("pairs", "hopper_strips"):  # one tile; one wait for each step
        return Loop(depth, EXPONENTIALS, steps)
    if kernel == "hopper_owned":  # one tile; one wait for each of its products
        return Loop(depth + constants["COLUMNS"] // DEPTH, EXPONENTIALS, 2)
    # One step, of which a group has a whole block of rows and half of another one.
    return Loop(2 * STEP_DEPTH // DEPTH, 0, 1)


def loops_of_tiles(assembly: str, products: int, exponentials: int) -> list[list[str]]:
    """The loop of each group of warps: the two shortest that hold so many instructions.

    Longer loops are those of segments, and jumps back from the waits behind the kernel's end.
    """
    bodies = [
        body
        for body in gpu_machine_code.loops(assembly)
        if count(body, "HGMMA") == products and count(body, "MUFU.EX2") == exponentials
    ]
    assert len(bodies) >= 2, "a loop for each group"
    return sorted(bodies, key=len)[:2]


def count(body: list[str], opcode: str) -> int:
    return sum(opcode in one for one in body)


@pytest.mark.parametrize("launch", CASES, indirect=True, ids=name_of)
def test_the_loop_overlaps_products_and_exponentials(
    launch: Any, request: pytest.FixtureRequest
) -> None:
    kernel, features, _ = request.node.callspec.params["launch"]
    binary = gpu_machine_code.compile_launch(launch, ARCHITECTURE)
    assert binary.shared <= SHARED_MEMORY
    # What a launch plan takes for the parameters is what the driver will say.
    assert binary.parameter_sizes == parameter_sizes(dict(launch.signature))
    minor = ".".join(triton.__version__.split(".")[:2])
    loop = loop_of(kernel, features, dict(launch.constants))
    for body in loops_of_tiles(binary.assembly, loop.products, loop.exponentials):
        assert count(body, "WARPGROUP.DEPBAR") <= loop.waits
        spills = count(body, "LDL") + count(body, "STL")
        assert spills <= SPILLS.get(minor, {}).get((kernel, features), 0)


@pytest.mark.parametrize("launch", PIPELINED, indirect=True, ids=name_of)
def test_exponentials_of_pipelined_rows_fall_into_the_second_product(launch: Any) -> None:
    """The first wait is that for S of the next tile, the second that for G Y of this one."""
    binary = gpu_machine_code.compile_launch(launch, ARCHITECTURE)
    constants = dict(launch.constants)
    loop = loop_of("hopper_owned", constants["WIDTH"], constants)
    for body in loops_of_tiles(binary.assembly, loop.products, loop.exponentials):
        opcodes = ("HGMMA", "WARPGROUP.DEPBAR", "MUFU.EX2")
        order = [name for line in body for name in opcodes if name in line]
        assert [name for name, _ in itertools.groupby(order)] == [
            "HGMMA",
            "WARPGROUP.DEPBAR",
            "MUFU.EX2",
            "WARPGROUP.DEPBAR",
        ]


@pytest.mark.parametrize("launch", STRIPS, indirect=True, ids=name_of)
def test_strips_store_16_bytes_and_exchange_nothing(launch: Any) -> None:
    """With its columns in another order, a thread holds eight neighbouring numbers of G."""
    binary = gpu_machine_code.compile_launch(launch, ARCHITECTURE)
    constants = dict(launch.constants)
    loop = loop_of("hopper_strips", constants["WIDTH"], constants)
    for body in loops_of_tiles(binary.assembly, loop.products, loop.exponentials):
        assert count(body, "STG") == count(body, "STG.E.128") == EXPONENTIALS // 8
        assert not count(body, "SHFL")
        assert not count(body, "STS")


@pytest.mark.parametrize("launch", CASES, indirect=True, ids=name_of)
def test_the_assembler_does_not_serialize_the_products(launch: Any, tmp_path: Path) -> None:
    binary = gpu_machine_code.compile_launch(launch, ARCHITECTURE)
    assert "setmaxnreg" in binary.ptx
    assert not re.findall(r"C75\d\d.*", assembler_says(binary.ptx, tmp_path))


def assembler_says(ptx: str, folder: Path) -> str:
    """What the assembler says of a kernel."""
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    command = [
        get_ptxas(ARCHITECTURE).path, "-v", f"-arch=sm_{ARCHITECTURE}a", str(file),
        "-o", str(folder / "kernel.cubin"),
    ]  # fmt: skip
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return result.stdout + result.stderr
