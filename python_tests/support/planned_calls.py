"""Calls of operators for the tests of launch plans.

The calls of one kind, of which ``call`` is the number, differ in values only: in the numbers of
their tensors, in the temperature and in eps. Their tensors are made on the default device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cjepa_kernels.ops import cross_logsumexp, nt_xent, prediction_loss, self_logsumexp
from cjepa_kernels.triton import OPERATORS, planned

NAMESPACE = "cjepa_planned"
DEFINITIONS = {
    module.DEFINITION.name: module.DEFINITION
    for module in (nt_xent, cross_logsumexp, self_logsumexp, prediction_loss)
}


def same(a: Any, b: Any) -> None:
    """Assert the same bits, shapes and strides."""
    if isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
        return
    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def randn(call: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that depend on the number of the call, whatever the default device."""
    generator = torch.Generator().manual_seed(call)
    numbers = torch.randn(shape, generator=generator, device="cpu")
    return numbers.to(dtype).to(torch.get_default_device())


def views(call: int, batch: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views as projection heads give them: interleaved in one tensor, or each for itself."""
    z = randn(call, batch, 2, features, dtype=dtype)
    return z[:, 0], z[:, 1]


def temperature(call: int, constant: bool = True) -> float:
    """A schedule; without a constant shift all are below the lowest temperature that has one."""
    return (0.1 + 0.01 * call) if constant else 0.01 + 0.001 * call


NT_XENT = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "rounded": {"product_dtype": torch.bfloat16},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "dot": {"cosine": False},
    "low": {"constant": False},
    "mask": {"mask": True},
    "tensor": {"tensor": True},
    "large": {"batch": 200, "dtype": torch.bfloat16},
    "odd": {"batch": 70, "features": 33},
    "saved": {"dtype": torch.bfloat16, "save": True},
    "saved_tensor": {"tensor": True, "save": True},
    "saved_none": {"reduction": "none", "save": True},
}


def nt_xent_forward(
    call: int,
    *,
    batch: int = 20,
    features: int = 16,
    dtype: torch.dtype = torch.float32,
    product_dtype: torch.dtype | None = None,
    reduction: str = "mean",
    cosine: bool = True,
    constant: bool = True,
    mask: bool = False,
    tensor: bool = False,
    save: bool = False,
) -> tuple[Any, ...]:
    z_i, z_j = views(call, batch, features, dtype)
    pairs = randn(call, batch, batch) < -1 if mask else None
    tau = temperature(call, constant)
    eps = 1e-8 * (call + 1)
    tau_tensor = torch.tensor(tau) if tensor else None
    number = 1.0 if tensor else tau
    return z_i, z_j, pairs, tau_tensor, number, cosine, eps, reduction, product_dtype, save


def nt_xent_backward(call: int, **options: Any) -> tuple[Any, ...]:
    args = nt_xent_forward(call, **options)
    out = OPERATORS["nt_xent"][0](*args)
    rows = 2 * args[0].shape[0]
    grad = randn(call, *((rows,) if options.get("reduction") == "none" else ()))
    return grad, *args[:4], out.shift, out.log_sum, out.positive, out.saved_for_backward, *args[4:9]


def rectangle(
    call: int, *, dtype: torch.dtype, tensor: bool, paired: bool = False
) -> tuple[Any, ...]:
    x = randn(call, 30, 24, dtype=dtype)
    y = randn(call + 100, 17, 24, dtype=dtype)
    positives = (torch.arange(30, device=x.device) * (call + 1)) % 18 - 1 if paired else None
    tau = torch.tensor(temperature(call)) if tensor else None
    number = 1.0 if tensor else temperature(call)
    return x, y, positives, tau, number, True, 1e-8 * (call + 1), None, False


def rectangle_backward(call: int, *, of_x: bool, of_y: bool, **options: Any) -> tuple[Any, ...]:
    x, y, positives, tau, *others, _ = rectangle(call, **options)
    out = OPERATORS["cross_logsumexp"][0](x, y, positives, tau, *others, False)
    grads = randn(call, 30), randn(call + 1, 17), None if positives is None else randn(call, 30)
    sums = out.row_shift, out.row_log_sum, out.column_shift, out.column_log_sum
    return *grads, x, y, positives, tau, *sums, out.saved_for_backward, *others, of_x, of_y


SELF = {
    "plain": {"dtype": torch.bfloat16},
    "views_and_classes": {"views": 2, "classed": True, "tensor": True},
    "positives": {"dtype": torch.float16, "paired": True},
    "attraction": {"classed": True, "attracted": True, "tensor": True},
}


def rows_of_a_batch(
    call: int,
    *,
    views: int = 1,
    dtype: torch.dtype = torch.float32,
    paired: bool = False,
    classed: bool = False,
    attracted: bool = False,
    tensor: bool = False,
) -> tuple[Any, ...]:
    z = randn(call, 34, 24, dtype=dtype)
    z_i, z_j = z.chunk(2) if views == 2 else (z, None)
    # In each call another pair is missing, and other samples are of one class.
    other = torch.arange(34).flip(0)
    positives = other.where(torch.minimum(other, other.flip(0)) != call, -1) if paired else None
    classes = torch.arange(len(z_i)) * (call + 1) % 5 if classed else None
    of_classes = (randn(call + 2, 34), randn(call + 3, 34)) if attracted else (None, None)
    tau = torch.tensor(temperature(call)) if tensor else None
    number = 1.0 if tensor else temperature(call)
    options = True, 1e-8 * (call + 1), None, False
    return z_i, z_j, positives, classes, *of_classes, tau, number, *options


def rows_of_a_batch_backward(call: int, **options: Any) -> tuple[Any, ...]:
    *args, _ = rows_of_a_batch(call, **options)
    out = OPERATORS["self_logsumexp"][0](*args, False)
    grad_positive = randn(call + 1, 34) if out.positive.numel() > 0 else None
    saved = out.shift, out.log_sum, out.saved_for_backward
    class_means = 4  # its place, which the backward does not take
    tensors = args[:class_means] + args[class_means + 1 : 7]
    return randn(call, 34), grad_positive, *tensors, *saved, *args[7:]


def hierarchy(
    call: int, *, dtype: torch.dtype, loss_type: str, normalization: str, reduction: str, mask: bool
) -> tuple[Any, ...]:
    """Levels of several widths, of which the second has a mask."""
    shapes = ((3, 5, 24), (3, 4, 40), (6, 8))
    sides = [[randn(10 * call + side, *shape, dtype=dtype) for shape in shapes] for side in (0, 1)]
    masks = []
    if mask:
        masks = [torch.empty(0, dtype=torch.bool) for _ in shapes]
        masks[1] = randn(call, 3, 4) < 0
    weights = [1.0, 0.5, 2.0]
    eps = 1e-6 * (call + 1)
    return *sides, masks, weights, loss_type, normalization, 0.7, eps, reduction


def hierarchy_backward(call: int, **options: Any) -> tuple[Any, ...]:
    args = hierarchy(call, **options)
    out = OPERATORS["prediction_loss"][0](*args)
    grad = randn(call)
    grad_levels = None
    if options["reduction"] == "none":
        grad_levels = randn(call, *out.levels.shape)
    return grad, None, grad_levels, *args[:3], out.statistics, out.scales, *args[3:], True


class Operators:
    """The operators with plans, and how often they came back to Python."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.python_calls = 0
        self.library = torch.library.Library(NAMESPACE, "FRAGMENT")
        for name, definition in DEFINITIONS.items():
            schemas = (definition.schema, definition.schema_backward)
            for suffix, schema, function in zip(
                ("", "_backward"), schemas, OPERATORS[name], strict=True
            ):
                self.add(name + suffix, schema, function)

    def add(self, name: str, schema: str, function: Callable[..., Any]) -> None:
        """Define an operator that replays plans of what ``function`` launches."""

        def counted(*args: Any) -> Any:
            self.python_calls += 1
            return function(*args)

        self.library.define(name + schema)
        planned.register_in(self.library, name, schema, counted, "CPU")

    def __call__(self, name: str, *args: Any) -> Any:
        try:
            return getattr(getattr(torch.ops, NAMESPACE), name)(*args)
        except RuntimeError as error:
            planned.raise_original(error)
