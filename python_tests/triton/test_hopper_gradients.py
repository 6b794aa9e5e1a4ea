"""The backward by the Gluon kernels for Hopper: whole calls, and when the kernels are chosen."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from repository import ROOT
from tolerances import relative_error
from torch import Tensor

pytest.importorskip("triton")

import emulated_kernels
from emulated_kernels import EmulatedKernel

from cjepa_kernels import backends, cross_logsumexp, nt_xent
from cjepa_kernels.backends import triton_is_interpreted
from cjepa_kernels.triton import (
    OPERATORS,
    configs,
    hopper,
    hopper_gradients,
    launch,
    plans,
    recording,
)
from cjepa_kernels.triton.configs import TILE
from cjepa_kernels.triton.gradient_schedules import BOX

sys.path.insert(0, str(ROOT / "bench"))
# Both kinds of kernels round the same G, and only a number that lies between two of its dtype may
# go the other way. The largest difference that was seen is 2e-4.
SAME_G = 5e-4
# What rounding the operands and G may cause: that of python_tests/triton/test_kernels.py.
OF_ROUNDING = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_kernels.forget(monkeypatch)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, forget: None) -> dict[str, EmulatedKernel]:
    """The backward of small inputs goes by the emulated kernels, the forward does not."""
    monkeypatch.setattr(hopper, "select", lambda tiles: None)
    monkeypatch.setattr(hopper_gradients, "LEAST_BUSY", 0.0)
    return emulated_kernels.emulate(monkeypatch, emulated_kernels.load_kernels(), programs=3)


interpreted = pytest.mark.skipif(
    not (triton_is_interpreted() and backends()["triton"].available),
    reason="the other kernels run in Triton's interpreter: TRITON_INTERPRET=1",
)


def rows_of(number: int, features: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, features, generator=generator).add_(0.5).to(dtype)


def views(batch: int, features: int, dtype: torch.dtype) -> list[Tensor]:
    x, y = (rows_of(batch, features, seed, torch.float32) for seed in (1, 2))
    return [x.to(dtype), (x + 0.7 * y).to(dtype)]


def gradients(
    call: Callable[..., Tensor], inputs: list[Tensor], wanted: list[bool]
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(needs) for x, needs in zip(inputs, wanted, strict=True)]
    found = torch.autograd.grad(call(*leaves), [x for x in leaves if x.requires_grad])
    return list(found)


def compare(
    call: Callable[..., Tensor],
    inputs: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    wanted: list[bool] | None = None,
) -> None:
    """Compare the gradients with those of the Triton kernels and of the reference."""
    wanted = wanted or [True] * len(inputs)
    new = gradients(lambda *x: call(*x, backend="triton"), inputs, wanted)
    monkeypatch.setenv("CJEPA_GLUON", "0")
    today = gradients(lambda *x: call(*x, backend="triton"), inputs, wanted)
    exact = gradients(
        lambda *x: call(*x, backend="reference"), [x.double() for x in inputs], wanted
    )
    for got, other, reference in zip(new, today, exact, strict=True):
        assert relative_error(got, other.double()) < SAME_G
        assert relative_error(got, reference) < OF_ROUNDING[inputs[0].dtype]


def launched_by(emulated: dict[str, EmulatedKernel]) -> dict[str, int]:
    return {name: kernel.launches for name, kernel in emulated.items() if kernel.launches}


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("batch", "features", "dtype", "reduction", "kernels"),
    [
        (261, 60, torch.bfloat16, "mean", {"hopper_owned": 1}),
        (100, 200, torch.float16, "none", {"hopper_owned": 1}),
        (70, 768, torch.float16, "mean", {"hopper_tiles": 3, "hopper_products": 3}),
    ],
)
def test_nt_xent_by_the_kernels(
    batch: int,
    features: int,
    dtype: torch.dtype,
    reduction: str,
    kernels: dict[str, int],
    emulated: dict[str, EmulatedKernel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A square of one block fits the workspace, so two blocks take three squares.
    monkeypatch.setenv("CJEPA_WORKSPACE_MIB", "0.13")

    def call(*inputs: Tensor, backend: Any) -> Tensor:
        loss = nt_xent(*inputs, reduction=reduction, backend=backend).loss  # type: ignore[arg-type]
        return (loss * torch.linspace(-1, 2, loss.numel())).sum()

    compare(call, views(batch, features, dtype), monkeypatch)
    assert launched_by(emulated) == kernels


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("rows", "columns", "features", "wanted", "kernels"),
    [
        (300, 130, 64, [True, True], {"hopper_owned": 2}),
        (130, 300, 128, [False, True], {"hopper_owned": 1}),
        (140, 100, 512, [True, True], {"hopper_strips": 2, "hopper_products": 4}),
    ],
)
def test_a_rectangle_by_the_kernels(
    rows: int,
    columns: int,
    features: int,
    wanted: list[bool],
    kernels: dict[str, int],
    emulated: dict[str, EmulatedKernel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CJEPA_WORKSPACE_MIB", "0.04")

    def call(*inputs: Tensor, backend: Any) -> Tensor:
        out = cross_logsumexp(*inputs, backend=backend)
        weights = [torch.linspace(-1, 2, n) for n in (rows, columns)]
        return (out.row_lse * weights[0]).sum() + (out.column_lse * weights[1]).sum()

    inputs = [rows_of(n, features, seed, torch.bfloat16) for n, seed in ((rows, 1), (columns, 2))]
    compare(call, inputs, monkeypatch, wanted)
    assert launched_by(emulated) == kernels


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
def test_many_rows_are_shared_as_whole_blocks(
    emulated: dict[str, EmulatedKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper_gradients.gradient_schedules, "WHOLE_BLOCKS_FROM", 1)

    def call(*inputs: Tensor, backend: Any) -> Tensor:
        return nt_xent(*inputs, backend=backend).loss

    compare(call, views(261, 64, torch.bfloat16), monkeypatch)
    assert launched_by(emulated) == {"hopper_owned": 1}


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
def test_the_check_for_a_device_passes_by_the_kernels(
    emulated: dict[str, EmulatedKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_hopper = importlib.import_module("gpu_hopper")
    x, y = gpu_hopper.views(258, 64, torch.bfloat16, device="cpu")
    assert gpu_hopper.backward_parity(x, y, sample=100)["passed"]
    assert launched_by(emulated) == {"hopper_owned": 2}
    assert gpu_hopper.uses_gluon_backward(x, y)
    monkeypatch.setattr(hopper, "SMALLEST_BLOCKS", 128)
    assert not gpu_hopper.uses_gluon_backward(x, y)


@interpreted
@pytest.mark.parametrize(("features", "kernel"), [(64, "hopper_owned"), (512, "hopper_products")])
def test_a_plan_can_repeat_the_launches(
    features: int,
    kernel: str,
    emulated: dict[str, EmulatedKernel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recorded call does nothing but launch, and all memory of its launches is known."""
    monkeypatch.setenv("CJEPA_WORKSPACE_MIB", "0.04")
    forward, backward = OPERATORS["nt_xent"]
    x, y = views(70, features, torch.bfloat16)
    options = (0.1, True, 1e-8, "mean", None)
    out = forward(x, y, None, None, *options, False)
    saved = (out.shift, out.log_sum, out.positive, out.saved_for_backward)
    tensors = (torch.ones(()), x, y, *saved)
    arguments = (*tensors[:3], None, None, *saved, *options)
    backward(*arguments)  # Makes the schedules, which stay.
    with recording.record() as recorded:
        results = backward(*arguments)
    assert recorded.refusal == ""
    assert emulated[kernel].launches > 1
    memory = plans.Memory(100, recorded.allocated)
    for slot, tensor in enumerate([*tensors, *results]):
        memory.add(tensor, slot)
    found = 0
    for launch_ in recorded.launches:
        for value in launch_.arguments.values():
            tensor = getattr(value, "matrix", value)  # of a descriptor of the emulator
            if isinstance(tensor, Tensor) and tensor.numel() > 0:
                found += 1
                assert recording.is_permanent(tensor) or memory.find(tensor)
    assert found > 20


def launched(call: Callable[[], Any], architecture: int = 90) -> list[str]:
    """Names of the kernels that the backward of a call would launch."""
    gpu_machine_code = importlib.import_module("gpu_machine_code")
    names = [one.name for one in gpu_machine_code.launches(architecture, call)]
    return names[len(names) - names[::-1].index("nt_xent_rows_kernel") :]


compiler = pytest.mark.skipif(triton_is_interpreted(), reason="the interpreter has no compiler")


@pytest.fixture
def call(forget: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], None]]:
    """A function that makes calls on "meta", of a device with 132 multiprocessors."""
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    return importlib.import_module("gpu_machine_code").nt_xent_call  # type: ignore[no-any-return]


OWNED = ["clear_kernel", "hopper_owned_kernel"]
STRIPS = ["clear_kernel", "reorder_kernel", "hopper_strips_kernel", "hopper_products_kernel"]
TILES = ["clear_kernel", "reorder_kernel", "hopper_tiles_kernel", "hopper_products_kernel"]
OWNED_BY_TRITON = ["owned_rows_kernel", "finish_kernel"]
SQUARES = ["coefficient_tiles_kernel", "products_kernel"]


@compiler
@pytest.mark.parametrize(
    ("rows", "features", "dtype", "options", "kernels"),
    [
        (65536, 60, torch.bfloat16, {}, OWNED),
        (65536, 128, torch.float16, {}, OWNED),
        (16384, 256, torch.bfloat16, {}, OWNED),
        (65536, 512, torch.bfloat16, {}, STRIPS),
        (16386, 512, torch.float16, {}, STRIPS),
        (65536, 768, torch.bfloat16, {}, TILES),
        (65536, 1024, torch.float16, {}, TILES),
        (65536, 384, torch.bfloat16, {}, SQUARES),
        (65536, 32, torch.bfloat16, {}, ["owned_rows_kernel"]),
        (16000, 256, torch.bfloat16, {}, ["owned_rows_kernel"]),
        (65536, 512, torch.float32, {}, SQUARES),
        (65536, 256, torch.bfloat16, {"temperature": 0.01}, SQUARES),
        (65536, 256, torch.bfloat16, {"tensor": True}, SQUARES),
        (65536, 256, torch.bfloat16, {"cosine": False}, SQUARES),
        (32768, 256, torch.bfloat16, {"mask": True}, SQUARES),
    ],
    ids=str,
)
def test_which_kernels_take_the_backward(
    rows: int,
    features: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    kernels: list[str],
    call: Callable[..., Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "1")
    names = launched(call(rows, features, dtype, **options))
    names = [name for name in names if name != "symmetric_mask_kernel"]
    assert names[-1] == "finish_kernel"
    assert list(dict.fromkeys(names[:-1])) == kernels


@compiler
@pytest.mark.usefixtures("call")
@pytest.mark.parametrize(
    ("options", "tiles", "products"),
    [
        ({"views": 2}, "wide_kernel", "hopper_owned_kernel"),
        ({}, "wide_kernel", "owned_rows_kernel"),
        ({"paired": True}, "tiles_kernel", "owned_rows_kernel"),
        ({"views": 2, "classed": True}, "tiles_kernel", "coefficient_tiles_kernel"),
    ],
    ids=str,
)
def test_which_kernels_take_rows_against_themselves(
    options: dict[str, Any], tiles: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Gluon kernels of the backward leave out two views' positives, and nothing else."""
    monkeypatch.setenv("CJEPA_GLUON", "1")
    gpu_machine_code = importlib.import_module("gpu_machine_code")
    call = gpu_machine_code.self_logsumexp_call(32768, 128, torch.bfloat16, **options)
    names = [one.name for one in gpu_machine_code.launches(90, call)]
    assert names[:2] == ["pack_kernel", tiles]
    backward = names[len(names) - names[::-1].index("self_logsumexp_kernel") :]
    assert products in backward
    others = {"hopper_owned_kernel", "owned_rows_kernel", "coefficient_tiles_kernel"} - {products}
    assert not others & set(backward)


@compiler
@pytest.mark.parametrize(
    ("features", "title", "kernels"),
    [(256, "squares", STRIPS), (512, "tiles", TILES), (128, "64 columns", OWNED)],
)
def test_an_entry_of_the_table_chooses_other_kernels(
    features: int,
    title: str,
    kernels: list[str],
    call: Callable[..., Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "1")
    gpu_hopper = importlib.import_module("gpu_hopper")
    with configs.tuned(gpu_hopper.ALTERNATIVES[features][title]):
        names = launched(call(65536, features, torch.bfloat16))
    assert list(dict.fromkeys(names[:-1])) == kernels


@compiler
@pytest.mark.parametrize("architecture", [80, 86, 100, 120])
def test_other_architectures_take_the_triton_kernels(
    architecture: int, call: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "1")
    for features in (256, 512):
        names = launched(call(65536, features, torch.bfloat16), architecture)
        assert not [name for name in names if name.startswith("hopper_")]


@compiler
def test_what_is_not_proved_takes_the_triton_kernels(
    call: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof of the forward is none of the backward."""
    asked = []

    def is_proved(*_: Any, **of: Any) -> bool:
        asked.append(of)
        return bool(of["direction"] == "forward")

    monkeypatch.setattr(hopper.proved, "is_proved", is_proved)
    assert launched(call(65536, 250, torch.bfloat16)) == OWNED_BY_TRITON
    assert asked[-1] == {
        "architecture": 90,
        "dtype": torch.bfloat16,
        "features": 250,
        "operator": "nt_xent",
        "direction": "backward",
    }
    monkeypatch.setattr(hopper.proved, "is_proved", lambda *_, **__: True)
    assert launched(call(65536, 250, torch.bfloat16)) == [*OWNED, "finish_kernel"]


@compiler
def test_a_kernel_that_does_not_compile_is_replaced_with_one_warning(
    call: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "1")
    monkeypatch.setitem(sys.modules, "cjepa_kernels.triton.kernels.hopper_owned", None)
    monkeypatch.setitem(sys.modules, "cjepa_kernels.triton.kernels.hopper_squares", None)
    with pytest.warns(UserWarning, match="Gluon kernel hopper_owned could not be compiled"):
        owned = launched(call(65536, 256, torch.bfloat16))
    # A second warning would be an error.
    assert owned == launched(call(65536, 256, torch.bfloat16)) == OWNED_BY_TRITON
    squares = launched(call(65536, 512, torch.bfloat16))
    assert set(squares) == {*SQUARES, "finish_kernel"}


@compiler
def test_a_launch_plan_has_room_for_the_launches(
    call: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "1")
    for features in (512, 768):
        assert len(launched(call(65536, features, torch.bfloat16))) < recording.MOST_LAUNCHES


@compiler
@pytest.mark.parametrize("by_tiles", [False, True])
def test_the_workspace_holds_a_square(by_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for mebibytes in (3, 64, 256):
        for rows, columns in ((512, 512), (150, 2000), (1300, 1300)):
            most = mebibytes * 2**20 // (2 * BOX * BOX)
            side = hopper_gradients.gradient_schedules.square_side(
                rows,
                columns,
                132,
                768,
                tile_boxes=3,
                by_tiles=by_tiles,
                self_contrast=rows == columns,
                most_boxes=most,
            )
            boxes = hopper_gradients.gradient_schedules.boxes(
                min(side, rows), min(side, columns), by_tiles=by_tiles
            )
            assert boxes.total <= most
            assert boxes.total > most / 4 or side == max(rows, columns)


def test_every_entry_fits_shared_memory_and_does_not_wait_for_itself() -> None:
    """227 KiB of a program; a group may be some slots of the ring ahead of the other one."""
    least_stages = {"hopper_owned": 2, "hopper_strips": 2, "hopper_tiles": 3, "hopper_products": 2}
    found = set()
    gpu_hopper = importlib.import_module("gpu_hopper")
    alternatives = [
        one
        for titles in gpu_hopper.ALTERNATIVES.values()
        for entries in titles.values()
        for one in entries
        if one.warps > 0
    ]
    for one in (*configs.table(), *alternatives):
        if one.kernel not in least_stages:
            continue
        found.add(one.kernel)
        assert one.architecture == hopper.ARCHITECTURE
        least = 3 if one.pipelined else least_stages[one.kernel]
        assert one.stages >= least, one
        if one.kernel == "hopper_owned":
            numbers = (TILE + one.stages * one.columns) * one.features
        elif one.kernel == "hopper_strips":
            assert one.features % one.step == 0
            numbers = TILE * one.features + one.stages * BOX * one.step
        else:
            assert one.rows in (2 * BOX, 3 * BOX)
            assert one.columns == 4 * BOX
            numbers = one.stages * (one.rows + one.columns) * BOX
        assert 2 * numbers + 1024 <= 227 << 10, one
    assert found == set(least_stages)
