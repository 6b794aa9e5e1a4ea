"""The operators under PyTorch's own checks, torch.compile and torch.export."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from overloads import OVERLOADS, RUNNABLE
from sample_inputs import (
    cross_inputs,
    cross_logsumexp_backward_inputs,
    cross_logsumexp_inputs,
    detached,
    in_order,
    nt_xent_backward_inputs,
    nt_xent_inputs,
    sample_inputs,
)
from tolerances import AUTOCAST_LOSS, EXACT, FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor, nn

from cjepa_kernels import (
    ContrastiveJEPALoss,
    HJEPALoss,
    NTXentLoss,
    backends,
    cross_logsumexp,
    nt_xent,
    ops,
)

pytestmark = pytest.mark.usefixtures("kernels_only")


# opcheck is slow, so not every combination runs.
def opchecked(cases: int) -> Any:
    """The combinations of overload, case and dtype of which any two values meet."""
    return pytest.mark.parametrize(
        ("overload", "case", "dtype"),
        [
            pytest.param(
                overload, case, dtype, id=f"{overload.lstrip('.') or 'dispatched'}-{case}-{dtype}"
            )
            for k, overload in enumerate(RUNNABLE)
            for case in range(cases)
            for n, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16))
            if (k + case + n) % 2 == 0
        ],
    )


NEEDS_NATIVE = pytest.mark.skipif(
    not backends()["native"].available, reason="the compiled kernels are not installed"
)
CASES = pytest.mark.parametrize("case", range(5))


@opchecked(5)
def test_opcheck_forward(overload: str, case: int, dtype: torch.dtype) -> None:
    inputs = in_order("nt_xent", sample_inputs(dtype)[case])
    torch.library.opcheck(ops.operator("nt_xent", overload), inputs)


@NEEDS_NATIVE
@CASES
def test_opcheck_with_kept_exponentials(case: int) -> None:
    inputs = sample_inputs()[case] | {"keep": True}
    out = ops.run("nt_xent", "", **inputs)
    assert out.saved_for_backward.numel() == ops.saved_exponentials_size(2 * len(inputs["z_i"]))
    # opcheck must not compare the outputs of two calls: the part of the saved exponentials that no
    # pair of rows fills holds whatever was in memory.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        ops.operator("nt_xent"), in_order("nt_xent", inputs), test_utils=utilities
    )
    backward_inputs = detached(nt_xent_backward_inputs(inputs, out))
    torch.library.opcheck(
        ops.operator("nt_xent_backward"), in_order("nt_xent_backward", backward_inputs)
    )


@CASES
def test_chunked_keeps_nothing(case: int) -> None:
    with pytest.raises(ValueError, match="keep must be False"):
        ops.run("nt_xent", ".chunked", **(sample_inputs()[case] | {"keep": True}))


@opchecked(5)
def test_opcheck_backward(overload: str, case: int, dtype: torch.dtype) -> None:
    inputs = sample_inputs(dtype)[case]
    out = ops.run("nt_xent", overload, **inputs)
    backward_inputs = detached(nt_xent_backward_inputs(inputs, out))
    torch.library.opcheck(
        ops.operator("nt_xent_backward", overload), in_order("nt_xent_backward", backward_inputs)
    )


@pytest.mark.parametrize(
    ("overload", "keep"),
    [("", False), pytest.param("", True, marks=NEEDS_NATIVE), (".chunked", False)],
)
@CASES
def test_gradcheck(overload: str, keep: bool, case: int) -> None:
    inputs = sample_inputs()[case] | {"keep": keep}
    names = ("z_i", "z_j", "temperature_tensor")

    def loss(*tensors: Tensor | None) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        result: Tensor = ops.run("nt_xent", overload, **(inputs | given)).loss
        return result

    assert torch.autograd.gradcheck(loss, [inputs[name] for name in names])


def test_gradgradcheck_of_the_reference() -> None:
    z_i, z_j = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return nt_xent(a, b, temperature=0.5, backend="reference").loss

    assert torch.autograd.gradgradcheck(loss, (z_i, z_j))


@opchecked(7)
def test_opcheck_cross_logsumexp(overload: str, case: int, dtype: torch.dtype) -> None:
    inputs = in_order("cross_logsumexp", cross_inputs(dtype)[case])
    torch.library.opcheck(ops.operator("cross_logsumexp", overload), inputs)


@opchecked(7)
def test_opcheck_cross_logsumexp_backward(overload: str, case: int, dtype: torch.dtype) -> None:
    inputs = cross_inputs(dtype)[case]
    out = ops.run("cross_logsumexp", overload, **inputs)
    wanted = {"of_x": case != 1, "of_y": case != 2}
    backward_inputs = detached(cross_logsumexp_backward_inputs(inputs, out) | wanted)
    torch.library.opcheck(
        ops.operator("cross_logsumexp_backward", overload),
        in_order("cross_logsumexp_backward", backward_inputs),
    )


@pytest.mark.parametrize("overload", ["", ".chunked"], ids=["dispatched", "chunked"])
@pytest.mark.parametrize("case", range(7))
def test_gradcheck_cross_logsumexp(overload: str, case: int) -> None:
    inputs = cross_inputs()[case]
    names = ("x", "y", "temperature_tensor")

    def results(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        out = ops.run("cross_logsumexp", overload, **(inputs | given))
        return out.row_lse, out.column_lse, out.positive

    assert torch.autograd.gradcheck(results, [inputs[name] for name in names])


@OVERLOADS
def test_registered_and_direct_autograd_agree(overload: str) -> None:
    """A compiler sees the operator with its registered autograd.

    Other calls go through a torch.autograd.Function, which costs less time.
    """
    paired = ("row_lse", "column_lse", "positive")
    for name, inputs, differentiable in (
        ("nt_xent", sample_inputs(torch.float32)[2], ("loss",)),
        ("cross_logsumexp", cross_inputs(torch.float32)[6], paired),
    ):
        leaves = [a for a in inputs.values() if isinstance(a, Tensor) and a.requires_grad]
        results = []
        for call in (ops.run, ops.call):
            out = call(name, overload, **inputs)._asdict()
            assert {key for key, value in out.items() if value.requires_grad} == {*differentiable}
            loss = torch.stack([out[key].sum() for key in differentiable]).sum()
            results.append([*out.values(), *torch.autograd.grad(loss, leaves)])
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)


def gradients_of_saved(
    name: str,
    *,
    saver: str,
    overload: str,
    sides: Tensor,
    temperature: float = 0.2,
    later_temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients that one overload computes from what the forward of another one saved.

    Args:
        name: The operator.
        saver: Overload of the forward.
        overload: Overload of the backward.
        sides: (2, rows, features) both inputs.
        temperature: The temperature of the forward.
        later_temperature: The temperature of the backward, if it is another one.
    """
    if name == "nt_xent":
        inputs = nt_xent_inputs(sides[0], sides[1], temperature=temperature)
        backward_inputs = nt_xent_backward_inputs(inputs, ops.run(name, saver, **inputs))
    else:
        inputs = cross_logsumexp_inputs(sides[0], sides[1], temperature=temperature)
        backward_inputs = cross_logsumexp_backward_inputs(inputs, ops.run(name, saver, **inputs))
    backward_inputs["temperature_tensor"] = later_temperature
    grad_first, grad_second, _ = ops.run(f"{name}_backward", overload, **backward_inputs)
    return grad_first, grad_second


OPERATORS = pytest.mark.parametrize("name", ["nt_xent", "cross_logsumexp"])


@OVERLOADS
@OPERATORS
@pytest.mark.parametrize("temperature", [0.2, 0.02], ids=["constant_shift", "running_maxima"])
def test_backward_takes_what_another_back_end_saved(
    overload: str, name: str, temperature: float
) -> None:
    """Saved shifts and sums mean the same in every back end, though the shifts may differ."""
    sides = torch.randn(2, 9, 5)
    results = [
        gradients_of_saved(
            name, saver=saver, overload=overload, sides=sides, temperature=temperature
        )
        for saver in (overload, *RUNNABLE)
    ]
    for other in results[1:]:
        for gradient, expected in zip(other, results[0], strict=True):
            assert relative_error(gradient, expected) <= 2 * FLOOR_GRADIENT[torch.float32]


@OVERLOADS
@OPERATORS
@pytest.mark.parametrize("value", [0.0, -0.5, torch.nan])
def test_backward_with_a_bad_temperature_gives_nan(overload: str, name: str, value: float) -> None:
    """The gradients are NaN although everything that the forward saved is finite."""
    gradients = gradients_of_saved(
        name,
        saver=overload,
        overload=overload,
        sides=torch.randn(2, 9, 5),
        later_temperature=torch.tensor(value),
    )
    for gradient in gradients:
        assert gradient.isnan().all()


@OVERLOADS
def test_autocast_reaches_the_backward(overload: str) -> None:
    """The functions pass the dtype of autocast to the operator, so both directions round alike."""
    x, y = (torch.randn(9, 5, requires_grad=True) for _ in range(2))
    backend: Any = overload.lstrip(".") or "auto"
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        pairs = [
            (
                nt_xent(x, y, backend=backend).loss,
                ops.run("nt_xent", overload, **nt_xent_inputs(x, y)).loss,
            ),
            (
                cross_logsumexp(x, y, backend=backend).row_lse.sum(),
                ops.run("cross_logsumexp", overload, **cross_logsumexp_inputs(x, y)).row_lse.sum(),
            ),
        ]
    for pair in pairs:
        actual, expected = (torch.autograd.grad(loss, (x, y)) for loss in pair)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=FLOOR_VALUE[torch.float32])


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_double_backward_names_the_way_out(backend: Any) -> None:
    z_i, z_j = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    loss = nt_xent(z_i, z_j, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, z_i, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_double_backward_of_cross_logsumexp_names_the_way_out(backend: Any) -> None:
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    out = cross_logsumexp(x, y, backend=backend)
    (gradient,) = torch.autograd.grad(out.row_lse.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'cross_logsumexp has no .*backend="reference"'):
        gradient.sum().backward()


class Model(nn.Module):
    """An encoder with the loss inside, as a user would compile or export it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 5)
        self.loss_fn = NTXentLoss(**options)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = self.loss_fn(self.encoder(a), self.encoder(b))
        return result


@pytest.fixture
def fresh_compiler() -> None:
    """Forget what other tests compiled.

    All of these tests compile the same code, and its recompilation limit counts over all of them.
    """
    torch._dynamo.reset()


# Any two values of the parameters meet.
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "learnt", "dynamic"),
    [
        ("auto", False, False),
        ("auto", True, True),
        ("chunked", False, True),
        ("chunked", True, False),
    ],
)
def test_compile_takes_the_whole_graph(backend: str, learnt: bool, dynamic: bool) -> None:
    model = Model(backend=backend, learnable_temperature=learnt)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (4, 7):
        a, b = torch.randn(batch, 6), torch.randn(batch, 6)
        expected, actual = model(a, b), compiled(a, b)
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value)
        parameters = list(model.parameters())
        for x, y in zip(
            torch.autograd.grad(actual["loss"], parameters),
            torch.autograd.grad(expected["loss"], parameters),
            strict=True,
        ):
            torch.testing.assert_close(x, y)


# Any two values of the parameters meet. Output 0 is row_lse, output 1 is column_lse.
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "outputs", "learnt", "dynamic"),
    [
        ("auto", (0,), False, False),
        ("chunked", (0,), True, True),
        ("auto", (1,), True, True),
        ("chunked", (1,), False, False),
        ("auto", (0, 1), False, True),
        ("chunked", (0, 1), True, False),
    ],
    ids=str,
)
def test_compile_takes_cross_logsumexp(
    backend: Any, outputs: tuple[int, ...], learnt: bool, dynamic: bool
) -> None:
    temperature: Any = torch.tensor(0.3, requires_grad=True) if learnt else 0.3

    def loss_fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = cross_logsumexp(x, y, temperature=temperature, backend=backend)
        return torch.stack([out[index].mean() for index in outputs]).sum(), out.column_max

    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, columns in ((4, 9), (7, 3)):
        leaves = [torch.randn(n, 5, requires_grad=True) for n in (rows, columns)]
        (expected, column_max), (actual, actual_max) = loss_fn(*leaves), compiled(*leaves)
        torch.testing.assert_close((actual, actual_max), (expected, column_max))
        wanted = [*leaves, temperature] if learnt else leaves
        for a, b in zip(
            torch.autograd.grad(actual, wanted), torch.autograd.grad(expected, wanted), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_takes_c_jepa_with_features_that_carry_no_gradient() -> None:
    """Without a compiler the call warns. The warning must not break the graph."""
    loss_fn = ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1))
    prediction, target = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5)
    features = torch.randn(2, 3, 5, 5)
    inputs = {
        "predictions": [prediction],
        "targets": [target],
        "target_features_i": features[0],
        "target_features_j": features[1],
    }
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    out = compiled(**inputs)
    with pytest.warns(UserWarning, match="carry no gradient"):
        expected = loss_fn(**inputs)
    torch.testing.assert_close(out["loss"], expected["loss"])


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_inductor_under_autocast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inductor's cache does not see a change of our operators' schemas.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Model()
    compiled = torch.compile(model, fullgraph=True)
    a, b = torch.randn(5, 6), torch.randn(5, 6)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        expected, actual = model(a, b)["loss"], compiled(a, b)["loss"]
    assert relative_error(actual, expected) < AUTOCAST_LOSS
    actual.backward()
    assert model.encoder.weight.grad.isfinite().all()


def test_export_keeps_the_operator() -> None:
    model = Model()
    example = (torch.randn(4, 6), torch.randn(4, 6))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, example, dynamic_shapes=({0: batch}, {0: batch}))
    assert "cjepa_kernels.nt_xent" in str(program.graph)
    other = (torch.randn(9, 6), torch.randn(9, 6))
    torch.testing.assert_close(program.module()(*other), model(*other))


def test_meta_tensors_have_the_shapes_of_real_ones() -> None:
    samples = {"nt_xent": sample_inputs(), "cross_logsumexp": cross_inputs()}
    for name, inputs in ((name, inputs) for name, cases in samples.items() for inputs in cases):
        meta_inputs = {
            key: value.to("meta") if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }
        real_out, meta_out = ops.run(name, "", **inputs), ops.run(name, "", **meta_inputs)
        for real, fake in zip(real_out, meta_out, strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_module_of_another_revision_is_not_used() -> None:
    """A module of another revision counts as missing, because its schemas may be others.

    No call reaches its kernels. A process that has imported PyTorch forks for each revision.
    """
    schema = importlib.import_module("cjepa_kernels.backends").SCHEMA_VERSION
    before_versions: dict[str, Any] = {"instruction_set": "avx2"}
    revisions = [before_versions, {"schema": schema - 1}, {"schema": schema + 1}]
    code = f"""
import os, sys, torch
for build_info in {revisions}:
    child = os.fork()
    if child == 0:
        exec(sys.argv[1])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, build_info
"""
    of_one_revision = """
import types
module = types.ModuleType("cjepa_kernels._C")
module.build_info = lambda: build_info
def register_operators():
    raise AssertionError("kernels of another revision")
module.register_operators = register_operators
sys.modules[module.__name__] = module
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import cjepa_kernels
from cjepa_kernels.backends import compiled_module
status = cjepa_kernels.backends()["native"]
assert not status.available
assert "built for another revision" in status.reason and "reinstall" in status.reason
assert compiled_module() is None
calls = set()
class Recorded(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cjepa_kernels":
            calls.add(str(func))
        return func(*args, **(kwargs or {}))
z = torch.randn(2, 5, 4, requires_grad=True)
for training in (True, False):
    with Recorded(), torch.set_grad_enabled(training):
        out = cjepa_kernels.cross_logsumexp(z[0], z[1])
        loss = cjepa_kernels.nt_xent(z[0], z[1]).loss + out.row_lse.sum()
        if training:
            loss.backward()
names = ("nt_xent", "nt_xent_backward", "cross_logsumexp", "cross_logsumexp_backward")
assert calls == {f"cjepa_kernels.{name}.chunked" for name in names}, calls
try:
    cjepa_kernels.nt_xent(z[0], z[1], backend="native")
except RuntimeError as error:
    assert "another revision" in str(error)
else:
    raise AssertionError("native was taken")
"""
    command = [sys.executable, "-c", code, of_one_revision]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_schema_version_is_that_of_the_compiled_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("cjepa_kernels.backends")  # not the function of that name
    if not backends()["native"].available:
        pytest.skip("no compiled kernel here")
    assert module.compiled_module().build_info()["schema"] == module.SCHEMA_VERSION
    monkeypatch.setattr(module, "SCHEMA_VERSION", module.SCHEMA_VERSION + 1)
    assert module.compiled_module() is None
