"""Launch plans without a GPU: a fake driver runs the kernels of a plan in Triton's interpreter.

Each operator is registered once more, in a namespace of its own and for CPU tensors, with the
kernel that replays plans. A replayed call must give the bits of the usual code for other tensors
and numbers than those that were recorded. Run the tests with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import gc
import os
import resource
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("TRITON_INTERPRET=1 runs kernels on CPU tensors", allow_module_level=True)

import fake_driver
import triton
import triton.language as tl
from planned_calls import (
    NAMESPACE,
    NT_XENT,
    SELF,
    Operators,
    hierarchy,
    hierarchy_backward,
    nt_xent_backward,
    nt_xent_forward,
    rectangle,
    rectangle_backward,
    rows_of_a_batch,
    rows_of_a_batch_backward,
    same,
)

from cjepa_kernels import backends
from cjepa_kernels.backends import compiled_module
from cjepa_kernels.triton import OPERATORS, configs, launch, planned, plans, recording
from cjepa_kernels.triton.temperature import Temperature, lowest_constant_temperature

C: Any = compiled_module()
if C is None:
    pytest.skip(backends()["native"].reason, allow_module_level=True)
if fake_driver.COMPILER is None:
    pytest.skip("a C++ compiler builds the fake driver", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# An operator can be registered only once in a process, and pytest-xdist may come back to a module.
@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> fake_driver.FakeDriver:
    return fake_driver.FakeDriver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def registered(driver: fake_driver.FakeDriver) -> Operators:
    return Operators(driver)


@pytest.fixture
def operators(registered: Operators, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operators]:
    """The operators with the fake driver in the place of the real one, and no plans yet."""
    path = str(registered.driver.path)
    monkeypatch.setenv("CJEPA_LAUNCH_PLANS", "1")
    monkeypatch.setattr(planned, "_open_driver", lambda: C.open_driver(path, path))
    monkeypatch.setattr(plans, "machine", registered.driver.describe)
    monkeypatch.setattr(planned, "_warned", False)
    C.forget_plans()
    registered.python_calls = 0
    registered.driver.launches.clear()
    registered.driver.library.fake_set_context(fake_driver.CONTEXT)
    yield registered
    errors, registered.driver.errors[:] = list(registered.driver.errors), []
    assert not errors
    C.forget_plans()


Arguments = Callable[[int], tuple[Any, ...]]


def check_replays(operators: Operators, name: str, arguments: Arguments) -> None:
    """Call an operator until it has a plan, then compare further calls with the usual code.

    Args:
        operators: The operators.
        name: Name of the operator, or of its backward.
        arguments: Makes the arguments of the call of a number, which differ in values only.
    """
    function = OPERATORS[name.removesuffix("_backward")][name.endswith("_backward")]
    before = C.plan_count()
    operators(name, *arguments(0))
    recorded = arguments(1)
    same(operators(name, *recorded), function(*recorded))
    assert C.plan_count() == before + 1, planned.refusals().get(name)
    in_python = operators.python_calls
    operators.driver.launches.clear()
    other = arguments(2)
    same(operators(name, *other), function(*other))
    assert operators.python_calls == in_python
    assert operators.driver.launches


@pytest.mark.parametrize("case", NT_XENT)
def test_nt_xent_is_replayed(
    operators: Operators, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = NT_XENT[case]
    # An architecture has descriptors or not; half of the cases take one, half the other.
    monkeypatch.setattr(launch, "has_tma", lambda _: list(NT_XENT).index(case) % 2 == 0)
    monkeypatch.setattr(launch, "ONE_LAUNCH_BLOCKS", 1 if "batch" in options else 16)
    check_replays(operators, "nt_xent", lambda call: nt_xent_forward(call, **options))
    check_replays(operators, "nt_xent_backward", lambda call: nt_xent_backward(call, **options))


@pytest.mark.parametrize(
    ("dtype", "tensor", "paired"),
    [(torch.float32, False, False), (torch.bfloat16, True, False), (torch.bfloat16, False, True)],
    ids=str,
)
def test_cross_logsumexp_is_replayed(
    operators: Operators, dtype: torch.dtype, tensor: bool, paired: bool
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "tensor": tensor, "paired": paired}
    check_replays(operators, "cross_logsumexp", lambda call: rectangle(call, **options))
    for of_x, of_y in ((True, True), (True, False), (False, True)):
        check_replays(
            operators,
            "cross_logsumexp_backward",
            lambda call, of_x=of_x, of_y=of_y: rectangle_backward(  # type: ignore[misc]
                call, of_x=of_x, of_y=of_y, **options
            ),
        )


@pytest.mark.parametrize("case", SELF)
def test_self_logsumexp_is_replayed(operators: Operators, case: str) -> None:
    options: dict[str, Any] = SELF[case]
    check_replays(operators, "self_logsumexp", lambda call: rows_of_a_batch(call, **options))
    check_replays(
        operators,
        "self_logsumexp_backward",
        lambda call: rows_of_a_batch_backward(call, **options),
    )


@pytest.mark.parametrize(
    ("loss_type", "normalization", "reduction", "mask", "dtype"),
    [
        ("mse", "none", "mean", False, torch.float32),
        ("smoothl1", "layer", "mean", True, torch.bfloat16),
        ("huber", "l2", "sum", True, torch.float16),
        ("mse", "layer", "none", False, torch.float32),
    ],
)
def test_prediction_loss_is_replayed(
    operators: Operators,
    loss_type: str,
    normalization: str,
    reduction: str,
    mask: bool,
    dtype: torch.dtype,
) -> None:
    options = {
        "dtype": dtype,
        "loss_type": loss_type,
        "normalization": normalization,
        "reduction": reduction,
        "mask": mask,
    }
    check_replays(operators, "prediction_loss", lambda call: hierarchy(call, **options))
    check_replays(
        operators, "prediction_loss_backward", lambda call: hierarchy_backward(call, **options)
    )


def repeat(operators: Operators, times: int, name: str, *args: Any) -> Any:
    """Call an operator several times with the same arguments; its last results."""
    for _ in range(times):
        out = operators(name, *args)
    return out


def test_a_call_that_is_not_repeated_makes_no_plan(operators: Operators) -> None:
    for batch in range(8, 12):
        operators("nt_xent", *nt_xent_forward(0, batch=batch))
    assert C.plan_count() == 0


def test_everything_that_launches_depend_on_is_in_the_key(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = nt_xent_forward(0)
    repeat(operators, 2, "nt_xent", *base)
    assert C.plan_count() == 1
    z_i = base[0]
    unaligned = torch.empty(z_i.numel() + 1)[1:].view(z_i.shape).copy_(z_i)
    boundary = lowest_constant_temperature()

    def changed(**options: Any) -> tuple[Any, ...]:
        return nt_xent_forward(0, **options)

    different = [
        (z_i.contiguous(), *base[1:]),
        (unaligned, *base[1:]),
        (*base[:4], boundary * 0.999, *base[5:]),
        changed(batch=21),
        changed(dtype=torch.bfloat16),
        changed(cosine=False),
        changed(reduction="sum"),
        changed(mask=True),
        changed(tensor=True),
        changed(product_dtype=torch.bfloat16),
    ]
    for args in different:
        same(operators("nt_xent", *args), OPERATORS["nt_xent"][0](*args))
    assert operators.python_calls == 2 + len(different)
    for variable, value in (
        ("CJEPA_WORKSPACE_MIB", "0.03"),
        ("CJEPA_GLUON", "1"),
        ("CJEPA_LAUNCH_PLANS", "0"),
    ):
        with monkeypatch.context() as context:
            context.setenv(variable, value)
            operators("nt_xent", *base)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        operators("nt_xent", *base)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert operators.python_calls == 2 + len(different) + 4
    operators("nt_xent", *base)
    assert operators.python_calls == 2 + len(different) + 4


def test_the_boundary_is_where_the_shift_changes() -> None:
    boundary = lowest_constant_temperature()
    below = torch.nextafter(torch.tensor(boundary).double(), torch.tensor(0.0).double()).item()
    assert Temperature(boundary, None).constant_shift(True)
    assert not Temperature(below, None).constant_shift(True)


def test_no_plan_where_two_tensors_are_one(operators: Operators) -> None:
    args = nt_xent_forward(0)
    aliased = (args[0], args[0], *args[2:])
    same(repeat(operators, 5, "nt_xent", *aliased), OPERATORS["nt_xent"][0](*aliased))
    assert C.plan_count() == 0
    assert "share memory" in planned.refusals()["nt_xent"]


def test_no_plan_where_pytorch_computes(operators: Operators) -> None:
    def doubled(x: Tensor) -> tuple[Tensor, ...]:
        return (x * 2,)

    operators.add("doubled", "(Tensor x) -> Tensor", lambda x: doubled(x)[0])
    x = torch.randn(4)
    same(repeat(operators, 4, "doubled", x), x * 2)
    assert C.plan_count() == 0
    assert "aten.mul" in planned.refusals()["doubled"]


@triton.jit
def add_kernel(x, other, out):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 4)
    tl.store(out + at, tl.load(x + at) + tl.load(other + at))


def test_memory_from_outside_must_be_permanent(operators: Operators) -> None:
    """A plan would take a tensor that is not of the call for memory that the call fills."""
    others = {
        "outside": torch.arange(4.0),
        "permanent": recording.keep_forever(torch.arange(4.0)),
    }
    for name, other in others.items():

        def add(x: Tensor, other: Tensor = other) -> Tensor:
            out = x.new_empty(x.shape)
            recording.run_kernel(add_kernel, 1, x=x, other=other, out=out)
            return out

        operators.add(name, "(Tensor x) -> Tensor", add)
        for _ in range(4):
            x = torch.randn(4)
            same(operators(name, x), x + other)
        assert C.plan_count() == (name == "permanent")
    assert "neither got nor allocated" in planned.refusals()["outside"]


def test_no_plan_of_very_many_launches(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MOST_LAUNCHES", 2)
    args = nt_xent_forward(0)
    same(repeat(operators, 3, "nt_xent", *args), OPERATORS["nt_xent"][0](*args))
    assert C.plan_count() == 0
    assert "more than 2 kernels" in planned.refusals()["nt_xent"]


def test_no_plan_where_the_machine_code_differs(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators.driver, "parameter_bytes", 8)
    args = nt_xent_forward(0)
    with pytest.warns(UserWarning, match="parameter of another size.*CJEPA_LAUNCH_PLANS=0"):
        repeat(operators, 2, "nt_xent", *args)
    same(repeat(operators, 3, "nt_xent", *args), OPERATORS["nt_xent"][0](*args))
    assert C.plan_count() == 0


def test_no_plan_where_it_is_not_allowed(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("0", ""):  # Without the variable, what was not proved is not allowed.
        monkeypatch.setenv("CJEPA_LAUNCH_PLANS", value)
        repeat(operators, 3, "nt_xent", *nt_xent_forward(0))
    assert C.plan_count() == 0


def test_no_plan_while_launches_are_watched(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    repeat(operators, 3, "nt_xent", *nt_xent_forward(0))
    assert C.plan_count() == 0


def test_an_error_while_a_plan_is_recorded_leaves_the_result(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(launch: Any) -> Any:
        raise AttributeError("metadata")

    monkeypatch.setattr(plans, "machine", fail)
    args = nt_xent_forward(0)
    with pytest.warns(UserWarning, match="could not be made"):
        same(repeat(operators, 2, "nt_xent", *args), OPERATORS["nt_xent"][0](*args))


class FullMemoryError(RuntimeError):
    """Stands for torch.OutOfMemoryError."""


def test_an_exception_in_python_keeps_its_type_and_no_tensors(operators: Operators) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def fail(x: Tensor) -> Tensor:
        temporary = x.new_empty(1000)
        alive.append(weakref.ref(temporary))
        raise FullMemoryError("no memory is left")

    operators.add("fails", "(Tensor x) -> Tensor", fail)
    x = torch.ones(2)
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(FullMemoryError, match="no memory is left"):
                operators("fails", x)
        # Compiled programs do not ask for the original exception.
        with pytest.raises(RuntimeError, match="fails failed in Python"):
            getattr(torch.ops, NAMESPACE).fails(x)
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()
    # The exception of that call is not the one of another failure.
    with pytest.raises(RuntimeError, match="another"):
        planned.raise_original(RuntimeError("another"))
    operators("nt_xent", *nt_xent_forward(0))
    with pytest.raises(RuntimeError, match="of another call"):
        planned.raise_original(RuntimeError("fails failed in Python: of another call"))


def test_a_recording_that_fails_gives_its_memory_back(operators: Operators) -> None:
    """The second try of a call that needs nearly all memory has as much as the first."""
    alive: list[weakref.ref[Tensor]] = []

    def full(x: Tensor) -> Tensor:
        assert all(ref() is None for ref in alive)
        temporary = x.new_empty(1000)
        alive.append(weakref.ref(temporary))
        if len(alive) == 2:  # The first call does not record.
            raise FullMemoryError("no memory is left")
        return x.clone()

    operators.add("full", "(Tensor x) -> Tensor", full)
    x = torch.ones(2)
    same(operators("full", x), x)
    with pytest.warns(UserWarning, match="FullMemoryError: no memory is left"):
        same(operators("full", x), x)
    assert len(alive) == 3


def test_a_nan_makes_no_plan(operators: Operators) -> None:
    args = list(nt_xent_forward(0, constant=False))
    for position in (4, 6):  # The temperature, then eps.
        broken = [*args[:position], float("nan"), *args[position + 1 :]]
        repeat(operators, 2, "nt_xent", *broken)
        assert "is NaN" in planned.refusals()["nt_xent"]
        same(operators("nt_xent", *args), OPERATORS["nt_xent"][0](*args))
        C.forget_plans()


@triton.jit
def copy_kernel(x, out, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, block)
    tl.store(out + at, tl.load(x + at, mask=at < count), mask=at < count)


def test_a_part_of_an_argument_is_no_other_argument(operators: Operators) -> None:
    def tail(x: Tensor, other: Tensor) -> Tensor:
        out = x.new_empty(4)
        recording.run_kernel(copy_kernel, 1, x=x[4:], out=out, count=4, block=4)
        return out

    operators.add("tail", "(Tensor x, Tensor other) -> Tensor", tail)
    memory = torch.arange(12.0)
    repeat(operators, 3, "tail", memory[:8], memory[4:])  # The tail begins where ``other`` does.
    x = torch.randn(8)
    same(operators("tail", x, torch.randn(8)), x[4:])


def test_the_remainder_of_an_address_is_in_the_key(operators: Operators) -> None:
    """A part of a tensor is aligned or not by the remainder of the tensor's own address."""
    memory = torch.arange(16.0)
    operators.add("whole", "(Tensor x) -> Tensor", lambda x: copied(x))
    for first in range(4):
        repeat(operators, 2, "whole", memory[first : first + 8])
        assert C.plan_count() == first + 1
    repeat(operators, 2, "whole", memory[4:12])
    assert C.plan_count() == 4


def copied(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    recording.run_kernel(copy_kernel, 1, x=x, out=out, count=x.numel(), block=16)
    return out


def test_an_operator_of_any_schema(operators: Operators) -> None:
    schema = "(Tensor[] parts, Tensor? other, float[] weights, str mode, bool flag) -> Tensor[]"
    operators.add("any", schema, lambda parts, *_: [copied(x) for x in parts])
    parts = [torch.randn(5), torch.randn(3)]
    for _ in range(3):
        same(operators("any", parts, None, [1.0], "mode", True), parts)
    assert C.plan_count() == 1


def test_an_empty_grid_launches_nothing(operators: Operators) -> None:
    def nothing(x: Tensor) -> Tensor:
        out = copied(x)
        recording.run_kernel(copy_kernel, 0, x=x, out=out, count=0, block=16)
        return out

    operators.add("nothing", "(Tensor x) -> Tensor", nothing)
    x = torch.randn(5)
    same(repeat(operators, 4, "nothing", x), x)
    assert operators.driver.launches == ["copy_kernel"] * 2


def test_a_capture_does_not_use_up_the_tries(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = nt_xent_forward(0)
    with monkeypatch.context() as context:
        context.setattr(planned, "_may_record", lambda *_: False)
        repeat(operators, 6, "nt_xent", *args)
    operators("nt_xent", *args)
    assert C.plan_count() == 1


def test_the_dispatcher_accepts_the_operators(operators: Operators) -> None:
    args = nt_xent_forward(0)
    repeat(operators, 2, "nt_xent", *args)
    overload = getattr(torch.ops, NAMESPACE).nt_xent.default
    in_python = operators.python_calls
    torch.library.opcheck(overload, args, test_utils="test_schema")
    assert operators.python_calls == in_python


def test_a_call_leaks_nothing(operators: Operators) -> None:
    operators.add("named", "(Tensor x, str mode) -> Tensor", lambda x, mode: copied(x))
    x, mode = torch.randn(4), "m" * 100_000
    repeat(operators, 3, "named", x, mode)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    repeat(operators, 1000, "named", x, mode)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000, f"{grown} KiB"


def test_a_plan_without_memory_leaves_the_call_to_python(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plan = plans.make_plan

    def greedy(*args: Any, **named: Any) -> bytes:
        """The same plan with a workspace of 2**60 bytes."""
        plan = bytearray(make_plan(*args, **named))
        at = 8
        (lists,) = struct.unpack_from("<I", plan, at)
        at += 4 + 4 * lists
        (results,) = struct.unpack_from("<I", plan, at)
        at += 4
        for _ in range(results):
            (dimensions,) = struct.unpack_from("<I", plan, at + 4)
            at += 4 + 2 * (4 + 8 * dimensions)
        struct.pack_into("<q", plan, at, 2**60)
        return bytes(plan)

    monkeypatch.setattr(plans, "make_plan", greedy)
    args = nt_xent_forward(0)
    repeat(operators, 2, "nt_xent", *args)
    assert C.plan_count() == 1
    in_python = operators.python_calls
    same(operators("nt_xent", *args), OPERATORS["nt_xent"][0](*args))
    assert operators.python_calls == in_python + 1


def test_tuning_forgets_plans(operators: Operators) -> None:
    args = nt_xent_forward(0)
    repeat(operators, 2, "nt_xent", *args)
    with configs.tuned([]):
        assert C.plan_count() == 0
        repeat(operators, 2, "nt_xent", *args)
        assert C.plan_count() == 1
    assert C.plan_count() == 0
    repeat(operators, 2, "nt_xent", *args)
    configs.forget()
    assert C.plan_count() == 0


def test_results_are_tensors_of_their_own(operators: Operators) -> None:
    args = nt_xent_forward(0)
    out = repeat(operators, 3, "nt_xent", *args)
    expected = OPERATORS["nt_xent"][0](*args)
    for x in out:
        x.fill_(7)
        assert not x._is_view()
    same(operators("nt_xent", *args), expected)


def test_threads_share_plans(operators: Operators) -> None:
    args = [nt_xent_forward(call) for call in range(8)]
    expected = [OPERATORS["nt_xent"][0](*a) for a in args]
    repeat(operators, 2, "nt_xent", *args[0])
    in_python = operators.python_calls
    # Triton's interpreter serves one thread at a time, so the calls alternate between threads.
    with ThreadPoolExecutor(1) as other:
        for k in range(0, 8, 2):
            same(operators("nt_xent", *args[k]), expected[k])
            same(other.submit(operators, "nt_xent", *args[k + 1]).result(), expected[k + 1])
    assert operators.python_calls == in_python


def test_nothing_is_opened_when_the_package_is_imported() -> None:
    """The operators get their kernels, and neither CUDA nor Triton is touched."""
    if sys.platform != "linux":
        pytest.skip("/proc/self/maps is a file of Linux")
    program = """
import sys, torch
torch.version.cuda = "13.0"  # As a PyTorch for GPUs says.
import cjepa_kernels
for name in ("nt_xent", "cross_logsumexp_backward", "prediction_loss"):
    text = torch._C._dispatch_dump(f"cjepa_kernels::{name}")
    assert "CUDA: registered at" in text and "planned_operator" in text.split("CUDA: ")[-1], text
with open("/proc/self/maps") as file:
    assert "libcuda.so" not in file.read()
assert "triton" not in sys.modules and not torch.cuda.is_initialized()
z = torch.randn(4, 8)
assert torch.isfinite(cjepa_kernels.nt_xent(z, z + 1).loss)
"""
    environment = os.environ | {"CJEPA_LAUNCH_PLANS": "1", "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
