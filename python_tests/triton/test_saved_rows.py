"""Rows that the Triton forward of NT-Xent saves: same bits, fewer launches, bounded memory.

Run the tests with TRITON_INTERPRET=1, or on a GPU.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from sample_inputs import detached, in_order, nt_xent_backward_inputs, nt_xent_inputs
from torch import Tensor

from cjepa_kernels import backends, nt_xent, ops
from cjepa_kernels.functional import dispatch

if not backends()["triton"].available:
    pytest.skip(backends()["triton"].reason, allow_module_level=True)

from cjepa_kernels.triton.recording import run_kernel
from cjepa_kernels.triton.saved_rows import Form, fits, form_of, row_bytes, saved_bytes

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET", "0") == "1" else "cuda"
LAUNCHING = ("pack", "gradients", "prepare", "tiles", "nt_xent")
pytestmark = pytest.mark.usefixtures("poisoned_memory", "without_plans")


@pytest.fixture
def without_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches are noted in Python, which a launch plan passes by."""
    monkeypatch.setenv("CJEPA_LAUNCH_PLANS", "0")


class Case(NamedTuple):
    """A call of ``nt_xent`` with an upstream gradient."""

    pairs: int
    features: int
    dtype: torch.dtype
    upstream: float = 1.0
    options: dict[str, Any] = {}  # noqa: RUF012


CASES = {
    "one_row": Case(1, 1, torch.float32),
    "bf16": Case(70, 64, torch.bfloat16, upstream=-3.0),
    "fp16": Case(66, 100, torch.float16, options={"reduction": "sum"}),
    "planes": Case(9, 33, torch.float32, upstream=1e30),
    "zero": Case(9, 33, torch.bfloat16, upstream=0.0),
    "nan": Case(9, 33, torch.bfloat16, upstream=float("nan")),
    "low": Case(20, 17, torch.bfloat16, options={"temperature": 0.01}),
    "dot": Case(
        20, 17, torch.float16, options={"temperature": 1.0, "use_cosine_similarity": False}
    ),
    "tensor": Case(20, 17, torch.float32, options={"temperature": torch.tensor(0.3)}),
    "none": Case(70, 33, torch.float16, options={"reduction": "none"}),
    "none_tensor": Case(
        9, 20, torch.float32, options={"reduction": "none", "temperature": torch.tensor(0.3)}
    ),
}


class Call:
    """A forward, whose backward may run several times."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(1)
        views = torch.randn(2, case.pairs, case.features, generator=generator, device="cpu")
        self.inputs = [z.to(DEVICE, case.dtype).requires_grad_() for z in views]
        options = dict(case.options)
        temperature = options.get("temperature")
        if isinstance(temperature, Tensor):
            options["temperature"] = temperature.to(DEVICE).clone().requires_grad_()
            self.inputs.append(options["temperature"])
        self.out = nt_xent(*self.inputs[:2], backend="triton", **options)
        upstream = torch.randn(2 * case.pairs, generator=generator, device="cpu").to(DEVICE)
        scalar = self.out.loss.ndim == 0
        self.upstream = torch.full_like(self.out.loss, case.upstream) if scalar else upstream

    def gradients(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.out.loss, self.inputs, self.upstream, retain_graph=True)


@contextmanager
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that are launched in the context."""
    names: list[str] = []

    def noted(kernel: Any, programs: int, **arguments: Any) -> None:
        names.append(kernel.__name__)
        run_kernel(kernel, programs, **arguments)

    with monkeypatch.context() as patch:
        for module in LAUNCHING:
            path = f"cjepa_kernels.triton.{module}"
            patch.setattr(importlib.import_module(path), "run_kernel", noted)
        yield names


def same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_saved_rows_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    saved = Call(case)
    with launched(monkeypatch) as names:
        gradients = saved.gradients()
    assert "pack_kernel" not in names
    assert ("weights_kernel" in names) == (case.options.get("reduction") == "none")
    monkeypatch.setattr(dispatch, "SAVED_BYTES", 0)
    packed_again = Call(case)
    with launched(monkeypatch) as names:
        expected = packed_again.gradients()
    assert names.count("pack_kernel") == 1
    same(saved.out, packed_again.out)
    same(gradients, expected)
    same(saved.gradients(), expected)  # A second backward of the same graph.


def form(case: Case) -> Form:
    z = torch.empty(case.pairs, case.features, dtype=case.dtype, device="meta")
    return form_of(z, None, case.options.get("reduction", "mean"))


@pytest.mark.parametrize("name", ["bf16", "planes", "none"])
def test_the_limit_bounds_what_is_saved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is counted here once more: operands of whole tiles, and three numbers for a row."""
    case = CASES[name]
    rows = -(-2 * case.pairs // 128) * 128
    features = -(-case.features // 64) * 64
    numbers = {torch.float32: 3}.get(case.dtype, 1)
    weights = 0 if name == "none" else 12
    size = rows * (2 * numbers * features + weights)
    assert saved_bytes(form(case)) == size
    for limit, packed_again in ((size, False), (size - 1, True)):
        monkeypatch.setattr(dispatch, "SAVED_BYTES", limit)
        call = Call(case)
        with launched(monkeypatch) as names:
            call.gradients()
        assert ("pack_kernel" in names) == packed_again


def test_the_quick_bound_lets_nothing_too_large_through() -> None:
    for pairs in (1, 64, 65, 1000):
        for features in (1, 16, 33, 65, 768):
            for dtype in (torch.float32, torch.bfloat16):
                z = torch.empty(pairs, features, dtype=dtype, device="meta")
                for reduction in ("mean", "none"):
                    size = saved_bytes(form_of(z, None, reduction))
                    assert fits(size, z, None, reduction)
                    assert not fits(size - 1, z, None, reduction)


def test_nothing_is_saved_without_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def saves(*tensors: Tensor | None) -> bool:
        return dispatch.saves_for_backward(
            lambda limit: ops.saves_at_most(limit, ".triton", tensors[0], None, "mean"), *tensors
        )

    z = torch.randn(4, 8, device=DEVICE)
    wanted = z.clone().requires_grad_()
    assert saves(wanted, z, None)
    assert not saves(z, z, None)
    with torch.no_grad():
        assert not saves(wanted, z, None)
    # The chunked back end serves fp64, and saves nothing.
    assert not saves(wanted.double(), z.double(), None)


def test_rows_of_another_form_are_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's setting for tf32 may change between a forward and its backward."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    results = []
    try:
        for limit in (dispatch.SAVED_BYTES, 0):
            monkeypatch.setattr(dispatch, "SAVED_BYTES", limit)
            matmul.allow_tf32 = False
            call = Call(CASES["planes"])
            matmul.allow_tf32 = True
            with launched(monkeypatch) as names:
                results.append(call.gradients())
            assert "pack_kernel" in names
    finally:
        matmul.allow_tf32 = before
    same(*results)


def test_a_change_of_the_inputs_is_an_error() -> None:
    call = Call(CASES["bf16"])
    with torch.no_grad():
        call.inputs[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call.gradients()


@pytest.mark.parametrize(
    ("reduction", "dtype"), [("mean", torch.float32), ("none", torch.bfloat16)], ids=str
)
def test_opcheck_with_saved_rows(reduction: str, dtype: torch.dtype) -> None:
    z_i, z_j = torch.randn(2, 5, 20, device=DEVICE).to(dtype).unbind()
    inputs = nt_xent_inputs(z_i.requires_grad_(), z_j, reduction=reduction, keep=True)
    out = ops.run("nt_xent", ".triton", **inputs)
    assert out.saved_for_backward.numel() == saved_bytes(form_of(z_i, None, reduction))
    for name, given in (
        ("nt_xent", inputs),
        ("nt_xent_backward", detached(nt_xent_backward_inputs(inputs, out))),
    ):
        # The remaining utility compiles, which the next test does too.
        torch.library.opcheck(
            ops.operator(name, ".triton"),
            in_order(name, given),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_a_compiled_step_saves_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(z_i: Tensor, z_j: Tensor) -> Tensor:
        return nt_xent(z_i, z_j, backend="triton").loss * 2

    z = torch.randn(2, 20, 24, device=DEVICE)
    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        views = [x.clone().requires_grad_() for x in z]
        loss = function(*views)
        with launched(monkeypatch) as names:
            results.append((loss, *torch.autograd.grad(loss, views)))
        assert names
        assert "pack_kernel" not in names
    same(*results)


def test_rows_lie_before_the_weights_in_aligned_memory() -> None:
    """A tensor map, and Triton's kernels for aligned pointers, need multiples of 16 bytes."""
    for case in CASES.values():
        assert row_bytes(form(case)) % 16 == 0
