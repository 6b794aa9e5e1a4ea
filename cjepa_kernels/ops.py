"""Operators: schema, chunked implementation, fake, autograd and autocast, each in one place.

``cjepa_kernels::nt_xent`` dispatches on the device: a compiled back end registers itself under
its dispatch key (CPU, CUDA), ``CompositeExplicitAutograd`` is the chunked path that serves every
other device. The overload ``nt_xent.chunked`` has the chunked path alone, for those who ask for
it by name. Arguments are validated above, in ``functional``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import chunked
from cjepa_kernels.reference import accumulation_dtype

NAMESPACE = "cjepa_kernels"

# z_i, z_j: (B, D), any strides. mask: (B, B) bool. temperature_tensor: (), overrides temperature.
# product_dtype: dtype that the operands of z z^T are rounded to; None is the input's.
# keep: keep the exponentials of S for the backward, M^2 / 2 numbers and more (see kept_size).
# loss: () or, for reduction "none", (M,); lse, shift, log_sum, positive: (M,); metrics: ().
# shift is a similarity, log_sum the log of the sum over negatives of exp((s - shift) / tau):
# together they are LSE-, without the rounding of a large number at low temperature.
SCHEMA_FORWARD = (
    "(Tensor z_i, Tensor z_j, Tensor? mask, Tensor? temperature_tensor, float temperature, "
    "bool use_cosine_similarity, float eps, str reduction, ScalarType? product_dtype, "
    "bool keep) -> "
    "(Tensor loss, Tensor accuracy, Tensor positive_similarity, Tensor negative_similarity, "
    "Tensor lse, Tensor shift, Tensor log_sum, Tensor positive, Tensor kept)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad_loss, Tensor z_i, Tensor z_j, Tensor? mask, Tensor? temperature_tensor, "
    "Tensor shift, Tensor log_sum, Tensor positive, Tensor kept, float temperature, "
    "bool use_cosine_similarity, float eps, str reduction, ScalarType? product_dtype) -> "
    "(Tensor grad_z_i, Tensor grad_z_j, Tensor grad_temperature)"
)
OVERLOADS = ("", ".chunked")
AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}

# Any: the methods of Library carry no annotations.
_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def kept_size(rows: int) -> int:
    """Numbers that the native forward keeps on request: the tiles of S on and above the diagonal."""
    block = 192 if rows >= 1536 else 96
    blocks = (rows + block - 1) // block
    return blocks * (blocks + 1) // 2 * block * block


def _fake_forward(z_i: Tensor, *args: Any) -> tuple[Tensor, ...]:
    reduction, _, keep = args[-3:]
    rows = 2 * z_i.shape[0]
    dtype = accumulation_dtype(z_i.dtype)
    loss = z_i.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    metrics = (z_i.new_empty((), dtype=dtype) for _ in range(3))
    saved = (z_i.new_empty(rows, dtype=dtype) for _ in range(4))
    kept = z_i.new_empty(kept_size(rows) if keep else 0, dtype=dtype)
    return (loss, *metrics, *saved, kept)


def _fake_backward(
    grad_loss: Tensor,
    z_i: Tensor,
    z_j: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    shift: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    like = shift if temperature_tensor is None else temperature_tensor
    return (
        z_i.new_empty(z_i.shape),
        z_j.new_empty(z_j.shape),
        like.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z_i, z_j, mask, temperature_tensor, *ctx.options, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z_i, z_j, mask, temperature_tensor, *output[-4:])


def _make_backward(overload: str) -> Any:
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_loss is None:
            return (None,) * 10
        grad_z_i, grad_z_j, grad_temperature = operator("nt_xent_backward", overload)(
            grad_loss, *ctx.saved_tensors, *ctx.options
        )
        needs = ctx.needs_input_grad
        return (
            grad_z_i if needs[0] else None,
            grad_z_j if needs[1] else None,
            None,
            grad_temperature if needs[3] else None,
            *(None,) * 6,
        )

    return backward


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        'nt_xent has no second derivative in this back end; use backend="reference" for double '
        "backward"
    )


def _make_autocast(overload: str, device_type: str) -> Any:
    def autocast(*args: Any) -> Any:
        *rest, product_dtype, keep = args
        if product_dtype is None:
            product_dtype = torch.get_autocast_dtype(device_type)
            if args[0].dtype == torch.float64:
                product_dtype = torch.float64
        with torch.autocast(device_type, enabled=False):
            return operator("nt_xent", overload)(*rest, product_dtype, keep)

    return autocast


def operator(name: str, overload: str = "") -> Any:
    """The registered overload: ``operator("nt_xent")`` or ``operator("nt_xent", ".chunked")``."""
    return getattr(getattr(torch.ops.cjepa_kernels, name), overload.lstrip(".") or "default")


def _register(overload: str) -> None:
    forward, backward = f"nt_xent{overload}", f"nt_xent_backward{overload}"
    _library.define(forward + SCHEMA_FORWARD, tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(backward + SCHEMA_BACKWARD, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(forward, chunked.forward, "CompositeExplicitAutograd")
    _library.impl(backward, chunked.backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{forward}", _fake_forward, lib=_library)
    torch.library.register_fake(f"{NAMESPACE}::{backward}", _fake_backward, lib=_library)
    torch.library.register_autograd(
        f"{NAMESPACE}::{forward}",
        _make_backward(overload),
        setup_context=_setup_context,
        lib=_library,
    )
    torch.library.register_autograd(f"{NAMESPACE}::{backward}", _no_double_backward, lib=_library)
    for device_type, key in AUTOCAST_DEVICES.items():
        _library.impl(forward, _make_autocast(overload, device_type), key)


for _overload in OVERLOADS:
    _register(_overload)
