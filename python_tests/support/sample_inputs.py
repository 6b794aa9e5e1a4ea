"""Inputs of the operators that several tests share, by the names of their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import reference
from cjepa_kernels.definitions import CrossLogSumExpForward, NTXentForward, SelfLogSumExpForward
from cjepa_kernels.ops import registry

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def nt_xent_inputs(z_i: Tensor, z_j: Tensor, **changed: Any) -> dict[str, Any]:
    """All arguments of the operator ``nt_xent``, with defaults for those not given."""
    defaults: dict[str, Any] = {
        "mask": None,
        "temperature_tensor": None,
        "temperature": 0.1,
        "use_cosine_similarity": True,
        "eps": 1e-8,
        "reduction": "mean",
        "product_dtype": None,
        "keep": False,
    }
    return {"z_i": z_i, "z_j": z_j} | defaults | changed


def nt_xent_backward_inputs(inputs: dict[str, Any], out: NTXentForward) -> dict[str, Any]:
    """All arguments of ``nt_xent_backward`` after a forward, for upstream gradients of 1."""
    shared = {name: value for name, value in inputs.items() if name != "keep"}
    return shared | {
        "grad_loss": torch.ones_like(out.loss),
        "shift": out.shift,
        "log_sum": out.log_sum,
        "positive": out.positive,
        "kept": out.saved_for_backward,
    }


def cross_logsumexp_inputs(x: Tensor, y: Tensor, **changed: Any) -> dict[str, Any]:
    """All arguments of the operator ``cross_logsumexp``, with defaults for those not given."""
    defaults: dict[str, Any] = {
        "positives": None,
        "temperature_tensor": None,
        "temperature": 0.1,
        "use_cosine_similarity": True,
        "eps": 1e-8,
        "product_dtype": None,
        "keep": False,
    }
    return {"x": x, "y": y} | defaults | changed


def cross_logsumexp_backward_inputs(
    inputs: dict[str, Any], out: CrossLogSumExpForward
) -> dict[str, Any]:
    """All arguments of ``cross_logsumexp_backward`` after a forward, for upstream gradients of 1.

    Both sides get their gradient.
    """
    shared = {name: value for name, value in inputs.items() if name != "keep"}
    paired = inputs["positives"] is not None
    return shared | {
        "grad_row_lse": torch.ones_like(out.row_lse),
        "grad_column_lse": torch.ones_like(out.column_lse),
        "grad_positive": torch.ones_like(out.positive) if paired else None,
        "kept": out.saved_for_backward,
        "row_shift": out.row_shift,
        "row_log_sum": out.row_log_sum,
        "column_shift": out.column_shift,
        "column_log_sum": out.column_log_sum,
        "of_x": True,
        "of_y": True,
    }


def self_logsumexp_inputs(z_i: Tensor, z_j: Tensor | None = None, **changed: Any) -> dict[str, Any]:
    """All arguments of the operator ``self_logsumexp``, with defaults for those not given."""
    defaults: dict[str, Any] = {
        "positives": None,
        "classes": None,
        "class_means": None,
        "class_weights": None,
        "temperature_tensor": None,
        "temperature": 0.1,
        "use_cosine_similarity": True,
        "eps": 1e-8,
        "product_dtype": None,
        "keep": False,
    }
    return {"z_i": z_i, "z_j": z_j} | defaults | changed


def self_logsumexp_backward_inputs(
    inputs: dict[str, Any], out: SelfLogSumExpForward
) -> dict[str, Any]:
    """All arguments of ``self_logsumexp_backward`` after a forward, for upstream gradients of 1."""
    shared = {k: value for k, value in inputs.items() if k not in ("keep", "class_means")}
    paired = inputs["z_j"] is not None or inputs["positives"] is not None
    return shared | {
        "grad_lse": torch.ones_like(out.lse),
        "grad_positive": torch.ones_like(out.positive) if paired else None,
        "shift": out.shift,
        "log_sum": out.log_sum,
        "kept": out.saved_for_backward,
    }


def in_order(name: str, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments in the order of the operator's schema, which opcheck needs."""
    return tuple(registry.arguments[name](**inputs))


def detached(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with detached tensors."""
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def sample_inputs(dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Arguments of the operator ``nt_xent``, for opcheck and gradcheck."""

    def z(batch: int, features: int) -> Tensor:
        return torch.randn(batch, features, dtype=dtype, requires_grad=True)

    mask = torch.rand(4, 4) < 0.4
    learnable = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    learnt = {"temperature_tensor": learnable, "temperature": 1.0}
    return [
        nt_xent_inputs(z(3, 5), z(3, 5), temperature=0.2),
        nt_xent_inputs(z(4, 3), z(4, 3), mask=mask, temperature=0.5, reduction="none"),
        nt_xent_inputs(z(4, 3), z(4, 3), mask=mask, **learnt, reduction="sum"),
        nt_xent_inputs(z(5, 2), z(5, 2), **learnt, use_cosine_similarity=False),
        nt_xent_inputs(z(2, 4), z(2, 4), reduction="sum"),
    ]


def cross_inputs(dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Arguments of the operator ``cross_logsumexp``, for opcheck and gradcheck."""

    def z(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    learnable = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    learnt = {"temperature_tensor": learnable, "temperature": 1.0}
    strided = torch.randn(3, 7, dtype=dtype).T.requires_grad_()
    return [
        cross_logsumexp_inputs(z(3, 5), z(4, 5), temperature=0.2),
        cross_logsumexp_inputs(z(1, 4), z(6, 4), **learnt),
        cross_logsumexp_inputs(z(5, 2), z(1, 2), **learnt, use_cosine_similarity=False),
        cross_logsumexp_inputs(z(5, 3), strided, temperature=0.02),
        cross_logsumexp_inputs(strided, z(2, 3), temperature=2.0, use_cosine_similarity=False),
        cross_logsumexp_inputs(z(3, 5), z(4, 5), positives=torch.tensor([3, -1, 0])),
        cross_logsumexp_inputs(z(4, 3), z(2, 3), positives=torch.tensor([1, 1, 0, 1]), **learnt),
    ]


def self_inputs(dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Arguments of the operator ``self_logsumexp``, for opcheck and gradcheck."""

    def z(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    learnable = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    learnt = {"temperature_tensor": learnable, "temperature": 1.0}
    strided = torch.randn(3, 6, dtype=dtype).T.requires_grad_()
    return [
        self_logsumexp_inputs(z(5, 4), temperature=0.2),
        self_logsumexp_inputs(z(3, 4), z(3, 4), **learnt),
        self_logsumexp_inputs(strided, positives=torch.tensor([4, -1, 3, 2, 0, -1]), **learnt),
        self_logsumexp_inputs(z(4, 3), z(4, 3), classes=torch.tensor([7, -2, 7, 9])),
        self_logsumexp_inputs(
            z(5, 2),
            positives=torch.tensor([1, 0, 3, 2, -1]),
            classes=torch.tensor([2, 1, 1, 0, 2]),
            temperature=2.0,
            use_cosine_similarity=False,
        ),
        with_attraction(
            self_logsumexp_inputs(
                z(7, 3),
                positives=torch.tensor([-1, 3, -1, 1, -1, -1, -1]),
                classes=torch.tensor([4, 2, 4, 2, 9, 4, 4]),
                **learnt,
            )
        ),
    ]


def with_attraction(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments of ``self_logsumexp`` where rows of one class attract each other.

    Rows with a positive are attracted by nothing else.
    """
    classes, positives = inputs["classes"], inputs["positives"]
    of_classes = reference.class_similarity(
        inputs["z_i"].detach(),
        classes,
        use_cosine_similarity=inputs["use_cosine_similarity"],
    )
    others = (classes[:, None] == classes).sum(dim=1) - 1
    if positives is not None:
        others = others.where(positives == -1, 0)
    means = of_classes.within.where(others > 0, 0.0)
    weights = others.to(means.dtype).reciprocal().where(others > 0, 0.0)
    return inputs | {"class_means": means, "class_weights": weights}


def sides(
    rows: int, columns: int, features: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Random x, and y whose rows lie near rows of x. Both are leaves that require a gradient."""
    x = torch.randn(rows, features, dtype=torch.float64)
    y = x[torch.arange(columns) % rows] + torch.randn(columns, features, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
