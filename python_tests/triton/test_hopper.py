"""The Gluon kernels for Hopper without a GPU: values, barriers, and when they are chosen.

``gluon_emulator`` runs the kernels' own source with parts and loads in random order. Its errors,
and values that differ from the float64 reference, show a protocol that does not hold.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from repository import ROOT
from tolerances import relative_error
from torch import Tensor

pytest.importorskip("triton")

import emulated_kernels
import gluon_emulator
from emulated_kernels import KERNELS, EmulatedKernel

from cjepa_kernels import backends, cross_logsumexp, nt_xent
from cjepa_kernels.backends import triton_is_interpreted
from cjepa_kernels.triton import configs, hopper, launch, schedules
from cjepa_kernels.triton.configs import TILE
from cjepa_kernels.triton.schedules import Shape

sys.path.insert(0, str(ROOT / "bench"))
SOURCE = KERNELS / "hopper.py"
TEMPERATURE = 0.1
# Sums of 128 exponentials in fp32, against fp64. The largest error that was seen is 7e-7.
BOUND = 2e-6


class Case(NamedTuple):
    """A launch of a kernel."""

    shape: Shape
    rows: int  # blocks of rows
    columns: tuple[int, int]  # first and last block of columns
    features: int
    stages: int
    step: int = 0
    programs: int = 3
    square: bool = True  # only the tiles above the diagonal

    @property
    def heights(self) -> list[int]:
        first, last = self.columns
        return [min(c, self.rows) if self.square else self.rows for c in range(first, last)]


CASES = {
    "wide": Case("wide", 5, (0, 5), 64, stages=3),
    "wide_128": Case("wide", 4, (0, 4), 128, stages=8),
    "wide_256": Case("wide", 3, (0, 3), 256, stages=3),
    "wide_ring_of_two": Case("wide", 4, (0, 4), 64, stages=2),
    "wide_one_program": Case("wide", 6, (0, 6), 64, stages=3, programs=1),
    "wide_second_panel": Case("wide", 7, (4, 7), 64, stages=4),
    "wide_rectangle": Case("wide", 3, (0, 5), 64, stages=3, square=False),
    "pairs": Case("pairs", 5, (0, 5), 128, stages=6, step=64),
    "pairs_512": Case("pairs", 3, (0, 3), 512, stages=6, step=128),
    "pairs_768": Case("pairs", 3, (0, 3), 768, stages=4, step=64),
    "pairs_ring_shorter_than_a_tile": Case("pairs", 4, (0, 4), 256, stages=3, step=64),
    "pairs_one_step": Case("pairs", 4, (0, 4), 64, stages=5, step=64),
    "pairs_one_program": Case("pairs", 5, (0, 5), 192, stages=4, step=64, programs=1),
    "pairs_second_panel": Case("pairs", 6, (3, 6), 128, stages=4, step=64),
    "pairs_rectangle": Case("pairs", 3, (0, 4), 128, stages=5, step=64, square=False),
}


# The emulator takes part in both runs of the suite, and once is enough.
emulator_alone = pytest.mark.skipif(
    triton_is_interpreted(), reason="the run without the interpreter has this test"
)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return gluon_emulator.load_kernels(SOURCE)


def rows_of(number: int, features: int, seed: int) -> Tensor:
    """Normalised rows in bf16, with pairs that are alike."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(number, features, generator=generator)
    z[1::2] = z[0 : number - 1 : 2] + 0.7 * z[1::2]
    return torch.nn.functional.normalize(z, dim=1).bfloat16()


def largest_error(kernels: ModuleType, case: Case, seed: int = 0) -> float:
    """The largest relative error of sums, and absolute error of maxima, of one launch.

    It is infinite if a number that the launch does not own was written.
    """
    first, last = case.columns
    x = rows_of(case.rows * TILE, case.features, seed)
    y = x if case.square else rows_of(last * TILE, case.features, seed + 1)
    schedule = schedules.make(case.shape, case.heights, case.programs)
    slots, width = max(schedule.slots), last - first
    row_sum, row_max = (torch.full((width, x.shape[0]), torch.nan) for _ in range(2))
    column_sum, column_max = (torch.full((slots, width * TILE), torch.nan) for _ in range(2))
    step = case.step or case.features
    gluon_emulator.launch(
        getattr(kernels, f"{case.shape}_kernel"),
        case.programs,
        seed,
        stay_blocks=gluon_emulator.descriptor(y, TILE, step),
        row_blocks=gluon_emulator.descriptor(x, hopper.TILE_ROWS, step),
        row_sum=row_sum,
        row_max=row_max,
        column_sum=column_sum,
        column_max=column_max,
        starts=torch.tensor(schedule.starts, dtype=torch.int32),
        table=torch.tensor(schedule.table, dtype=torch.int32),
        temperature=TEMPERATURE,
        row_pitch=x.shape[0],
        column_pitch=width * TILE,
        first_column=first,
        WIDTH=case.features,
        STAGES=case.stages,
        **({"STEP": case.step} if case.step else {}),
    )
    s = x.double() @ y[first * TILE :].double().T
    e = ((s - 1) / TEMPERATURE).exp()
    largest = 0.0
    for c, height in enumerate(case.heights):
        rows, columns = slice(0, height * TILE), slice(c * TILE, (c + 1) * TILE)
        written = [
            (row_sum[c, rows], e[rows, columns].sum(1), True),
            (row_max[c, rows], amax(s[rows, columns], 1), False),
        ]
        if height > 0:
            used = slice(0, schedule.slots[c])
            written += [
                (column_sum[used, columns].double().sum(0), e[rows, columns].sum(0), True),
                (column_max[used, columns].amax(0), amax(s[rows, columns], 0), False),
            ]
        for got, expected, is_relative in written:
            error = (got - expected).abs() / (expected if is_relative else 1)
            largest = max(largest, *error.nan_to_num(torch.inf).tolist(), 0.0)
        beyond = (row_sum[c, height * TILE :], column_max[schedule.slots[c] :, columns])
        if not all(x.isnan().all() for x in beyond):
            return torch.inf
    return largest


def amax(x: Tensor, dim: int) -> Tensor:
    return x.amax(dim) if x.numel() else x.new_empty(x.shape[1 - dim])


@emulator_alone
@pytest.mark.parametrize("case", CASES)
def test_sums_and_maxima_are_those_of_the_reference(kernels: ModuleType, case: str) -> None:
    assert largest_error(kernels, CASES[case]) < BOUND


INTERLEAVED = ["wide", "wide_ring_of_two", "wide_rectangle", "pairs", "pairs_one_step"]
INTERLEAVED += ["pairs_ring_shorter_than_a_tile", "pairs_one_program"]


@emulator_alone
@pytest.mark.parametrize("case", INTERLEAVED)
def test_any_order_of_the_parts_gives_the_same(kernels: ModuleType, case: str) -> None:
    for seed in range(1, 25):
        assert largest_error(kernels, CASES[case], seed) < BOUND, f"seed {seed}"


TURN = "            mbarrier.wait(turns.index(GROUP), my_turn)\n            my_turn ^= 1\n"
TURN_OVER = "mbarrier.arrive(turns.index(1 - GROUP), count=1)"
EARLY = "product = warpgroup_mma_wait(1, deps=[product])\n"
FIRST_PRODUCT = "s0 = warpgroup_mma_wait(0, deps=[s0])\n"
FAULTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "no_turns": ("pairs_ring_shorter_than_a_tile", [(TURN, ""), (TURN_OVER, "pass")]),
    "a_block_is_given_back_too_early": ("pairs", [(EARLY, "pass\n")]),
    "a_step_starts_before_its_block": (
        "pairs",
        [("mbarrier.wait(full.index(slot), parity)\n                if step", "if step")],
    ),
    "a_tile_starts_before_its_block": (
        "wide",
        [("mbarrier.wait(full.index(slot), parity)\n            s0", "s0")],
    ),
    "columns_are_replaced_too_early": (
        "wide_one_program",
        [("mbarrier.wait(stay_empty.index(0), turn ^ 1)", "pass")],
    ),
    "columns_are_read_too_early": (
        "pairs",
        [("mbarrier.wait(stay_full.index(0), turn)", "pass")],
    ),
    "a_full_ring_is_filled_again": (
        "wide",
        [("mbarrier.wait(empty.index(slot), parity ^ 1)", "pass")],
    ),
    "the_parity_stays": (
        "wide",
        [("gl.where(wraps, 0, slot + 1), gl.where(wraps, parity ^ 1, parity)",
          "gl.where(wraps, 0, slot + 1), parity")],
    ),
    "the_parity_of_an_advance_stays": (
        "pairs_one_step",
        [("gl.where(wraps, slot - STAGES, slot), gl.where(wraps, parity ^ 1, parity)",
          "gl.where(wraps, slot - STAGES, slot), parity")],
    ),
    "one_arrival_too_few": (
        "wide",
        [("new_barriers(STAGES, ARRIVALS=2)", "new_barriers(STAGES, ARRIVALS=3)")],
    ),
    "one_arrival_too_many": (
        "wide",
        [("new_barriers(STAGES, ARRIVALS=2)", "new_barriers(STAGES, ARRIVALS=1)")],
    ),
    "bytes_of_another_dtype": ("wide", [("ELEMENT = gl.constexpr(2)", "ELEMENT = 4")]),
    "blocks_of_the_other_group_stay": (
        "wide",
        [("range(tiles, gl.load(segment + (4 - GROUP)))", "range(0)")],
    ),
    "the_rows_do_not_move_on": (
        "pairs",
        [("            row_offsets += 2 * ROWS", "            pass")],
    ),
    "sums_of_the_wrong_tile": (
        "wide",
        [("s1, column_total, column_maximum, row", "s0, column_total, column_maximum, row")],
    ),
    "both_groups_use_one_slot": (
        "pairs",
        [("(2 * gl.load(segment + 1) + GROUP)", "gl.load(segment + 1)")],
    ),
}  # fmt: skip


@emulator_alone
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    case, replacements = FAULTS[fault]
    broken = gluon_emulator.load_kernels(SOURCE, *replacements)
    for seed in range(60):
        try:
            if not largest_error(broken, CASES[case], seed) < BOUND:
                return
        except gluon_emulator.EmulationError:
            return
    pytest.fail("no order of the parts showed the fault")


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_kernels.forget(monkeypatch)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, forget: None) -> dict[str, EmulatedKernel]:
    """Small inputs go by the emulated kernels.

    There are few programs, because each may add a segment to a strip, whose slots need room.
    """
    monkeypatch.setattr(launch, "ONE_LAUNCH_BLOCKS", 1)
    return emulated_kernels.emulate(monkeypatch, emulated_kernels.load_kernels(), programs=2)


interpreted = pytest.mark.skipif(
    not (triton_is_interpreted() and backends()["triton"].available),
    reason="the other kernels run in Triton's interpreter: TRITON_INTERPRET=1",
)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("batch", "features", "dtype", "kernel", "panels"),
    [
        (640, 64, torch.bfloat16, "wide", "one_panel"),
        (611, 100, torch.float16, "wide", "several_panels"),
        (530, 190, torch.bfloat16, "pairs", "several_panels"),
        (521, 300, torch.float16, "pairs", "one_panel"),
    ],
)
def test_nt_xent_by_the_kernels(
    batch: int,
    features: int,
    dtype: torch.dtype,
    kernel: str,
    panels: str,
    emulated: dict[str, EmulatedKernel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if panels == "several_panels":
        monkeypatch.setenv("CJEPA_WORKSPACE_MIB", "0.06")
    if kernel == "pairs":
        monkeypatch.setattr(hopper, "programs", lambda device: 1)
    z_i, z_j = (rows_of(batch, features, seed).to(dtype) for seed in (1, 2))
    out = nt_xent(z_i, z_j, backend="triton", reduction="none")
    expected = nt_xent(z_i.double(), z_j.double(), backend="reference", reduction="none")
    assert relative_error(out.loss, expected.loss) < (3e-2 if dtype == torch.bfloat16 else 4e-3)
    monkeypatch.setenv("CJEPA_GLUON", "0")
    today = nt_xent(z_i, z_j, backend="triton", reduction="none")
    assert relative_error(out.loss, today.loss.double()) < BOUND
    for name in ("accuracy", "positive_similarity", "negative_similarity"):
        assert torch.equal(getattr(out, name), getattr(today, name)), name
    assert emulated[kernel].launches > 0
    assert emulated[{"wide": "pairs", "pairs": "wide"}[kernel]].launches == 0


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("rows", "columns", "features"), [(1300, 500, 64), (1100, 512, 192)])
def test_a_rectangle_by_the_kernels(
    rows: int,
    columns: int,
    features: int,
    emulated: dict[str, EmulatedKernel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = (rows_of(number, features, seed) for number, seed in ((rows, 1), (columns, 2)))
    out = cross_logsumexp(x, y, backend="triton")
    monkeypatch.setenv("CJEPA_GLUON", "0")
    today = cross_logsumexp(x, y, backend="triton")
    assert sum(kernel.launches for kernel in emulated.values()) > 0
    for name in ("row_lse", "column_lse", "row_max", "column_max"):
        assert relative_error(getattr(out, name), getattr(today, name).double()) < BOUND, name


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
def test_the_check_for_a_device_passes_by_the_kernels(
    emulated: dict[str, EmulatedKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_hopper = importlib.import_module("gpu_hopper")
    x, y = gpu_hopper.views(1026, 64, torch.bfloat16, device="cpu")
    assert gpu_hopper.parity(x, y, sample=100)["passed"]
    assert emulated["wide"].launches == 2
    assert gpu_hopper.uses_gluon(x, y)
    monkeypatch.setattr(hopper, "select", lambda tiles: None)
    assert not gpu_hopper.uses_gluon(x, y)


def launched(call: Callable[[], Any], architecture: int = 90) -> list[str]:
    """Names of the kernels that a call would launch."""
    gpu_machine_code = importlib.import_module("gpu_machine_code")
    return [one.name for one in gpu_machine_code.launches(architecture, call)]


compiler = pytest.mark.skipif(triton_is_interpreted(), reason="the interpreter has no compiler")


@pytest.fixture
def call(forget: None) -> Callable[..., Callable[[], None]]:
    """A function that makes calls on "meta"."""
    return importlib.import_module("gpu_machine_code").nt_xent_call  # type: ignore[no-any-return]


@compiler
@pytest.mark.parametrize(
    ("rows", "features", "dtype", "options", "kernel"),
    [
        (65536, 128, torch.bfloat16, {}, "wide_kernel"),
        (65536, 256, torch.float16, {}, "wide_kernel"),
        (50000, 60, torch.bfloat16, {}, "wide_kernel"),
        (65536, 512, torch.bfloat16, {}, "pairs_kernel"),
        (20000, 192, torch.bfloat16, {}, "pairs_kernel"),
        (65536, 768, torch.bfloat16, {}, "pairs_kernel"),
        (65536, 1024, torch.bfloat16, {}, "tiles_kernel"),
        (65536, 32, torch.bfloat16, {}, "strips_kernel"),
        (65536, 128, torch.float32, {}, "tiles_kernel"),
        (8192, 256, torch.bfloat16, {}, "strips_kernel"),
        (65536, 256, torch.bfloat16, {"temperature": 0.01}, "tiles_kernel"),
        (65536, 256, torch.bfloat16, {"tensor": True}, "tiles_kernel"),
        (65536, 256, torch.bfloat16, {"cosine": False}, "tiles_kernel"),
        (32768, 256, torch.bfloat16, {"mask": True}, "tiles_kernel"),
    ],
    ids=str,
)
def test_which_kernel_takes_the_inner_tiles(
    rows: int,
    features: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    kernel: str,
    call: Callable[..., Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "1")
    names = launched(call(rows, features, dtype, **options))
    if options.get("mask"):
        names.remove("symmetric_mask_kernel")
    assert names[1] == kernel
    if kernel in ("wide_kernel", "pairs_kernel"):
        assert names[2] == "tiles_kernel", "the edges"


@compiler
@pytest.mark.parametrize("architecture", [80, 86, 100, 120])
def test_other_architectures_take_the_triton_kernels(
    architecture: int, call: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "1")
    names = launched(call(65536, 256, torch.bfloat16), architecture)
    assert not {"wide_kernel", "pairs_kernel"} & set(names)


@compiler
@pytest.mark.parametrize("value", [None, "0"])
def test_what_is_not_proved_takes_the_triton_kernels(
    value: str | None,
    call: Callable[..., Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if value is not None:
        monkeypatch.setenv("CJEPA_GLUON", value)
    monkeypatch.setattr(hopper.proved, "proofs", lambda: ())
    assert "wide_kernel" not in launched(call(65536, 256, torch.bfloat16))


@compiler
def test_what_is_proved_takes_the_gluon_kernel(
    call: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(hopper.proved, "is_proved", lambda *args, **kw: asked.append(kw) or True)
    assert "wide_kernel" in launched(call(65536, 250, torch.bfloat16))
    assert asked[0] == {
        "architecture": 90,
        "dtype": torch.bfloat16,
        "features": 250,
        "operator": "nt_xent",
        "direction": "forward",
    }


@compiler
def test_a_kernel_that_does_not_compile_is_replaced_with_one_warning(
    call: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def fail(self: hopper.HopperTiles) -> None:
        attempts.append(self.config.kernel)
        raise AttributeError("warp_specialize is gone\nand more")

    monkeypatch.setenv("CJEPA_GLUON", "1")
    monkeypatch.setattr(hopper.HopperTiles, "compile", fail)
    message = r"Gluon kernel wide could not be compiled \(AttributeError: warp_specialize is gone\)"
    with pytest.warns(UserWarning, match=message):
        first = launched(call(65536, 256, torch.bfloat16))
    second = launched(call(65536, 256, torch.bfloat16))  # A second warning would be an error.
    launched(call(65536, 512, torch.bfloat16))
    assert attempts == ["wide", "pairs"]
    assert first == second
    assert first[1] == "strips_kernel"


@compiler
def test_without_gluon_the_triton_kernels_run(
    call: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "1")
    monkeypatch.setitem(sys.modules, "cjepa_kernels.triton.kernels.hopper", None)
    with pytest.warns(UserWarning, match="the Triton kernels run in its place"):
        assert launched(call(65536, 256, torch.bfloat16))[1] == "strips_kernel"


@compiler
def test_schedules_are_made_once_and_take_bounded_memory(
    call: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "1")
    made = []
    make = schedules.make
    monkeypatch.setattr(schedules, "make", lambda *args: made.append(args) or make(*args))
    for rows in (65538, 65538, 65540):
        assert "wide_kernel" in launched(call(rows, 256, torch.bfloat16))
    assert len(made) == 3, "one for each of three panels"
    monkeypatch.setattr(hopper, "TABLE_BYTES", sum(x.bytes for x in hopper._tables.values() if x))
    assert "wide_kernel" in launched(call(65538, 256, torch.bfloat16))
    assert "wide_kernel" not in launched(call(80000, 256, torch.bfloat16))


def test_every_entry_fits_shared_memory() -> None:
    """227 KiB of a program hold the columns that stay, the ring and the barriers."""
    entries = [one for one in configs.table() if one.kernel in ("wide", "pairs")]
    assert {one.kernel for one in entries} == {"wide", "pairs"}
    for one in entries:
        assert one.architecture == hopper.ARCHITECTURE
        columns = 2 * TILE if one.kernel == "wide" else TILE
        ring = one.stages * hopper.TILE_ROWS * (one.step or one.features)
        assert 2 * (columns * one.features + ring) + 1024 <= 227 << 10, one
