"""Log-sum-exps of both sides of a rectangle as functions, and the similarity of its pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend, check_backend
from cjepa_kernels.definitions import (
    EPS,
    TEMPERATURE,
    CrossLogSumExp,
    CrossLogSumExpForward,
    PairedLogSumExp,
)
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.operands import operand_rows


def cross_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    backend: Backend = "auto",
) -> CrossLogSumExp:
    """Log-sum-exp of every row and every column of similarities, without the (M, N) matrix.

    With s_ab the similarity of ``x[a]`` and ``y[b]``, one pass gives log sum_b exp(s_ab / tau) for
    every a and log sum_a exp(s_ab / tau) for every b. Nothing is left out of either sum. Where
    each row has a positive, :func:`paired_logsumexp` is the better choice.

    Args:
        x: (M, D), M >= 1. fp64, fp32, bf16 or fp16.
        y: (N, D), N >= 1; same D and device. Two dtypes become the one that
            ``torch.promote_types`` gives; gradients have each input's own.
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient of its shape. A tensor outside of that range gives NaN, because the host never
            reads it. Default 0.1.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient. Default 1e-8.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.

    Returns:
        CrossLogSumExp: ``row_lse`` (M,), ``column_lse`` (N,) and, detached and not divided by
        temperature, the largest similarities ``row_max`` (M,) and ``column_max`` (N,); fp32 (fp64
        for fp64 inputs).

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: InfoNCE, arXiv 1807.03748, equation 4; both directions as in CLIP, arXiv 2103.00020.

    Example:
        >>> x, y = torch.eye(4), torch.eye(4)
        >>> out = cross_logsumexp(x, y, temperature=0.5)
        >>> out.row_lse  # log(exp(2) + 3)
        tensor([2.3408, 2.3408, 2.3408, 2.3408])
    """
    x, y, options = _check(x, y, temperature, use_cosine_similarity, eps, backend)
    if backend == "reference":
        with dispatch.without_autocast(x.device):
            return reference.cross_logsumexp(x, y, **options)
    overload = dispatch.choose_overload(backend, x.device)
    out = run_cross_logsumexp(x, y, positives=None, overload=overload, **options)
    return CrossLogSumExp(
        row_lse=out.row_lse,
        column_lse=out.column_lse,
        row_max=out.row_max,
        column_max=out.column_max,
    )


def paired_logsumexp(
    x: Tensor,
    y: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    backend: Backend = "auto",
) -> PairedLogSumExp:
    """Log-sum-exp of every row's and every column's negatives, and the similarity of positives.

    Each row of ``x`` has one row of ``y`` as its positive. With s_ab the similarity of ``x[a]`` and
    ``y[b]``, one pass gives log sum_b exp(s_ab / tau) over the b that are not a's positive, the
    same for every column, and the similarity of each row and its positive. Contrastive losses are
    functions of these numbers: InfoNCE is softplus(row_lse - positive / tau), and loses nothing to
    rounding when the positive dominates. :func:`info_nce` is that loss.

    Args:
        x: (M, D), M >= 1. fp64, fp32, bf16 or fp16.
        y: (N, D), N >= 1; same D and device. Two dtypes become the one that
            ``torch.promote_types`` gives; gradients have each input's own.
        positives: (M,) int64 on the same device: for each row of ``x`` the row of ``y`` that is its
            positive. Several rows may have the same one.
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient of its shape. A tensor outside of that range gives NaN, because the host never
            reads it. Default 0.1.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient. Default 1e-8.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.

    Returns:
        PairedLogSumExp: ``row_lse`` (M,), ``column_lse`` (N,) and ``positive`` (M,), and detached
        ``row_max`` (M,), ``column_max`` (N,) and ``mean_similarity`` (); fp32 (fp64 for fp64
        inputs).

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it. On a GPU and under
            torch.compile the host does not read ``positives``. There a number outside of 0 to N - 1
            makes its row's ``positive`` NaN. The compiled CPU kernels raise.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: InfoNCE, arXiv 1807.03748, equation 4; decoupled sum as in DCL, arXiv 2110.06848.

    Example:
        >>> x, y = torch.eye(4), torch.eye(4)
        >>> out = paired_logsumexp(x, y, torch.arange(4), temperature=0.5)
        >>> out.positive
        tensor([1., 1., 1., 1.])
        >>> out.row_lse  # log 3: the three other columns are orthogonal to the row
        tensor([1.0986, 1.0986, 1.0986, 1.0986])
    """
    x, y, options = _check(x, y, temperature, use_cosine_similarity, eps, backend)
    positives = ops.saveable(checks.as_positives(positives, x, y))
    if backend == "reference":
        with dispatch.without_autocast(x.device):
            return reference.paired_logsumexp(x, y, positives, **options)
    overload = dispatch.choose_overload(backend, x.device)
    out = run_cross_logsumexp(x, y, positives=positives, overload=overload, **options)
    return PairedLogSumExp(
        row_lse=out.row_lse,
        column_lse=out.column_lse,
        row_max=out.row_max,
        column_max=out.column_max,
        positive=out.positive,
        mean_similarity=out.mean_similarity,
    )


def _check(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    backend: Backend,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Both sides in one dtype, and the other arguments as the back ends take them."""
    check_backend(backend)
    temperature = checks.without_arrays(temperature, x)
    checks.check_temperature(temperature)
    checks.check_in_range("eps", eps)
    checks.check_bool("use_cosine_similarity", use_cosine_similarity)
    checks.check_rectangle(x, y)
    checks.check_temperature_device(temperature, "x", x)
    options = {
        "temperature": checks.as_float_or_scalar(temperature),
        "use_cosine_similarity": use_cosine_similarity,
        "eps": checks.as_float(eps),
    }
    x, y = checks.promote(x, y)
    if backend == "reference":
        x, y, options["temperature"] = map(ops.saveable, (x, y, options["temperature"]))
    return x, y, options


def run_cross_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    positives: Tensor | None,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    overload: str,
    product_dtype: torch.dtype | None = None,
) -> CrossLogSumExpForward:
    """The operator ``cross_logsumexp`` with checked arguments.

    Operands are rounded to ``product_dtype``, by default to autocast's dtype.
    """
    tensor, number = checks.split_temperature(temperature)
    out: CrossLogSumExpForward = ops.call(
        "cross_logsumexp",
        overload,
        x=x,
        y=y,
        positives=positives,
        temperature_tensor=tensor,
        temperature=number,
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        product_dtype=product_dtype or dispatch.product_dtype(x),
        keep=dispatch.saves_for_backward(
            lambda limit: ops.rectangle_saves_at_most(limit, overload, x, y), x, y, tensor
        ),
    )
    return out


def pair_similarity(
    x: Tensor,
    y: Tensor,
    *,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    backend: Backend = "auto",
) -> Tensor:
    """Similarity of row k of ``x`` and row k of ``y``, rounded as :func:`cross_logsumexp` does.

    That is the positive of InfoNCE. In half precision, under autocast and where a GPU may multiply
    in tf32, the log-sum-exp is over products of rounded rows, added up in fp32. A positive from
    rows that are not rounded, or one that is itself rounded to bf16, may lie above the log-sum-exp
    and give a negative loss.

    Args:
        x: (B, D), B >= 1. fp64, fp32, bf16 or fp16.
        y: Same shape and device. Two dtypes become the one that ``torch.promote_types`` gives.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient. Default 1e-8.
        backend: The one that :func:`cross_logsumexp` is given: each has a rounding of its own.

    Returns:
        (B,) similarities, not divided by a temperature; fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: InfoNCE, arXiv 1807.03748, equation 4 (the numerator).

    Example:
        >>> image, text = torch.eye(4), 2 * torch.eye(4)
        >>> pair_similarity(image, text)
        tensor([1., 1., 1., 1.])
    """
    check_backend(backend)
    checks.check_in_range("eps", eps)
    checks.check_bool("use_cosine_similarity", use_cosine_similarity)
    checks.check_rectangle(x, y)
    if x.shape != y.shape:
        raise ValueError(f"x and y must have as many rows as each other, got {len(x)} and {len(y)}")
    x, y = checks.promote(x, y)
    options: dict[str, Any] = {
        "use_cosine_similarity": use_cosine_similarity,
        "eps": checks.as_float(eps),
        "backend": backend,
    }
    rows, others = operand_rows(x, **options), operand_rows(y, **options)
    with dispatch.without_autocast(x.device):
        return (rows * others).sum(dim=1)
