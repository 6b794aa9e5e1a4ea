"""The Triton kernels compile for GPUs that this machine need not have.

The tests compile what a call would launch. They check that nothing spills, that products use the
tensor cores, and that shared memory suffices.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from repository import ROOT
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from cjepa_kernels.triton import configs, cross_logsumexp, prediction_loss
from cjepa_kernels.triton import launch as triton_launch
from cjepa_kernels.triton.plans import parameter_sizes

sys.path.insert(0, str(ROOT / "bench"))
# The scripts of bench/ are not part of the package, so they are imported by name.
gpu_machine_code = importlib.import_module("gpu_machine_code")
meta = gpu_machine_code.meta

ARCHITECTURES = [80, 90, 100]
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # Bytes of one block.
# PTX of a product on tensor cores, which the assembler cannot compute in another way.
TENSOR_CORE = {80: "mma.sync.", 90: "wgmma.mma_async.", 100: "tcgen05.mma."}
# Kernels that multiply matrices.
PRODUCTS = {
    "tiles_kernel",
    "strips_kernel",
    "coefficient_tiles_kernel",
    "products_kernel",
    "owned_rows_kernel",
}
THOROUGH = 90  # Every kernel of every case is compiled for this architecture.


class Case(NamedTuple):
    """A call whose kernels are compiled."""

    rows: int
    features: int
    dtype: torch.dtype
    options: dict[str, Any]  # Options of the call, which select kernels and constants.
    architectures: tuple[int, ...]  # Architectures besides THOROUGH.


# Compiling is slow, so few cases are compiled for further architectures. Together they compile
# every dtype and every kernel that multiplies for all of them.
CASES = {
    "small": Case(256, 768, torch.bfloat16, options={}, architectures=()),
    "one_block": Case(64, 16, torch.bfloat16, options={}, architectures=()),
    "strips_64": Case(65536, 64, torch.bfloat16, options={}, architectures=(100,)),
    "strips_256": Case(65536, 256, torch.bfloat16, options={}, architectures=(80,)),
    "ragged": Case(50000, 100, torch.float16, options={}, architectures=()),
    "wide": Case(65536, 768, torch.bfloat16, options={}, architectures=(80, 100)),
    "running_maxima": Case(
        65536, 768, torch.bfloat16, options={"temperature": 0.01}, architectures=(100,)
    ),
    "temperature_tensor": Case(
        65536, 256, torch.float16, options={"tensor": True}, architectures=(80, 100)
    ),
    "dot_product": Case(4096, 192, torch.bfloat16, options={"cosine": False}, architectures=()),
    "mask": Case(4096, 256, torch.bfloat16, options={"mask": True}, architectures=()),
    "no_reduction": Case(4096, 192, torch.float16, options={"reduction": "none"}, architectures=()),
    "fp32": Case(65536, 256, torch.float32, options={}, architectures=()),
    "fp32_mask": Case(
        4096, 768, torch.float32, options={"mask": True, "tensor": True}, architectures=(80, 100)
    ),
    "tf32_128": Case(65536, 128, torch.float32, options={"tf32": True}, architectures=(80,)),
    "tf32_768": Case(65536, 768, torch.float32, options={"tf32": True}, architectures=(100,)),
}
# Kernels without a product differ little. These cases compile them for the other architectures.
WHOLE = ("wide", "fp32_mask")


@pytest.fixture
def tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    """Restore PyTorch's setting of tf32 for fp32 products after the test."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def nt_xent_call(case: str) -> Callable[[], None]:
    """The call of a case."""
    rows, features, dtype, options, _ = CASES[case]
    options = dict(options)
    torch.backends.cuda.matmul.allow_tf32 = options.pop("tf32", False)
    return gpu_machine_code.nt_xent_call(rows, features, dtype, **options)


def rectangle_call(
    rows: int, columns: int, features: int, dtype: torch.dtype, *, paired: bool = False
) -> Callable[[], None]:
    """Forward and backward of both log-sum-exps of a rectangle on "meta"."""

    def call() -> None:
        common: dict[str, Any] = {
            "x": meta(rows, features, dtype=dtype),
            "y": meta(columns, features, dtype=dtype),
            "positives": meta(rows, dtype=torch.int64) if paired else None,
            "temperature_tensor": None,
            "temperature": 0.1,
            "use_cosine_similarity": True,
            "eps": 1e-8,
            "product_dtype": None,
        }
        out = cross_logsumexp.forward(**common, save_for_backward=False)
        cross_logsumexp.backward(
            **common,
            grad_row_lse=meta(rows),
            grad_column_lse=meta(columns),
            grad_positive=meta(rows) if paired else None,
            saved_for_backward=out.saved_for_backward,
            row_shift=out.row_shift,
            row_log_sum=out.row_log_sum,
            column_shift=out.column_shift,
            column_log_sum=out.column_log_sum,
            of_x=True,
            of_y=True,
        )

    return call


def prediction_call(features: int, dtype: torch.dtype, normalization: str) -> Callable[[], None]:
    """Forward and backward of the prediction loss of two levels, the first masked, on "meta"."""

    def call() -> None:
        common: dict[str, Any] = {
            "predictions": [meta(128, n, features, dtype=dtype) for n in (196, 49)],
            "targets": [meta(128, n, features, dtype=dtype) for n in (196, 49)],
            "masks": [
                meta(128, 196, dtype=torch.bool),
                meta(0, dtype=torch.bool),
            ],
            "weights": [1.0, 0.5],
            "loss_type": "smoothl1",
            "normalization": normalization,
            "threshold": 1.0,
            "eps": 1e-8,
            "reduction": "mean",
        }
        out = prediction_loss.forward(**common)
        prediction_loss.backward(
            **common,
            grad_loss=out.loss,
            grad_unweighted=out.unweighted,
            grad_levels=out.levels,
            statistics=out.statistics,
            scales=out.scales,
            targets_too=True,
        )

    return call


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        (case, architecture)
        for case in CASES
        for architecture in (THOROUGH, *CASES[case].architectures)
    ],
)
def test_compiles_without_spills(case: str, architecture: int) -> None:
    launches = gpu_machine_code.launches(architecture, nt_xent_call(case))
    if architecture != THOROUGH and case not in WHOLE:
        launches = [launch for launch in launches if launch.name in PRODUCTS]
    check(launches, architecture)


@pytest.mark.parametrize(
    ("features", "architecture", "paired"),
    [
        (128, 90, False), (768, 90, False), (768, 80, False), (128, 100, False),
        (128, 90, True), (768, 90, True), (256, 80, True),
    ],
)  # fmt: skip
def test_rectangles_compile_without_spills(features: int, architecture: int, paired: bool) -> None:
    call = rectangle_call(50000, 8100, features, torch.bfloat16, paired=paired)
    check(gpu_machine_code.launches(architecture, call), architecture)


# What these calls share with NT-Xent is compiled above.
OWN_VARIANTS = {"tiles_kernel", "coefficient_tiles_kernel", "owned_rows_kernel"}
OWN_VARIANTS |= {"self_logsumexp_kernel", "finish_kernel"}


@pytest.mark.parametrize(
    ("features", "dtype", "options", "architecture"),
    [
        (128, torch.bfloat16, {"paired": True}, 90),
        (256, torch.bfloat16, {"views": 2, "classed": True}, 90),
        (256, torch.float32, {"paired": True, "classed": True, "tensor": True}, 80),
        (256, torch.bfloat16, {"paired": True, "classed": True, "attracted": True}, 90),
    ],
    ids=str,
)
def test_rows_against_themselves_compile_without_spills(
    features: int, dtype: torch.dtype, options: dict[str, Any], architecture: int
) -> None:
    call = gpu_machine_code.self_logsumexp_call(4096, features, dtype, **options)
    launches = gpu_machine_code.launches(architecture, call)
    own = [launch for launch in launches if launch.name in OWN_VARIANTS]
    assert {"tiles_kernel", "self_logsumexp_kernel", "finish_kernel"} < {x.name for x in own}
    check(own, architecture)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_large_products_of_planes_are_added_apart(architecture: int) -> None:
    """The compiler must not merge the fp32 sum of the products into one of the products.

    A tensor core truncates the sums that it computes.
    """
    names = {"tiles_kernel", "coefficient_tiles_kernel", "products_kernel"}
    launches = gpu_machine_code.launches(architecture, nt_xent_call("fp32_mask"))
    first = {x.name: x for x in launches if x.name in names}
    assert first.keys() == names
    for launch in first.values():
        text = gpu_machine_code.compile_launch(launch, architecture).intermediate
        assert re.search(r"%acc\S* = arith.addf .*tensor<128x\d+xf32", text), launch.name


def check(launches: list[Any], architecture: int) -> None:
    """Check that each kernel fits the GPU, does not spill, and multiplies on tensor cores."""
    checked = set()
    for launch in dict.fromkeys(launches):
        product = launch.name in PRODUCTS
        if launch.name in checked and not product and architecture != THOROUGH:
            continue  # Kernels without a product differ little, so one variant is enough.
        checked.add(launch.name)
        binary = gpu_machine_code.compile_launch(launch, architecture)
        text = f"{launch.name} {dict(launch.constants)} {dict(launch.options)}: {binary}"
        assert binary.shared <= SHARED_MEMORY[architecture], text
        # A kernel that the compiler found to be undefined would be empty.
        assert binary.registers > 8, text
        # What a launch plan takes for the parameters of the kernel is what the driver will say.
        assert binary.parameter_sizes == parameter_sizes(dict(launch.signature)), text
        if not product:
            continue
        assert (binary.stack, binary.spills) == (0, 0), text
        assert TENSOR_CORE[architecture] in binary.ptx, text


@pytest.mark.parametrize(
    ("rows", "features"),
    [(2, 1), (256, 256), (8192, 1), (8192, 4096), (2**17, 4096), (2**21, 256), (2**22, 256)],
)
def test_every_size_can_be_launched(rows: int, features: int) -> None:
    """Grids are within their limits, and few rows take at most 4 kernels in each direction."""
    launches = gpu_machine_code.launches(
        90, gpu_machine_code.nt_xent_call(rows, features, torch.bfloat16)
    )
    names = [launch.name for launch in launches]
    if rows <= 8192:
        forward = names.index("nt_xent_rows_kernel") + 1
        assert forward <= 4, names
        assert len(names) - forward <= 3, names


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are allocated, and the most that live at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = 0
        self.living: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "empty" in str(func) or "zeros" in str(func):
            size = out.numel() * out.element_size()
            self.total += size
            self.living = [(storage, n) for storage, n in self.living if not storage.expired()]
            self.living.append((StorageWeakRef(out.untyped_storage()), size))
            self.peak = max(self.peak, sum(n for _, n in self.living))
        return out


@pytest.mark.parametrize("options", [{}, {"tensor": True}], ids=str)
def test_memory_grows_with_the_rows_and_not_their_square(options: dict[str, Any]) -> None:
    totals = []
    for rows in (2**18, 2**19):
        with Allocations() as allocations:
            gpu_machine_code.launches(
                90, gpu_machine_code.nt_xent_call(rows, 256, torch.bfloat16, **options)
            )
        totals.append(allocations.total)
    assert totals[1] < 2.05 * totals[0]


def test_saved_rows_do_not_raise_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the backward holds rows of its own at the peak, which take as much."""
    rows = 2**18
    monkeypatch.setattr(triton_launch, "splits", lambda *_: 1)  # as on a GPU with so many rows
    peaks = []
    for save in (False, True):
        call = gpu_machine_code.nt_xent_call(rows, 256, torch.bfloat16, save=save)
        with Allocations() as allocations:
            gpu_machine_code.launches(90, call)
        # The inputs and the gradients, which the count contains, are no extra memory.
        peaks.append(allocations.peak / (rows * 256 * 2) - 2)
    assert peaks[1] <= 1.01 * peaks[0]
    assert peaks[1] <= 3.1


@pytest.mark.parametrize(
    ("features", "dtype", "normalization", "architecture"),
    [
        (768, torch.bfloat16, "l2", 90),
        (768, torch.bfloat16, "l2", 100),
        (384, torch.float32, "layer", 80),
        (384, torch.float32, "layer", 90),
        (4096, torch.float32, "l2", 80),
        (4096, torch.float32, "l2", 100),
    ],
    ids=str,
)
def test_the_prediction_loss_compiles_without_spills(
    features: int, dtype: torch.dtype, normalization: str, architecture: int
) -> None:
    """The kernels are memory-bound, and a spill would add reads and writes."""
    call = prediction_call(features, dtype, normalization)
    for launch in dict.fromkeys(gpu_machine_code.launches(architecture, call)):
        binary = gpu_machine_code.compile_launch(launch, architecture)
        assert (binary.stack, binary.spills) == (0, 0), f"{launch.name}: {binary}"


@pytest.mark.parametrize("features", [384, 768, 1024])
def test_the_prediction_loss_keeps_memory_busy(features: int) -> None:
    """What can be counted without a GPU of how close to the limit by memory the kernels may come.

    On an H100 about 18 KiB have to be in flight for each multiprocessor (3.35 TB/s, 0.7 us, 132 of
    them), and more under load. The instructions must not take as long as the bytes.
    """
    call = prediction_call(features, torch.bfloat16, "l2")
    unmasked = [
        launch
        for launch in gpu_machine_code.launches(90, call)
        if not dict(launch.constants)["MASKED"]
    ]
    assert [launch.name for launch in unmasked] == [
        "prediction_loss_kernel",
        "prediction_gradient_kernel",
    ]
    for launch in unmasked:
        binary = gpu_machine_code.compile_launch(launch, 90)
        constants, options = dict(launch.constants), dict(launch.options)
        assert constants["EXACT"], "masked columns would take as many instructions as the others"
        kernel = launch.name.removesuffix("_kernel")
        config = configs.choose(kernel, 90, torch.bfloat16, features)
        threads, registers = 32 * options["num_warps"], -(-binary.registers // 8) * 8
        resident = min(65536 // (registers * threads), SHARED_MEMORY[90] // (binary.shared + 1024))
        assert resident >= config.programs, binary
        # Copies to shared memory begin before the block that is computed has been read.
        assert any(opcode.startswith("LDGSTS.E.BYPASS.128") for opcode in binary.opcodes)
        block = 2 * 2 * features * constants["ROWS"]
        assert config.programs * (config.stages - 1) * block >= 32 << 10
        bodies = gpu_machine_code.loops(binary.assembly)
        loop = min((body for body in bodies if "LDS.128" in " ".join(body)), key=len)
        elements = features * constants["ROWS"] / threads
        assert len(loop) / elements < (26 if kernel == "prediction_loss" else 33), binary


def test_instructions_are_counted_in_the_tightest_loop() -> None:
    assembly = """
    .L_x_0:
        /*0000*/ MUFU.EX2 R1, R2 ;
        /*0010*/ MOV R1, R2 ;
    .L_x_1:
        /*0020*/ MUFU.EX2 R1, R2 ;
        /*0030*/ @P0 BRA `(.L_x_1) ;
        /*0040*/ @!P0 BRA `(.L_x_0) ;
        /*0050*/ EXIT ;
    """
    assert gpu_machine_code.per_element(assembly) == 2
    with pytest.raises(ValueError, match="no exponentials"):
        gpu_machine_code.per_element("/*0000*/ EXIT ;")


def test_a_strip_spends_few_instructions_on_an_element() -> None:
    """Sums of columns by shuffles, or a spill, would take several times as many."""
    records = {r["kernel"]: r for r in gpu_machine_code.count(128, 90)}
    assert records.keys() == {"strips_kernel", "tiles_kernel", "owned_rows_kernel"}
    assert records["strips_kernel"]["instructions"] < 9
